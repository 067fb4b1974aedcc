"""btrfs on one device, single or DUP: free is what no extent uses, and what is of no chunk.

What a crash leaves behind is whole as of the superblock's generation, but for the log tree of what
was fsynced since.  Whatever moves data to and fro (balance, replace) has to be at its end.
"""

from __future__ import annotations

import uuid
from array import array
from bisect import bisect_right

from imgfs.guest import btrfs_tables as tables
from imgfs.guest.btrfs_space import (
    BlockGroups,
    Extents,
    FreeSpaceTree,
    check_used,
    on_device,
    without,
)
from imgfs.guest.btrfs_tables import Chunk, Item, Root, Superblock
from imgfs.guest.btrfs_tree import EVERYTHING, Mapping, Ranges, Trees, items_in
from imgfs.guest.doubt import Doubt, NotShutDown
from imgfs.guest.runs import FreeRuns
from imgfs.guest.space import Filesystem
from imgfs.steps import Read, Steps, read_all

KIND = "btrfs"
_ANY = (1 << 64) - 1
_SIZES = tuple(1 << shift for shift in range(12, 17))  # of sectors and of blocks of trees
_TREES = (tables.EXTENT_TREE, tables.DEV_TREE, tables.FREE_SPACE_TREE, tables.BLOCK_GROUP_TREE)


def look(start: int, size: int) -> Steps[Filesystem]:
    """The filesystem at byte `start` of file 0, in a partition of `size` bytes."""
    places = [at for at in tables.MIRRORS if at + tables.SUPERBLOCK <= size]
    reads = [Read(start + at, tables.SUPERBLOCK) for at in places]
    copies = yield from read_all(reads)
    if not copies or len(copies[0]) < tables.SUPERBLOCK:
        return Filesystem(KIND, size, left_whole=f"{size} bytes have no room for a superblock")
    free = FreeRuns().found
    why, covers, used, sb, in_use = "", size, None, None, False
    try:
        sb = tables.parse_superblock(copies[0])
        _check_superblock(sb, copies[0])
        _check_features(sb)
        used = sb.bytes_used
        _check_geometry(sb, size)
        covers = sb.device.total_bytes
        _check_mirrors(sb, dict(zip(places[1:], copies[1:], strict=True)))
        free = yield from _find_free(sb, start)
    except Doubt as doubt:
        why, in_use = str(doubt), isinstance(doubt, NotShutDown)
    return Filesystem(
        kind=KIND,
        size=covers,
        label=sb.label.decode("utf-8", "replace") if sb else "",
        uuid=str(uuid.UUID(bytes=sb.fsid)) if sb else "",
        used=used,
        free=free,
        left_whole=why,
        not_shut_down=in_use,
    )


def _check_superblock(sb: Superblock, data: bytes) -> None:
    if sb.magic != tables.MAGIC:
        raise Doubt(f"magic is {sb.magic!r}, not {tables.MAGIC!r}")
    if sb.csum_type not in tables.CHECKSUMS:
        raise Doubt(f"csum_type {sb.csum_type} is not known")
    if not tables.checksum_is_right(sb.csum_type, data):
        raise Doubt("the superblock's checksum is wrong")
    if sb.bytenr != tables.MIRRORS[0]:
        raise Doubt(f"the superblock says that it is at {sb.bytenr}")


def _check_features(sb: Superblock) -> None:
    """Raises Doubt unless all of them are known, and there is nothing left to be done."""
    for flag, what in tables.REFUSED_FLAGS.items():
        if sb.flags & flag:
            raise Doubt(f"{what}: flags are {sb.flags:#x}")
    for flag, what in tables.REFUSED_INCOMPAT.items():
        if sb.incompat_flags & flag:
            raise Doubt(f"it has {what}: incompat_flags are {sb.incompat_flags:#x}")
    for name, value, known in (
        ("flags", sb.flags, tables.WRITTEN),
        ("incompat_flags", sb.incompat_flags, tables.KNOWN_INCOMPAT),
        ("compat_ro_flags", sb.compat_ro_flags, tables.KNOWN_COMPAT_RO),
    ):
        if value & ~known:
            raise Doubt(f"{name} {value:#x} have bits that are not known")
    if not sb.incompat_flags & tables.MIXED_BACKREF:
        raise Doubt(f"it is of before 2009: incompat_flags are {sb.incompat_flags:#x}")
    if sb.num_devices != 1:
        raise Doubt(f"it has {sb.num_devices} devices")
    if sb.log_root:
        why = f"there is a log tree of what was synced last: log_root is {sb.log_root}"
        raise NotShutDown(why)


