"""What xfs says is free: the btrees by block number of all allocation groups.

Blocks of the free lists (AGFL) are not in them, and stay.  See the XFS Algorithms & Data Structures
manual.
"""

from __future__ import annotations

import uuid
from array import array
from collections.abc import Sequence
from operator import add, itemgetter, lt

from imgfs.guest import xfs_tables as tables
from imgfs.guest.doubt import Doubt, NotShutDown, batches, read_whole
from imgfs.guest.runs import FreeRuns
from imgfs.guest.space import Filesystem
from imgfs.guest.xfs_log import SECTOR, check_unmounted
from imgfs.guest.xfs_tables import Agf, Node, Superblock
from imgfs.steps import Read, Steps, read

KIND = "xfs"
MOST_AGS = 1 << 16
_MOST_LEVELS = 9
_SMALLEST_AG = 64  # blocks
_Place = tuple[int, int]  # number of the allocation group, block in it


def look(start: int, size: int) -> Steps[Filesystem]:
    """The filesystem at byte `start` of file 0, in a partition of `size` bytes."""
    if size < tables.SUPERBLOCK:
        return Filesystem(KIND, size, left_whole=f"{size} bytes have no room for a superblock")
    data = yield from read(start, tables.SUPERBLOCK)
    if len(data) < tables.SUPERBLOCK:
        return Filesystem(KIND, size, left_whole="the superblock is past the end of the disk")
    sb = tables.parse_superblock(data)
    free = FreeRuns()
    why, covers, used, in_use = "", size, None, False
    try:
        _check_features(sb)
        _check_geometry(sb, size)
        covers = sb.dblocks * sb.blocksize
        if sb.fdblocks <= sb.dblocks:
            used = (sb.dblocks - sb.fdblocks) * sb.blocksize
        yield from _check_log(sb, start)
        groups = yield from _read_groups(sb, start)
        yield from _find_free(sb, start, groups, free)
    except Doubt as doubt:
        why, in_use = str(doubt), isinstance(doubt, NotShutDown)
    return Filesystem(
        kind=KIND,
        size=covers,
        label=sb.fname.partition(b"\0")[0].decode("utf-8", "replace"),
        uuid=str(uuid.UUID(bytes=sb.uuid)),
        used=used,
        free=FreeRuns().found if why else free.found,
        left_whole=why,
        not_shut_down=in_use,
    )


def _check_features(sb: Superblock) -> None:
    """Raises Doubt unless all of them are known, and the data is all there is."""
    if sb.magic != tables.MAGIC:
        raise Doubt(f"sb_magicnum is {sb.magic!r}, not {tables.MAGIC!r}")
    if sb.version not in (4, 5):
        raise Doubt(f"sb_versionnum is {sb.versionnum:#x}: neither version 4 nor 5")
    if sb.features_incompat & tables.NEEDSREPAIR:
        raise Doubt("it needs repair (NEEDSREPAIR)")
    for name, value, known in (
        ("versionnum", sb.versionnum & ~0xF, tables.KNOWN_VERSION_BITS),
        ("features2", sb.features2, tables.KNOWN_FEATURES2),
        ("features_ro_compat", sb.features_ro_compat, tables.KNOWN_RO_COMPAT),
        ("features_incompat", sb.features_incompat, tables.KNOWN_INCOMPAT),
        ("features_log_incompat", sb.features_log_incompat, tables.KNOWN_LOG_INCOMPAT),
    ):
        if value & ~known:
            raise Doubt(f"sb_{name} {value:#x} has bits that are not known")
    if sb.inprogress:
        raise Doubt(f"sb_inprogress is {sb.inprogress}: mkfs did not finish")
    if sb.rblocks or sb.rextents:
        raise Doubt("it has a realtime device")
    if not sb.logstart:
        raise Doubt("its log is on another device")


