"""What ext2, ext3 and ext4 say is free: the block bitmaps of all groups.

The format is in the kernel's Documentation/filesystems/ext4; where the bitmap of a group was never
written (BLOCK_UNINIT) it is what mke2fs would have written, which is computed here.
"""

from __future__ import annotations

import struct
import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence

from imgfs._native._tables import clear_runs
from imgfs.guest import ext_tables as tables
from imgfs.guest.doubt import BATCH, Doubt, NotShutDown, batches, read_whole
from imgfs.guest.ext_geometry import Geometry, geometry
from imgfs.guest.ext_tables import Group, GroupChecksums, Superblock
from imgfs.guest.runs import FreeRuns
from imgfs.guest.space import Filesystem
from imgfs.steps import Read, Steps, read

_Blocks = tuple[int, int]  # [start, end)


def look(start: int, size: int) -> Steps[Filesystem]:
    """The filesystem at byte `start` of file 0, in a partition of `size` bytes."""
    if size < 2 * tables.SUPERBLOCK:
        return Filesystem("ext2", size, left_whole=f"{size} bytes have no room for a superblock")
    data = yield from read(start + tables.SUPERBLOCK, tables.SUPERBLOCK)
    if len(data) < tables.SUPERBLOCK:
        return Filesystem("ext2", size, left_whole="the superblock is past the end of the disk")
    sb = tables.parse_superblock(data)
    free = FreeRuns()
    why, covers, used, in_use = "", size, None, False
    try:
        _check_state(sb, data)
        shape = geometry(sb, size)
        covers = shape.size
        if sb.free_blocks_count <= sb.blocks_count:
            used = (sb.blocks_count - sb.free_blocks_count) * shape.block_size
        if sb.feature_incompat & tables.MMP:
            yield from _check_mmp(sb, shape, start)
        groups = yield from _read_groups(sb, shape, start)
        needed = _needed(shape, groups)
        each_time = max(1, BATCH // shape.block_size)
        for first in range(0, shape.groups, each_time):
            some = range(first, min(first + each_time, shape.groups))
            joined = yield from _read_bitmaps(sb, shape, start, groups, needed, some)
            clusters = sum(shape.clusters_in(number) for number in some)
            at = shape.group_start(first) // shape.ratio
            free.extend(
                clear_runs(joined, clusters), shape.block_size * shape.ratio, at, shape.size
            )
    except Doubt as doubt:
        why, in_use = str(doubt), isinstance(doubt, NotShutDown)
    return Filesystem(
        kind=sb.kind,
        size=covers,
        label=sb.volume_name.partition(b"\0")[0].decode("utf-8", "replace"),
        uuid=str(uuid.UUID(bytes=sb.uuid)) if any(sb.uuid) else "",
        used=used,
        free=FreeRuns().found if why else free.found,
        left_whole=why,
        not_shut_down=in_use,
    )


def _check_state(sb: Superblock, data: bytes) -> None:
    """Raises Doubt unless this is a filesystem that was unmounted with nothing left to do, all of
    whose features are known."""
    incompat, ro_compat = sb.feature_incompat, sb.feature_ro_compat
    if sb.magic != tables.MAGIC:
        raise Doubt(f"s_magic is {sb.magic:#x}, not {tables.MAGIC:#x}")
    if sb.rev_level > 1:
        raise Doubt(f"s_rev_level {sb.rev_level} is not known")
    if incompat & ~tables.KNOWN_INCOMPAT:
        raise Doubt(f"feature_incompat {incompat:#x} has bits that are not known")
    if ro_compat & ~tables.KNOWN_RO_COMPAT:
        raise Doubt(f"feature_ro_compat {ro_compat:#x} has bits that are not known")
    if incompat & tables.JOURNAL_DEV:
        raise Doubt("the journal of another filesystem")
    if sb.has_metadata_csum and not tables.superblock_checksum_is_right(data):
        raise Doubt("the superblock's checksum is wrong")
    if incompat & tables.RECOVER:
        raise NotShutDown("the journal needs recovery")
    if sb.state != tables.CLEAN:
        raise NotShutDown(f"s_state is {sb.state:#x}: not cleanly unmounted, or has errors")
    if sb.last_orphan:
        raise NotShutDown(f"a list of orphans begins at inode {sb.last_orphan}")
    if ro_compat & tables.ORPHAN_PRESENT:
        raise NotShutDown("the orphan file is in use")
    if sb.journal_dev or (sb.feature_compat & tables.HAS_JOURNAL and not sb.journal_inum):
        raise Doubt("the journal is on another device")


def _check_mmp(sb: Superblock, shape: Geometry, start: int) -> Steps[None]:
    """Raises Doubt when another machine has it mounted."""
    if not shape.first <= sb.mmp_block < shape.blocks:
        raise Doubt(f"s_mmp_block {sb.mmp_block} is not in the {shape.blocks} blocks")
    (data,) = yield from read_whole([Read(start + sb.mmp_block * shape.block_size, 1024)])
    magic, sequence = struct.unpack_from("<2I", data)
    if magic != tables.MMP_MAGIC:
        raise Doubt(f"mmp_magic is {magic:#x} in block {sb.mmp_block}")
    if sequence != tables.MMP_CLEAN:
        raise NotShutDown(f"mmp_seq is {sequence:#x}: it is mounted somewhere, or being checked")


def _read_groups(sb: Superblock, shape: Geometry, start: int) -> Steps[list[Group]]:
    """All descriptors.  Raises Doubt where one's checksum is wrong, or what it names is outside."""
    reads = []
    for block, count in shape.descriptor_blocks():
        if block + count > shape.blocks:
            raise Doubt(f"group descriptors at block {block} are past {shape.blocks} blocks")
        left = count * shape.block_size
        while left:
            length = min(left, BATCH)
            at = (block + count) * shape.block_size - left
            reads.append(Read(start + at, length))
            left -= length
    checksums = GroupChecksums(sb)
    groups: list[Group] = []
    for batch in batches(reads):
        for data in (yield from read_whole(batch)):
            for offset in range(0, len(data), shape.desc_size):
                if len(groups) == shape.groups:
                    break
                descriptor = data[offset : offset + shape.desc_size]
                groups.append(_check_group(sb, shape, checksums, len(groups), descriptor))
    return groups


def _check_group(
    sb: Superblock, shape: Geometry, checksums: GroupChecksums, number: int, descriptor: bytes
) -> Group:
    group = tables.parse_group(descriptor)
    if sb.has_gdt_csum and group.checksum != checksums.of_group(number, descriptor):
        raise Doubt(f"the checksum of the descriptor of group {number} is wrong")
    for name, block, count in (
        ("block_bitmap", group.block_bitmap, 1),
        ("inode_bitmap", group.inode_bitmap, 1),
        ("inode_table", group.inode_table, shape.inode_table_blocks),
    ):
        if not shape.first <= block <= shape.blocks - count:
            raise Doubt(f"bg_{name} {block} of group {number} is outside of the filesystem")
    return group


def _needed(shape: Geometry, groups: Sequence[Group]) -> dict[int, list[_Blocks]]:
    """For each group the clusters, counted from its first, that hold descriptors, bitmaps and
    inode tables of this and other groups.  Raises Doubt where these overlap."""
    table_blocks = shape.inode_table_blocks
    blocks = [
        *_joined((group.block_bitmap, group.block_bitmap + 1) for group in groups),
        *_joined((group.inode_bitmap, group.inode_bitmap + 1) for group in groups),
        *_joined((group.inode_table, group.inode_table + table_blocks) for group in groups),
        *_joined(shape.fixed(number) for number in range(shape.groups)),
    ]
    blocks.sort()
    needed: dict[int, list[_Blocks]] = defaultdict(list)
    before = 0
    for begin, end in blocks:
        if begin < before:
            raise Doubt(f"block {begin} is of two bitmaps, inode tables or descriptors")
        before = end
        number = max(0, begin - shape.first) // shape.group_blocks
        while shape.group_start(number) < end:
            base = shape.group_start(number)
            inside = max(begin, base), min(end, base + shape.group_blocks)
            clusters = (inside[0] - base) // shape.ratio, -(-(inside[1] - base) // shape.ratio)
            needed[number].append(clusters)
            number += 1
    return needed


def _joined(ranges: Iterable[_Blocks]) -> list[_Blocks]:
    """Without the empty ones; those that touch the one before are one with it."""
    joined: list[_Blocks] = []
    for begin, end in ranges:
        if joined and joined[-1][1] == begin:
            joined[-1] = joined[-1][0], end
        elif begin < end:
            joined.append((begin, end))
    return joined


def _read_bitmaps(
    sb: Superblock,
    shape: Geometry,
    start: int,
    groups: Sequence[Group],
    needed: dict[int, list[_Blocks]],
    some: range,
) -> Steps[bytearray]:
    """The block bitmaps of these groups in one.  Raises Doubt where one's checksum or its number of
    free clusters is wrong, or it has free what the filesystem itself needs."""
    stored = [n for n in some if not (sb.has_gdt_csum and groups[n].flags & tables.BLOCK_UNINIT)]
    runs = _joined((groups[n].block_bitmap, groups[n].block_bitmap + 1) for n in stored)
    size = shape.block_size
    reads = [Read(start + begin * size, (end - begin) * size) for begin, end in runs]
    found = yield from read_whole(reads)
    bitmaps = (data[at : at + size] for data in found for at in range(0, len(data), size))
    width = shape.group_clusters // 8
    checksums = GroupChecksums(sb)
    stored_ones = set(stored)
    joined = bytearray()
    for number in some:
        group = groups[number]
        used = 0
        for begin, end in needed.get(number, ()):
            used |= ((1 << (end - begin)) - 1) << begin
        if number in stored_ones:
            bitmap = next(bitmaps)[:width]
            if sb.has_metadata_csum and group.block_bitmap_csum != checksums.of_bitmap(bitmap):
                raise Doubt(f"the checksum of the block bitmap of group {number} is wrong")
            bits = int.from_bytes(bitmap, "little")
            if bits & used != used:
                raise Doubt(
                    f"the block bitmap of group {number} has free what is of the filesystem"
                )
        else:
            bits, bitmap = used, used.to_bytes(width, "little")
        count = shape.clusters_in(number)
        free = count - (bits & ((1 << count) - 1)).bit_count()
        if free != group.free_clusters:
            raise Doubt(
                f"bg_free_blocks_count of group {number} is {group.free_clusters}, "
                f"but its bitmap has {free} free"
            )
        joined += bitmap
    return joined
