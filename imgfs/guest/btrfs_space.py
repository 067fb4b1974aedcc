"""What btrfs' block groups have free: of the free space tree, or what is between extents.

A block group says how much of it is used; what was found has to agree with that, for each one.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from imgfs._native._tables import clear_runs
from imgfs.guest import btrfs_tables as tables
from imgfs.guest.btrfs_tables import Chunk, Item
from imgfs.guest.doubt import Doubt
from imgfs.guest.runs import MOST_RUNS, FreeRuns

_INVERTED = bytes(0xFF - byte for byte in range(256))


@dataclass(frozen=True, slots=True)
class BlockGroup:
    """Addresses and bytes of the filesystem's own; of two copies only one counts."""

    start: int
    length: int
    used: int
    flags: int

    @property
    def end(self) -> int:
        return self.start + self.length


class BlockGroups:
    """Collects the block groups, of which each chunk must have one."""

    def __init__(self) -> None:
        self.found: list[BlockGroup] = []

    def on_leaf(self, block: bytes, items: Sequence[Item]) -> None:
        for item in items:
            if item[1] == tables.BLOCK_GROUP_ITEM:
                data = tables.data_of(block, item)
                if len(data) != tables.BLOCK_GROUP.size:
                    raise Doubt(f"the item of the block group at {item[0]} has {len(data)} bytes")
                used, _, flags = tables.BLOCK_GROUP.unpack(data)
                self.found.append(BlockGroup(item[0], item[2], used, flags))

    def check(self, chunks: Sequence[Chunk], bytes_used: int) -> None:
        """Raises Doubt unless they are those of the chunks, and use as much as that together."""
        theirs = [(chunk.logical, chunk.length, chunk.type) for chunk in chunks]
        ours = [(group.start, group.length, group.flags) for group in self.found]
        if ours != theirs:
            odd = min(set(ours) ^ set(theirs), default=None)
            raise Doubt(f"there is no chunk, or no block group, for (start, length, type) {odd}")
        used = sum(group.used for group in self.found)
        if used != bytes_used:
            raise Doubt(f"bytes_used is {bytes_used}, but block groups use {used}")


class _Runs:
    """Runs of the filesystem's own addresses as they are found, in order; touching ones are one."""

    def __init__(self) -> None:
        self.found = array("Q")  #: start, end, start, end and so on

    def add(self, start: int, end: int, apart: bool = False) -> None:
        """Raises Doubt unless it comes after all others, and there is room for it.  One that is to
        stay apart is not joined to that before it."""
        found = self.found
        if end <= start or end >> 64 or (found and start < found[-1]):
            raise Doubt(f"[{start}, {end}) is not in order")
        if found and start == found[-1] and not apart:
            found[-1] = end
            return
        found.append(start)
        found.append(end)
        if len(found) > 2 * MOST_RUNS:
            raise Doubt(f"more than {MOST_RUNS} runs")


class FreeSpaceTree:
    """Collects what the free space tree has: extents, and bitmaps where they are many."""

    def __init__(self, sectorsize: int) -> None:
        self._sector = sectorsize
        self._runs = _Runs()
        self._begins = True  # a block group
        self._counts: dict[tuple[int, int], int] = {}  # of runs in it, by its start and length

    def on_leaf(self, block: bytes, items: Sequence[Item]) -> None:
        for item in items:
            start, kind, length = item[:3]
            if kind == tables.FREE_SPACE_EXTENT:
                self._add(start, start + length)
            elif kind == tables.FREE_SPACE_BITMAP:
                bits = tables.data_of(block, item).translate(_INVERTED)
                if len(bits) * 8 * self._sector != length:
                    raise Doubt(f"the bitmap of {length} bytes at {start} has {len(bits)} bytes")
                runs = clear_runs(bits, len(bits) * 8)
                for begin, end in zip(runs[::2], runs[1::2], strict=True):
                    self._add(start + begin * self._sector, start + end * self._sector)
            elif kind == tables.FREE_SPACE_INFO and item[4] == tables.SPACE_INFO.size:
                count, _ = tables.SPACE_INFO.unpack(tables.data_of(block, item))
                self._counts[start, length] = count
                self._begins = True
            else:
                raise Doubt(f"key {item[:3]} with {item[4]} bytes is not known here")

    def _add(self, start: int, end: int) -> None:
        self._runs.add(start, end, self._begins)
        self._begins = False

    def free_of(self, groups: Sequence[BlockGroup]) -> array[int]:
        """Start, end and so on; no run is in two groups.  Raises Doubt where it has not as many of
        a group as it says.

        It may have groups that are gone: mkfs forgets to take those out with which it began.
        """
        free = array("Q")
        for group in groups:
            count = self._counts.get((group.start, group.length))
            runs = within(self._runs.found, group.start, group.end)
            if count is None:
                raise Doubt(f"the free space tree has no block group {group.start}")
            if len(runs) != 2 * count:
                raise Doubt(
                    f"extent_count of block group {group.start} is {count}, but the free space"
                    f" tree has {len(runs) // 2}"
                )
            free.extend(runs)
        return free