def _check_geometry(sb: Superblock, size: int) -> None:
    def require(name: str, value: int, fits: bool) -> None:
        if not fits:
            raise Doubt(f"sb_{name} is {value}, which cannot be")

    require("blocklog", sb.blocklog, 9 <= sb.blocklog <= 16)
    require("blocksize", sb.blocksize, sb.blocksize == 1 << sb.blocklog)
    require("sectlog", sb.sectlog, 9 <= sb.sectlog <= min(15, sb.blocklog))
    require("sectsize", sb.sectsize, sb.sectsize == 1 << sb.sectlog)
    require("agblocks", sb.agblocks, sb.agblocks >= _SMALLEST_AG)
    require("agblklog", sb.agblklog, sb.agblklog == (sb.agblocks - 1).bit_length())
    require("agcount", sb.agcount, sb.agcount > 0)
    if sb.dblocks * sb.blocksize > size:
        raise Doubt(f"{sb.dblocks} blocks of {sb.blocksize} are more than {size} bytes")
    last = sb.dblocks - (sb.agcount - 1) * sb.agblocks
    require("dblocks", sb.dblocks, _SMALLEST_AG <= last <= sb.agblocks)
    if sb.agcount > MOST_AGS:
        raise Doubt(f"{sb.agcount} allocation groups are more than {MOST_AGS}")
    number, block = sb.logstart >> sb.agblklog, sb.logstart & ((1 << sb.agblklog) - 1)
    inside = number < sb.agcount and block + sb.logblocks <= sb.ag_length(number)
    require("logstart", sb.logstart, inside)
    require("logblocks", sb.logblocks, sb.logblocks * sb.blocksize >= 2 * SECTOR)


def _check_log(sb: Superblock, start: int) -> Steps[None]:
    """And the superblock's checksum.  Raises Doubt unless both are in order."""
    if sb.version == 5:
        (sector,) = yield from read_whole([Read(start, sb.sectsize)])
        if not tables.superblock_checksum_is_right(sector):
            raise Doubt("the superblock's checksum is wrong")
    number, block = sb.logstart >> sb.agblklog, sb.logstart & ((1 << sb.agblklog) - 1)
    at = start + (number * sb.agblocks + block) * sb.blocksize
    yield from check_unmounted(at, sb.logblocks * sb.blocksize, sb.uuid)


def _read_groups(sb: Superblock, start: int) -> Steps[list[Agf]]:
    """The AGF of each.  Raises Doubt where one is not in order."""
    length = sb.agblocks * sb.blocksize
    reads = [Read(start + n * length + sb.sectsize, sb.sectsize) for n in range(sb.agcount)]
    groups: list[Agf] = []
    for batch in batches(reads):
        for sector in (yield from read_whole(batch)):
            groups.append(_check_group(sb, len(groups), sector))
    return groups


def _check_group(sb: Superblock, number: int, sector: bytes) -> Agf:
    agf = tables.parse_agf(sector)
    if agf.magic != tables.AGF_MAGIC or agf.versionnum != 1:
        raise Doubt(f"agf_magicnum of group {number} is {agf.magic!r}, version {agf.versionnum}")
    if sb.version == 5 and not tables.agf_checksum_is_right(sector):
        raise Doubt(f"the checksum of the AGF of group {number} is wrong")
    if sb.version == 5 and agf.uuid != sb.meta_uuid:
        raise Doubt(f"the AGF of group {number} is of another filesystem")
    for name, value, fits in (
        ("seqno", agf.seqno, agf.seqno == number),
        ("length", agf.length, agf.length == sb.ag_length(number)),
        ("level", agf.bno_level, 1 <= agf.bno_level <= _MOST_LEVELS),
        ("freeblks", agf.freeblks, agf.freeblks < agf.length),
    ):
        if not fits:
            raise Doubt(f"agf_{name} of group {number} is {value}, which cannot be")
    return agf


