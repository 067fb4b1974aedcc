"""The superblock, the blocks of trees and the items of btrfs that say what is in use.

Names are those of the kernel's include/uapi/linux/btrfs_tree.h; see also the On-disk Format page of
btrfs' documentation.  All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import google_crc32c
import xxhash

from imgfs.guest.doubt import Doubt

MAGIC = b"_BHRfS_M"
SUPERBLOCK = 4096
MIRRORS = (64 << 10, 64 << 20, 256 << 30)
STRIPE = 64 << 10  # at each mirror, as much is never given to a file
RESERVED = 1 << 20  # at the start of the device

ROOT_TREE, EXTENT_TREE, CHUNK_TREE, DEV_TREE = 1, 2, 3, 4
FREE_SPACE_TREE, BLOCK_GROUP_TREE = 10, 11
TREE_NAMES = {
    ROOT_TREE: "root tree",
    EXTENT_TREE: "extent tree",
    CHUNK_TREE: "chunk tree",
    DEV_TREE: "device tree",
    FREE_SPACE_TREE: "free space tree",
    BLOCK_GROUP_TREE: "block group tree",
}
BALANCE = (1 << 64) - 4
TREE_RELOC = (1 << 64) - 8
FIRST_CHUNK_TREE = 256
DEV_ITEMS = 1

ROOT_ITEM = 132
EXTENT_ITEM, METADATA_ITEM = 168, 169
BLOCK_GROUP_ITEM = 192
FREE_SPACE_INFO, FREE_SPACE_EXTENT, FREE_SPACE_BITMAP = 198, 199, 200
DEV_EXTENT, DEV_ITEM, CHUNK_ITEM = 204, 216, 228
TEMPORARY_ITEM, DEV_REPLACE = 248, 250

#: mixed_backref, default_subvol, compress_lzo, compress_zstd, big_metadata, extended_iref,
#: skinny_metadata, no_holes, metadata_uuid
KNOWN_INCOMPAT = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x200 | 0x400
MIXED_BACKREF = 0x1
METADATA_UUID = 0x400
REFUSED_INCOMPAT = {
    0x4: "data and metadata in the same block groups (mixed)",
    0x80: "RAID 5 or 6",
    0x800: "RAID 1 with more than two copies",
    0x1000: "zones",
    0x2000: "extent tree v2",
    0x4000: "a RAID stripe tree",
    0x10000: "simple quotas",
}
FREE_SPACE_TREE_FLAG = 0x1
FREE_SPACE_TREE_VALID = 0x2
BLOCK_GROUP_TREE_FLAG = 0x8
#: free_space_tree, free_space_tree_valid, verity, block_group_tree
KNOWN_COMPAT_RO = 0xF

WRITTEN = 0x1
REFUSED_FLAGS = {
    1 << 2: "it had errors",
    1 << 32: "it is a seed",
    1 << 33: "it is a dump of metadata",
    1 << 34: "it is a dump of metadata",
    1 << 35: "its uuid is being changed",
    1 << 36: "its uuid is being changed",
    1 << 38: "it is being converted",
}

#: DATA, SYSTEM, METADATA; with what else a block group may be here
KINDS = (0x1, 0x2, 0x4)
SYSTEM = 0x2
DUP = 0x20

_SYS_CHUNK_ARRAY = 811
_SYS_CHUNKS = 2048
KEY = struct.Struct("<QBQ")
_CHUNK = struct.Struct("<QQQQIIIHH")
_STRIPE = struct.Struct("<QQ16s")
_HEADER = struct.Struct("<32s16sQQ16sQQIB")
HEADER = _HEADER.size
ITEM = struct.Struct("<QBQII")
POINTER = struct.Struct("<QBQQQ")
_DEV_ITEM = struct.Struct("<QQQIIIQQQIBB16s16s")
DEV_EXTENT_ITEM = struct.Struct("<QQQQ16s")
BLOCK_GROUP = struct.Struct("<QQQ")
SPACE_INFO = struct.Struct("<II")
_ROOT = struct.Struct("<QQQ")
_ROOT_GENERATION = 160  # after the inode
_ROOT_REFS = 216
_ROOT_LEVEL = 238
_REPLACE_STATE_AT = 32
_REPLACE_AT_REST = (0, 2, 3)  # never started, finished, canceled

Key: TypeAlias = tuple[int, int, int]  # objectid, type, offset
Item: TypeAlias = tuple[int, int, int, int, int]  # its key, where its data is, and how long

CHECKSUMS: dict[int, Callable[[bytes], bytes]] = {
    0: lambda data: struct.pack("<I", google_crc32c.value(data)),
    1: lambda data: struct.pack("<Q", xxhash.xxh64_intdigest(data)),
    2: lambda data: hashlib.sha256(data).digest(),
    3: lambda data: hashlib.blake2b(data, digest_size=32).digest(),
}


def checksum_is_right(csum_type: int, block: bytes) -> bool:
    """Of a superblock, or of a block of a tree."""
    found = CHECKSUMS[csum_type](block[32:])
    return block[: len(found)] == found


@dataclass(frozen=True, slots=True)
class Device:
    devid: int
    total_bytes: int
    bytes_used: int  #: by chunks
    uuid: bytes
    fsid: bytes


def parse_device(data: bytes) -> Device:
    if len(data) != _DEV_ITEM.size:
        raise Doubt(f"a device's item has {len(data)} bytes")
    devid, total, used, *_, uuid, fsid = _DEV_ITEM.unpack(data)
    return Device(devid, total, used, uuid, fsid)


@dataclass(frozen=True, slots=True)
class Superblock:
    fsid: bytes
    bytenr: int
    flags: int
    magic: bytes
    generation: int
    root: int
    chunk_root: int
    log_root: int
    bytes_used: int
    num_devices: int
    sectorsize: int
    nodesize: int
    chunk_root_generation: int
    compat_ro_flags: int
    incompat_flags: int
    csum_type: int
    root_level: int
    chunk_root_level: int
    device: Device
    label: bytes
    metadata_uuid: bytes  #: what blocks of trees bear
    sys_chunks: bytes


def parse_superblock(data: bytes) -> Superblock:
    """Of its 4096 bytes, nothing checked but the length of its chunks."""
    fsid, bytenr, flags, magic, generation, root, chunk_root, log_root = struct.unpack_from(
        "<16sQQ8sQQQQ", data, 32
    )
    (bytes_used,) = struct.unpack_from("<Q", data, 120)
    num_devices, sectorsize, nodesize, _, _, array_size, chunk_generation = struct.unpack_from(
        "<QIIIIIQ", data, 136
    )
    compat_ro, incompat, csum_type, root_level, chunk_level = struct.unpack_from(
        "<QQHBB", data, 180
    )
    if array_size > _SYS_CHUNKS:
        raise Doubt(f"sys_chunk_array_size is {array_size}, more than {_SYS_CHUNKS}")
    return Superblock(
        fsid=fsid,
        bytenr=bytenr,
        flags=flags,
        magic=magic,
        generation=generation,
        root=root,
        chunk_root=chunk_root,
        log_root=log_root,
        bytes_used=bytes_used,
        num_devices=num_devices,
        sectorsize=sectorsize,
        nodesize=nodesize,
        chunk_root_generation=chunk_generation,
        compat_ro_flags=compat_ro,
        incompat_flags=incompat,
        csum_type=csum_type,
        root_level=root_level,
        chunk_root_level=chunk_level,
        device=parse_device(data[201 : 201 + _DEV_ITEM.size]),
        label=data[299:555].partition(b"\0")[0],
        metadata_uuid=data[571:587] if incompat & METADATA_UUID else fsid,
        sys_chunks=data[_SYS_CHUNK_ARRAY : _SYS_CHUNK_ARRAY + array_size],
    )


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of the filesystem's own addresses, and where on the device it is: once or twice."""

    logical: int
    length: int
    type: int
    stripes: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.logical + self.length


