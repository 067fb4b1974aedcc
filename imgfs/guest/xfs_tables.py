"""The superblock, the AGF and the free-space btree blocks of xfs.

Names are those of the XFS Algorithms & Data Structures manual, without their prefixes `sb_`, `agf_`
and `bb_`.  All numbers are big-endian, but checksums.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import google_crc32c

MAGIC = b"XFSB"
SUPERBLOCK = 512  # read at first; its sector may be larger
AGF_MAGIC = b"XAGF"
BNO_MAGICS = {4: b"ABTB", 5: b"AB3B"}
HEADER_SECTORS = 4  # superblock, AGF, AGI, AGFL
NULL_BLOCK = 0xFFFFFFFF

_SB_CRC = 224
_AGF_CRC = 216
_NODE_CRC = 52

#: attr, nlink, quota, align, dalign, logv2, sector, extflg, dirv2, borg, morebits; without shared
KNOWN_VERSION_BITS = 0xFDF0
#: reserved1, lazysbcount, reserved4, attr2, parent, projid32, crc, ftype
KNOWN_FEATURES2 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x80 | 0x100 | 0x200
#: finobt, rmapbt, reflink, inobtcount
KNOWN_RO_COMPAT = 0xF
NEEDSREPAIR = 0x10
META_UUID = 0x4
#: ftype, spinodes, meta_uuid, bigtime, needsrepair, nrext64, exchrange, parent
KNOWN_INCOMPAT = 0xFF
#: xattrs
KNOWN_LOG_INCOMPAT = 0x1


@dataclass(frozen=True, slots=True)
class Superblock:
    magic: bytes
    blocksize: int  #: bytes
    dblocks: int
    rblocks: int
    rextents: int
    uuid: bytes
    logstart: int
    agblocks: int
    agcount: int
    logblocks: int
    versionnum: int
    sectsize: int  #: bytes
    fname: bytes
    blocklog: int
    sectlog: int
    agblklog: int
    inprogress: int
    fdblocks: int
    features2: int
    features_ro_compat: int
    features_incompat: int
    features_log_incompat: int
    meta_uuid: bytes  #: what metadata bears; that of an older uuid

    @property
    def version(self) -> int:
        return self.versionnum & 0xF

    @property
    def header_size(self) -> int:
        """Of a block of a btree in an allocation group, in bytes."""
        return 56 if self.version == 5 else 16

    def ag_length(self, number: int) -> int:
        """Blocks; the last may have fewer."""
        return min(self.agblocks, self.dblocks - number * self.agblocks)


def parse_superblock(data: bytes) -> Superblock:
    """Of its first 512 bytes, nothing checked."""
    (magic, blocksize, dblocks, rblocks, rextents, uuid, logstart) = struct.unpack_from(
        ">4sI3Q16sQ", data, 0
    )
    (agblocks, agcount, _, logblocks, versionnum, sectsize, _, _, fname) = struct.unpack_from(
        ">4I4H12s", data, 84
    )
    (blocklog, sectlog, _, _, agblklog, _, inprogress) = struct.unpack_from(">7B", data, 120)
    (fdblocks,) = struct.unpack_from(">Q", data, 144)
    (features2,) = struct.unpack_from(">I", data, 200)
    (ro_compat, incompat, log_incompat) = struct.unpack_from(">3I", data, 212)
    v5 = versionnum & 0xF == 5
    other = v5 and incompat & META_UUID
    return Superblock(
        magic=magic,
        blocksize=blocksize,
        dblocks=dblocks,
        rblocks=rblocks,
        rextents=rextents,
        uuid=uuid,
        logstart=logstart,
        agblocks=agblocks,
        agcount=agcount,
        logblocks=logblocks,
        versionnum=versionnum,
        sectsize=sectsize,
        fname=fname,
        blocklog=blocklog,
        sectlog=sectlog,
        agblklog=agblklog,
        inprogress=inprogress,
        fdblocks=fdblocks,
        features2=features2,
        features_ro_compat=ro_compat if v5 else 0,
        features_incompat=incompat if v5 else 0,
        features_log_incompat=log_incompat if v5 else 0,
        meta_uuid=data[248:264] if other else uuid,
    )


@dataclass(frozen=True, slots=True)
class Agf:
    """An allocation group's header of its free space; blocks count from the group's first."""

    magic: bytes
    versionnum: int
    seqno: int
    length: int
    bno_root: int
    bno_level: int
    freeblks: int
    uuid: bytes


def parse_agf(data: bytes) -> Agf:
    (magic, versionnum, seqno, length, root) = struct.unpack_from(">4s4I", data, 0)
    (level,) = struct.unpack_from(">I", data, 28)
    (freeblks,) = struct.unpack_from(">I", data, 52)
    return Agf(magic, versionnum, seqno, length, root, level, freeblks, data[64:80])


@dataclass(frozen=True, slots=True)
class Node:
    """The header of a btree's block.  The last three are of version 5."""

    magic: bytes
    level: int
    numrecs: int
    leftsib: int
    rightsib: int
    blkno: int  #: in units of 512 bytes, from the filesystem's start
    uuid: bytes
    owner: int


def parse_node(data: bytes) -> Node:
    """Of a whole block."""
    (magic, level, numrecs, leftsib, rightsib) = struct.unpack_from(">4sHHII", data, 0)
    (blkno, _, uuid, owner) = struct.unpack_from(">QQ16sI", data, 16)
    return Node(magic, level, numrecs, leftsib, rightsib, blkno, uuid, owner)


def most_records(sb: Superblock, level: int) -> int:
    """Of a block of a free-space btree; those of nodes have a pointer each."""
    return (sb.blocksize - sb.header_size) // (12 if level else 8)


def records(leaf: bytes, sb: Superblock, node: Node) -> tuple[int, ...]:
    """First block, how many, first block, how many and so on."""
    return struct.unpack_from(f">{2 * node.numrecs}I", leaf, sb.header_size)


def children(block: bytes, sb: Superblock, node: Node) -> tuple[int, ...]:
    """Blocks of the group; they come after the room for all keys."""
    at = sb.header_size + 8 * most_records(sb, node.level)
    return struct.unpack_from(f">{node.numrecs}I", block, at)


def _checksum_is_right(data: bytes, at: int) -> bool:
    crc = google_crc32c.extend(google_crc32c.value(data[:at]), bytes(4))
    stored = int.from_bytes(data[at : at + 4], "little")
    return bool(google_crc32c.extend(crc, data[at + 4 :]) == stored)


def superblock_checksum_is_right(sector: bytes) -> bool:
    return _checksum_is_right(sector, _SB_CRC)


def agf_checksum_is_right(sector: bytes) -> bool:
    return _checksum_is_right(sector, _AGF_CRC)


def node_checksum_is_right(block: bytes) -> bool:
    return _checksum_is_right(block, _NODE_CRC)