def _check_geometry(sb: Superblock, size: int) -> None:
    def require(name: str, value: object, fits: bool) -> None:
        if not fits:
            raise Doubt(f"{name} is {value}, which cannot be")

    require("sectorsize", sb.sectorsize, sb.sectorsize in _SIZES)
    require("nodesize", sb.nodesize, sb.nodesize in _SIZES and sb.nodesize >= sb.sectorsize)
    device = sb.device
    require("dev_item.total_bytes", device.total_bytes, device.total_bytes > tables.RESERVED)
    require("dev_item.fsid", device.fsid.hex(), device.fsid == sb.metadata_uuid)
    latest = sb.chunk_root_generation
    require("chunk_root_generation", latest, latest <= sb.generation)
    if device.total_bytes > size:
        raise Doubt(f"dev_item.total_bytes is {device.total_bytes}, and its place has {size}")


def _check_mirrors(sb: Superblock, mirrors: dict[int, bytes]) -> None:
    """Raises Doubt where one is of later than the first.  Earlier ones are usual: a sync of a file
    writes only the first."""
    for place, data in mirrors.items():
        if not tables.checksum_is_right(sb.csum_type, data):
            continue
        other = tables.parse_superblock(data)
        same = (other.magic, other.bytenr, other.fsid) == (sb.magic, place, sb.fsid)
        if same and other.generation > sb.generation:
            raise Doubt(
                f"the superblock at {place} is of generation {other.generation}, later than the"
                f" first one's {sb.generation}"
            )


def _find_free(sb: Superblock, start: int) -> Steps[array[int]]:
    """On the device, in bytes.  Raises Doubt where the trees are not in order, or not as one."""
    mapping = yield from _read_chunks(sb, start)
    trees = Trees(sb, start, mapping)
    roots = yield from _read_roots(sb, trees)
    yield from _check_device(sb, trees, roots[tables.DEV_TREE], mapping.chunks)
    groups = BlockGroups()
    if sb.compat_ro_flags & tables.BLOCK_GROUP_TREE_FLAG:
        root = _root(roots, tables.BLOCK_GROUP_TREE)
        yield from trees.walk(root, EVERYTHING, groups.on_leaf)
    else:
        wanted = [
            (
                (chunk.logical, tables.BLOCK_GROUP_ITEM, 0),
                (chunk.logical, tables.BLOCK_GROUP_ITEM, _ANY),
            )
            for chunk in mapping.chunks
        ]
        yield from trees.walk(roots[tables.EXTENT_TREE], wanted, groups.on_leaf)
    groups.check(mapping.chunks, sb.bytes_used)
    valid = tables.FREE_SPACE_TREE_FLAG | tables.FREE_SPACE_TREE_VALID
    source: FreeSpaceTree | Extents
    if sb.compat_ro_flags & valid == valid:
        source, owner = FreeSpaceTree(sb.sectorsize), tables.FREE_SPACE_TREE
    else:
        source, owner = Extents(sb.sectorsize, sb.nodesize), tables.EXTENT_TREE
    yield from trees.walk(_root(roots, owner), EVERYTHING, source.on_leaf)
    free = source.free_of(groups.found)
    check_used(groups.found, free)
    for bytenr in trees.blocks_read:
        if bisect_right(free, bytenr) % 2:
            raise Doubt(f"the block of a tree at {bytenr} is called free")
    found = on_device(mapping.chunks, free, sb.device.total_bytes).found
    kept = [(0, tables.RESERVED), *((at, at + tables.STRIPE) for at in tables.MIRRORS)]
    return without(found, kept)