def _find_free(sb: Superblock, start: int, groups: Sequence[Agf], free: FreeRuns) -> Steps[None]:
    """The btrees of all groups, a level of all of them at a time.  Raises Doubt where a block is
    not in order, or what is free is not as much as the AGF has it."""
    found = [0] * sb.agcount
    nodes: list[_Place] = []
    for level in range(max(agf.bno_level for agf in groups) - 1, -1, -1):
        for number, agf in enumerate(groups):
            if agf.bno_level - 1 == level:
                nodes.append((number, agf.bno_root))
        nodes.sort(key=itemgetter(0))
        if len(set(nodes)) != len(nodes):
            raise Doubt("a btree of free space has a block twice")
        below: list[_Place] = []
        reads = [_read_of(sb, start, place) for place in nodes]
        index = 0
        for batch in batches(reads):
            for block in (yield from read_whole(batch)):
                number = nodes[index][0]
                node = _check_node(sb, level, nodes, index, block)
                if level:
                    below += [(number, child) for child in tables.children(block, sb, node)]
                else:
                    runs = _runs(sb, nodes[index], tables.records(block, sb, node))
                    found[number] += sum(runs[1::2]) - sum(runs[::2])
                    covers = sb.dblocks * sb.blocksize
                    free.extend(runs, sb.blocksize, number * sb.agblocks, covers)
                index += 1
        nodes = below
    for number, agf in enumerate(groups):
        if found[number] != agf.freeblks:
            raise Doubt(
                f"agf_freeblks of group {number} is {agf.freeblks}, "
                f"but its btree has {found[number]}"
            )


def _read_of(sb: Superblock, start: int, place: _Place) -> Read:
    number, block = place
    if not 0 < block < sb.ag_length(number):
        raise Doubt(f"block {block} of the btree of group {number} is not in the group")
    return Read(start + (number * sb.agblocks + block) * sb.blocksize, sb.blocksize)


def _check_node(
    sb: Superblock, level: int, nodes: Sequence[_Place], index: int, block: bytes
) -> Node:
    """Raises Doubt unless the block is of that level, and its siblings those beside it."""
    number, at = nodes[index]
    node = tables.parse_node(block)
    named = f"block {at} of the btree of group {number}"
    if node.magic != tables.BNO_MAGICS[sb.version] or node.level != level:
        raise Doubt(f"{named} begins with {node.magic!r} and has level {node.level}, not {level}")
    if sb.version == 5:
        if not tables.node_checksum_is_right(block):
            raise Doubt(f"the checksum of {named} is wrong")
        sector = (number * sb.agblocks + at) * sb.blocksize // SECTOR
        if (node.blkno, node.owner, node.uuid) != (sector, number, sb.meta_uuid):
            raise Doubt(f"{named} says it is sector {node.blkno} of group {node.owner}")
    if node.numrecs > tables.most_records(sb, level):
        raise Doubt(f"{named} has {node.numrecs} records, more than it has room for")
    beside = [
        nodes[other][1]
        if 0 <= other < len(nodes) and nodes[other][0] == number
        else tables.NULL_BLOCK
        for other in (index - 1, index + 1)
    ]
    if [node.leftsib, node.rightsib] != beside:
        raise Doubt(f"{named} has siblings {node.leftsib} and {node.rightsib}, not {beside}")
    return node


def _runs(sb: Superblock, place: _Place, records: Sequence[int]) -> array[int]:
    """Start and end of each, in blocks of the group.  Raises Doubt when they are not in order, or
    not in the group."""
    number, block = place
    starts, lengths = records[::2], records[1::2]
    runs = array("Q", bytes(8 * len(records)))
    runs[::2] = array("Q", starts)
    runs[1::2] = array("Q", map(add, starts, lengths))
    headers = -(-tables.HEADER_SECTORS * sb.sectsize // sb.blocksize)
    if runs and not (
        all(map(lt, runs, runs[1:])) and runs[0] >= headers and runs[-1] <= sb.ag_length(number)
    ):
        raise Doubt(f"records in block {block} of the btree of group {number} are not in order")
    return runs