class Extents:
    """Collects what is in use, of the extent tree."""

    def __init__(self, sectorsize: int, nodesize: int) -> None:
        self._sector = sectorsize
        self._node = nodesize
        self._runs = _Runs()

    def on_leaf(self, block: bytes, items: Sequence[Item]) -> None:
        for start, kind, length, _, _ in items:
            if kind == tables.METADATA_ITEM:
                length = self._node
            elif kind != tables.EXTENT_ITEM:
                continue
            if (start | length) % self._sector:
                raise Doubt(f"the extent of {length} bytes at {start} is not of whole sectors")
            self._runs.add(start, start + length)

    def free_of(self, groups: Sequence[BlockGroup]) -> array[int]:
        """What is between them in the groups; start, end and so on."""
        free = array("Q")
        used = self._runs.found
        for group in groups:
            first = bisect_right(used, group.start)
            last = bisect_left(used, group.end)
            bounds = used[first:last]
            if first % 2 == 0:
                bounds.insert(0, group.start)
            if last % 2 == 0:
                bounds.append(group.end)
            free.extend(bounds)
        return free


def within(runs: array[int], start: int, end: int) -> array[int]:
    """Those of the runs that are inside of the range."""
    first, last = bisect_left(runs, start), bisect_right(runs, end)
    return runs[first + first % 2 : last - last % 2]


def check_used(groups: Sequence[BlockGroup], free: array[int]) -> None:
    """Raises Doubt unless each group uses what is not free of it."""
    for group in groups:
        runs = within(free, group.start, group.end)
        used = group.length - (sum(runs[1::2]) - sum(runs[::2]))
        if used != group.used:
            raise Doubt(f"block group {group.start} uses {group.used} bytes, but {used} are taken")


def on_device(chunks: Sequence[Chunk], free: array[int], size: int) -> FreeRuns:
    """The ranges of a device of `size` bytes that are free: of each copy, and what is of no chunk.
    Raises Doubt where copies overlap each other."""
    found = FreeRuns()
    at = 0
    copies = [(offset, chunk) for chunk in chunks for offset in chunk.stripes]
    for offset, chunk in sorted(copies, key=itemgetter(0)):
        if offset < at:
            raise Doubt(f"the chunk at {chunk.logical} is at {offset}, as is another")
        if offset > at:
            found.extend(array("Q", [at, offset]), 1, 0, size)
        runs = within(free, chunk.logical, chunk.end)
        found.extend(runs, 1, offset - chunk.logical, size)
        at = offset + chunk.length
    if at < size:
        found.extend(array("Q", [at, size]), 1, 0, size)
    return found


def without(runs: array[int], kept: Sequence[tuple[int, int]]) -> array[int]:
    """The runs, less those ranges."""
    for start, end in kept:
        first, last = bisect_left(runs, start), bisect_right(runs, end)
        bounds = array("Q")
        if first % 2:
            bounds.append(start)
        if last % 2:
            bounds.append(end)
        runs = runs[:first] + bounds + runs[last:]
    return runs