def _read_chunks(sb: Superblock, start: int) -> Steps[Mapping]:
    """Of the chunk tree, which is where the superblock's own chunks say."""
    first = tables.parse_sys_chunks(sb)
    trees = Trees(sb, start, Mapping(first))
    chunks: list[Chunk] = []
    devices: list[tables.Device] = []

    def on_leaf(block: bytes, items: list[Item]) -> None:
        for item in items:
            data = tables.data_of(block, item)
            if item[:2] == (tables.DEV_ITEMS, tables.DEV_ITEM):
                devices.append(tables.parse_device(data))
            else:
                chunks.append(tables.parse_chunk(item[:3], data, sb))

    level, generation = sb.chunk_root_level, sb.chunk_root_generation
    root = Root(tables.CHUNK_TREE, sb.chunk_root, level, generation)
    yield from trees.walk(root, EVERYTHING, on_leaf)
    if devices != [sb.device]:
        raise Doubt(f"the chunk tree has {len(devices)} devices, not just that of the superblock")
    if set(first) - set(chunks) or any(
        chunk.type & tables.SYSTEM and chunk not in first for chunk in chunks
    ):
        raise Doubt("sys_chunk_array and the chunk tree have different chunks")
    return Mapping(chunks)


def _read_roots(sb: Superblock, trees: Trees) -> Steps[dict[int, Root]]:
    """Of the trees that are read, by their numbers.  Raises Doubt where something is under way."""
    found: dict[int, Root] = {}
    wanted: Ranges = [
        *(((tree, tables.ROOT_ITEM, 0), (tree, tables.ROOT_ITEM, 0)) for tree in _TREES),
        ((tables.TREE_RELOC, tables.ROOT_ITEM, 0), (tables.TREE_RELOC, tables.ROOT_ITEM, _ANY)),
        ((tables.BALANCE, tables.TEMPORARY_ITEM, 0), (tables.BALANCE, tables.TEMPORARY_ITEM, _ANY)),
    ]

    def on_leaf(block: bytes, items: list[Item]) -> None:
        for item in items_in(items, wanted):
            if item[0] == tables.BALANCE:
                raise Doubt("a balance is in progress, or paused")
            if item[0] == tables.TREE_RELOC:
                raise Doubt("a balance was cut off: it has left a tree")
            found[item[0]] = tables.parse_root(item[0], tables.data_of(block, item))

    root = Root(tables.ROOT_TREE, sb.root, sb.root_level, sb.generation)
    yield from trees.walk(root, wanted, on_leaf)
    for owner in (tables.EXTENT_TREE, tables.DEV_TREE):
        _root(found, owner)
    return found


def _root(roots: dict[int, Root], owner: int) -> Root:
    if owner not in roots:
        raise Doubt(f"the root tree has no {tables.TREE_NAMES[owner]}")
    return roots[owner]


def _check_device(sb: Superblock, trees: Trees, root: Root, chunks: list[Chunk]) -> Steps[None]:
    """Raises Doubt unless what the device gives to chunks is what these have of it."""
    found: list[tuple[int, int, int]] = []

    def on_leaf(block: bytes, items: list[Item]) -> None:
        for item in items:
            objectid, kind, offset = item[:3]
            data = tables.data_of(block, item)
            if kind == tables.DEV_EXTENT:
                if objectid != sb.device.devid or len(data) != tables.DEV_EXTENT_ITEM.size:
                    raise Doubt(f"device {objectid} has an extent of {len(data)} bytes at {offset}")
                _, _, logical, length, _ = tables.DEV_EXTENT_ITEM.unpack(data)
                found.append((offset, logical, length))
            elif kind == tables.DEV_REPLACE and tables.is_replacing(data):
                raise Doubt("a device is being replaced")

    yield from trees.walk(root, EVERYTHING, on_leaf)
    theirs = [(at, chunk.logical, chunk.length) for chunk in chunks for at in chunk.stripes]
    if sorted(theirs) != found:
        odd = min(set(theirs) ^ set(found), default=None)
        raise Doubt(f"the device tree and the chunks differ in (offset, chunk, length) {odd}")
    used = sum(length for _, _, length in found)
    if used != sb.device.bytes_used:
        raise Doubt(f"dev_item.bytes_used is {sb.device.bytes_used}, but chunks have {used}")