def parse_chunk(key: Key, data: bytes, sb: Superblock) -> Chunk:
    """Raises Doubt unless it is one whole stripe on the superblock's device, or two of the same."""
    objectid, kind, logical = key
    if (objectid, kind) != (FIRST_CHUNK_TREE, CHUNK_ITEM) or len(data) < _CHUNK.size:
        raise Doubt(f"key {key} with {len(data)} bytes is not that of a chunk")
    length, _, _, type_, _, _, _, count, _ = _CHUNK.unpack_from(data)
    if type_ & ~DUP not in KINDS:
        raise Doubt(f"the chunk at {logical} has type {type_:#x}: neither single nor DUP")
    if count != (2 if type_ & DUP else 1) or len(data) != _CHUNK.size + count * _STRIPE.size:
        raise Doubt(f"the chunk at {logical} of type {type_:#x} has {count} stripes")
    device = sb.device
    if not length or (logical | length) % sb.sectorsize or (logical + length) >> 64:
        raise Doubt(f"the chunk at {logical} has {length} bytes, which cannot be")
    stripes = []
    for devid, offset, uuid in _STRIPE.iter_unpack(data[_CHUNK.size :]):
        if (devid, uuid) != (device.devid, device.uuid):
            raise Doubt(f"the chunk at {logical} is on device {devid}, not {device.devid}")
        if offset % sb.sectorsize or offset + length > device.total_bytes:
            raise Doubt(f"the chunk at {logical} is at byte {offset}, which cannot be")
        stripes.append(offset)
    return Chunk(logical, length, type_, tuple(stripes))


