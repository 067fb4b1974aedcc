"""Reading btrfs' trees: a level at a time, and of it only what can hold the keys that are wanted.

Each block has to be the one that its parent speaks of: its checksum, address, filesystem, owner,
level, generation and first key are all checked, and its keys have to be below those of the next.
As keys only ascend, no block can come twice, and no walk takes longer than there are blocks.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from imgfs.guest import btrfs_tables as tables
from imgfs.guest.btrfs_tables import Chunk, Item, Key, Root, Superblock
from imgfs.guest.doubt import Doubt, batches, read_whole
from imgfs.steps import Read, Steps

MOST_BLOCKS = 1 << 18  # of one level of a tree
_FIRST: Key = (0, 0, 0)
_LAST: Key = ((1 << 64) - 1, 0xFF, (1 << 64) - 1)
EVERYTHING = ((_FIRST, _LAST),)

Ranges = Sequence[tuple[Key, Key]]  # ascending and disjoint; both ends are wanted too
OnLeaf = Callable[[bytes, list[Item]], None]


class Mapping:
    """The chunks, by the addresses that they are for.  Raises Doubt where two share any."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = sorted(chunks, key=lambda chunk: chunk.logical)
        self._starts = [chunk.logical for chunk in self.chunks]
        end = 0
        for chunk in self.chunks:
            if chunk.logical < end:
                raise Doubt(f"the chunk at {chunk.logical} overlaps that before it")
            end = chunk.end

    def chunk_of(self, logical: int, length: int) -> Chunk:
        """That which has all of the range.  Raises Doubt where none has."""
        index = bisect_right(self._starts, logical) - 1
        if index < 0 or logical + length > self.chunks[index].end:
            raise Doubt(f"no chunk has {length} bytes at {logical}")
        return self.chunks[index]

    def place(self, logical: int, length: int) -> int:
        """Where the device has it; of two copies the first.  Raises Doubt where it is nowhere."""
        chunk = self.chunk_of(logical, length)
        return chunk.stripes[0] + logical - chunk.logical


@dataclass(frozen=True, slots=True)
class _Pointer:
    """A block of a tree, and which keys are in it: from its first up to those of `before`."""

    first: Key | None  # the root may begin with any
    before: Key
    bytenr: int
    generation: int


class Trees:
    """Reads the trees of one filesystem, which begins at byte `start` of file 0."""

    def __init__(self, sb: Superblock, start: int, mapping: Mapping) -> None:
        self._sb = sb
        self._start = start
        self._mapping = mapping
        self.blocks_read = array("Q")  #: their addresses

    def walk(self, root: Root, ranges: Ranges, on_leaf: OnLeaf) -> Steps[None]:
        """Call with each leaf that may have keys in the ranges, in order, and all of its items.
        Raises Doubt where a block is not in order."""
        if root.level > 7:
            raise Doubt(f"the {tables.TREE_NAMES[root.owner]} has level {root.level}")
        nodes = [_Pointer(None, _LAST, root.bytenr, root.generation)]
        for level in range(root.level, -1, -1):
            below: list[_Pointer] = []
            index = 0
            for batch in batches([self._read_of(node) for node in nodes]):
                for block in (yield from read_whole(batch)):
                    node = nodes[index]
                    index += 1
                    header = self._check(root, level, node, block)
                    try:
                        if level:
                            below += _children(node, block, header.nritems, ranges)
                        else:
                            found = tables.items(block, header.nritems)
                            _check_keys(node, [found[0][:3], found[-1][:3]] if found else [])
                            on_leaf(block, found)
                    except Doubt as doubt:
                        raise Doubt(f"{_name(root, node)}: {doubt}") from None
                if len(below) > MOST_BLOCKS:
                    name = tables.TREE_NAMES[root.owner]
                    raise Doubt(f"the {name} has more than {MOST_BLOCKS} blocks of a level")
            nodes = below

    def _read_of(self, node: _Pointer) -> Read:
        size = self._sb.nodesize
        if node.bytenr % self._sb.sectorsize:
            raise Doubt(f"a block of a tree is at {node.bytenr}, inside of a sector")
        return Read(self._start + self._mapping.place(node.bytenr, size), size)

    def _check(self, root: Root, level: int, node: _Pointer, block: bytes) -> tables.Header:
        """Raises Doubt unless it is the block that was looked for."""
        sb = self._sb
        if not tables.checksum_is_right(sb.csum_type, block):
            raise Doubt(f"the checksum of {_name(root, node)} is wrong")
        header = tables.parse_header(block)
        for name, value, wanted in (
            ("bytenr", header.bytenr, node.bytenr),
            ("fsid", header.fsid.hex(), sb.metadata_uuid.hex()),
            ("owner", header.owner, root.owner),
            ("level", header.level, level),
            ("generation", header.generation, node.generation),
        ):
            if value != wanted:
                raise Doubt(f"{_name(root, node)} has {name} {value}, not {wanted}")
        if header.generation > sb.generation:
            raise Doubt(
                f"{_name(root, node)} is of generation {header.generation}, later than the"
                f" superblock's {sb.generation}"
            )
        if not header.nritems and node.first is not None:
            raise Doubt(f"{_name(root, node)} is empty")
        self.blocks_read.append(node.bytenr)
        return header


def _name(root: Root, node: _Pointer) -> str:
    return f"the block at {node.bytenr} of the {tables.TREE_NAMES[root.owner]}"


def _check_keys(node: _Pointer, keys: Sequence[Key]) -> None:
    """Raises Doubt unless they ascend, from the first that there has to be and up to the end."""
    if keys and node.first not in (None, keys[0]):
        raise Doubt(f"begins with key {keys[0]}, not {node.first}")
    for key, after in zip_longest(keys, keys[1:]):
        # Nothing has the very last key, which stands for the end of the whole tree.
        if key >= (after or node.before):
            raise Doubt(f"key {key} is not in order")


def _children(node: _Pointer, block: bytes, nritems: int, ranges: Ranges) -> list[_Pointer]:
    """Those that can have keys in the ranges."""
    found = tables.pointers(block, nritems)
    keys = [each[:3] for each in found]
    _check_keys(node, keys)
    highest = [high for _, high in ranges]
    children = []
    for index, (key, each) in enumerate(zip(keys, found, strict=True)):
        before = keys[index + 1] if index + 1 < nritems else node.before
        wanted = bisect_left(highest, key)
        if wanted < len(ranges) and ranges[wanted][0] < before:
            children.append(_Pointer(key, before, each[3], each[4]))
    return children


def items_in(found: Sequence[Item], ranges: Ranges) -> list[Item]:
    """The items whose keys are in the ranges."""
    keys = [item[:3] for item in found]
    return [
        item
        for low, high in ranges
        for item in found[bisect_left(keys, low) : bisect_right(keys, high)]
    ]