def parse_sys_chunks(sb: Superblock) -> list[Chunk]:
    """Those that hold the chunk tree."""
    found, at = [], 0
    while at < len(sb.sys_chunks):
        head = sb.sys_chunks[at : at + KEY.size + _CHUNK.size]
        if len(head) < KEY.size + _CHUNK.size:
            raise Doubt(f"sys_chunk_array ends in a chunk at {at}")
        count = _CHUNK.unpack_from(head, KEY.size)[7]
        end = at + len(head) + count * _STRIPE.size
        found.append(parse_chunk(KEY.unpack_from(head), sb.sys_chunks[at + KEY.size : end], sb))
        at = end
    return found


@dataclass(frozen=True, slots=True)
class Root:
    """Where a tree begins."""

    owner: int
    bytenr: int
    level: int
    generation: int


def parse_root(owner: int, data: bytes) -> Root:
    """Of a root item; older ones are shorter than today's.  Raises Doubt for one that is gone."""
    if len(data) <= _ROOT_LEVEL:
        raise Doubt(f"the item of the {TREE_NAMES[owner]}'s root has {len(data)} bytes")
    generation, _, bytenr = _ROOT.unpack_from(data, _ROOT_GENERATION)
    (refs,) = struct.unpack_from("<I", data, _ROOT_REFS)
    if not refs:
        raise Doubt(f"the {TREE_NAMES[owner]} has no references")
    return Root(owner, bytenr, data[_ROOT_LEVEL], generation)


def is_replacing(data: bytes) -> bool:
    """Of a device's replace item."""
    return int.from_bytes(data[_REPLACE_STATE_AT:][:8], "little") not in _REPLACE_AT_REST


class Header(NamedTuple):
    """What begins each block of a tree."""

    csum: bytes
    fsid: bytes
    bytenr: int
    flags: int
    chunk_tree_uuid: bytes
    generation: int
    owner: int
    nritems: int
    level: int


def parse_header(block: bytes) -> Header:
    return Header(*_HEADER.unpack_from(block))


def items(block: bytes, nritems: int) -> list[Item]:
    """Of a leaf, in order.  Raises Doubt where they are not, or their data does not fill the end of
    the block, one before the other."""
    if HEADER + nritems * ITEM.size > len(block):
        raise Doubt(f"{nritems} items are more than {len(block)} bytes have room for")
    found: list[Item] = list(ITEM.iter_unpack(block[HEADER : HEADER + nritems * ITEM.size]))
    end = len(block) - HEADER
    last: tuple[int, ...] = (-1,)
    for item in found:
        if item <= last or item[3] + item[4] != end:
            raise Doubt(f"items at {item[:3]} are not in order")
        end, last = item[3], item
    if end < nritems * ITEM.size:
        raise Doubt("its items and their data overlap")
    return found


def data_of(block: bytes, item: Item) -> bytes:
    return block[HEADER + item[3] : HEADER + item[3] + item[4]]


def pointers(block: bytes, nritems: int) -> Sequence[tuple[int, int, int, int, int]]:
    """Of a node: the first key below, the block, and its generation."""
    if not nritems or HEADER + nritems * POINTER.size > len(block):
        raise Doubt(f"{nritems} pointers cannot be in a node of {len(block)} bytes")
    return list(POINTER.iter_unpack(block[HEADER : HEADER + nritems * POINTER.size]))
