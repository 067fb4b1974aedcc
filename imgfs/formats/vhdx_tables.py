"""The structures of a VHDX: [MS-VHDX], "Virtual Hard Disk v2 (VHDX) File Format".

Everything is little-endian; names and section numbers are the specification's.
"""

from __future__ import annotations

import struct
import uuid
from typing import NamedTuple

MIB = 1 << 20

# 2.2 Header Section
FILE_SIGNATURE = b"vhdxfile"
HEADER_SECTION = MIB
HEADER_OFFSETS = (64 << 10, 128 << 10)
HEADER_SIZE = 4 << 10
REGION_TABLE_OFFSETS = (192 << 10, 256 << 10)
REGION_TABLE_SIZE = 64 << 10
CHECKSUM_AT = 4  # in all that have one
HEADER_SIGNATURE = b"head"
VERSION = 1
LOG_VERSION = 0
NO_GUID = bytes(16)
_HEADER = struct.Struct("<4sIQ16s16s16sHHIQ")
REGION_SIGNATURE = b"regi"
MOST_ENTRIES = 2047
_TABLE_HEADER = struct.Struct("<4sIII")
_REGION_ENTRY = struct.Struct("<16sQII")
REQUIRED_REGION = 1

# 2.3 Log
LOG_SECTOR = 4 << 10
LOG_SIGNATURE = b"loge"
_LOG_ENTRY = struct.Struct("<4sIIIQII16sQQ")
LOG_ENTRY_HEADER_SIZE = _LOG_ENTRY.size
DATA_DESCRIPTOR, ZERO_DESCRIPTOR, DATA_SECTOR = b"desc", b"zero", b"data"
DESCRIPTOR = struct.Struct("<4s4s8sQQ")  # trailing bytes; leading bytes or zero length
LOG_DATA = struct.Struct("<4sI4084sI")  # sequence high, data, sequence low

# 2.5 Blocks
ENTRY_SIZE = 8
STATE_MASK = 7
OFFSET_MASK = ~(MIB - 1) & 0xFFFFFFFFFFFFFFFF
RESERVED_MASK = (MIB - 1) & ~STATE_MASK
NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, UNMAPPED_095 = 0, 1, 2, 3, 5
FULLY_PRESENT, PARTIALLY_PRESENT = 6, 7
BITMAP_PRESENT = 6
CHUNK_SECTORS = 1 << 23  # what one sector bitmap block is about
BITMAP_BLOCK = MIB

# 2.6 Metadata Region
METADATA_SIGNATURE = b"metadata"
METADATA_TABLE_SIZE = 64 << 10
_METADATA_HEADER = struct.Struct("<8s2xH20x")
_METADATA_ENTRY = struct.Struct("<16sIII4x")
IS_USER, IS_VIRTUAL_DISK, IS_REQUIRED = 1, 2, 4
FILE_PARAMETERS = struct.Struct("<II")
LEAVE_BLOCK_ALLOCATED, HAS_PARENT = 1, 2
LEAST_BLOCK, MOST_BLOCK = MIB, 256 * MIB
MOST_SIZE = 64 << 40
LOCATOR_HEADER = struct.Struct("<16s2xH")
LOCATOR_ENTRY = struct.Struct("<IIHH")


def _guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


BAT_REGION = _guid("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA_REGION = _guid("8b7ca206-4790-4b9a-b8fe-575f050f886e")
FILE_PARAMETERS_ITEM = _guid("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
VIRTUAL_DISK_SIZE_ITEM = _guid("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
PAGE_83_ITEM = _guid("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR_SIZE_ITEM = _guid("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR_SIZE_ITEM = _guid("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR_ITEM = _guid("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
VHDX_LOCATOR = _guid("b04aefb7-d19e-4a81-b789-25b8e9445913")


class Header(NamedTuple):
    signature: bytes
    checksum: int
    sequence_number: int
    file_write_guid: bytes
    data_write_guid: bytes
    log_guid: bytes
    log_version: int
    version: int
    log_length: int
    log_offset: int

    def pack(self) -> bytes:
        """With its checksum, HEADER_SIZE bytes."""
        return with_checksum(_HEADER.pack(*self).ljust(HEADER_SIZE, b"\0"))


class Region(NamedTuple):
    guid: bytes
    file_offset: int
    length: int
    required: int


class LogEntry(NamedTuple):
    signature: bytes
    checksum: int
    entry_length: int
    tail: int
    sequence_number: int
    descriptor_count: int
    reserved: int
    log_guid: bytes
    flushed_file_offset: int
    last_file_offset: int

    def pack(self) -> bytes:
        """Without a checksum, which is that of the whole entry."""
        return _LOG_ENTRY.pack(*self)


class Item(NamedTuple):
    """An entry of the metadata table; the offset is from the region's start."""

    item_id: bytes
    offset: int
    length: int
    flags: int


def crc32c(data: bytes) -> int:
    import google_crc32c

    found: int = google_crc32c.value(data)
    return found


def has_checksum(data: bytes) -> bool:
    """Is it the one in the data, which counts as zeroes there?"""
    (checksum,) = struct.unpack_from("<I", data, CHECKSUM_AT)
    return bool(checksum == crc32c(data[:CHECKSUM_AT] + bytes(4) + data[CHECKSUM_AT + 4 :]))


def with_checksum(data: bytes) -> bytes:
    """The data, where the checksum's bytes must be zero."""
    return data[:CHECKSUM_AT] + struct.pack("<I", crc32c(data)) + data[CHECKSUM_AT + 4 :]


def header(data: bytes) -> Header:
    return Header(*_HEADER.unpack_from(data))


def log_entry(data: bytes) -> LogEntry:
    return LogEntry(*_LOG_ENTRY.unpack_from(data))


def regions(data: bytes) -> list[Region] | None:
    """Of a region table; None when it is none: its signature, checksum or length is wrong."""
    if len(data) < REGION_TABLE_SIZE:
        return None
    signature, _, count, _ = _TABLE_HEADER.unpack_from(data)
    if signature != REGION_SIGNATURE or count > MOST_ENTRIES or not has_checksum(data):
        return None
    entries = data[_TABLE_HEADER.size : _TABLE_HEADER.size + count * _REGION_ENTRY.size]
    return [Region(*fields) for fields in _REGION_ENTRY.iter_unpack(entries)]


def region_table(found: list[Region]) -> bytes:
    head = _TABLE_HEADER.pack(REGION_SIGNATURE, 0, len(found), 0)
    table = head + b"".join(_REGION_ENTRY.pack(*region) for region in found)
    return with_checksum(table.ljust(REGION_TABLE_SIZE, b"\0"))


def items(data: bytes) -> list[Item] | None:
    """Of a metadata table; None when it is none."""
    if len(data) < METADATA_TABLE_SIZE:
        return None
    signature, count = _METADATA_HEADER.unpack_from(data)
    if signature != METADATA_SIGNATURE or count > MOST_ENTRIES:
        return None
    entries = data[_METADATA_HEADER.size : _METADATA_HEADER.size + count * _METADATA_ENTRY.size]
    return [Item(*fields) for fields in _METADATA_ENTRY.iter_unpack(entries)]


def metadata_table(found: list[Item]) -> bytes:
    table = _METADATA_HEADER.pack(METADATA_SIGNATURE, len(found))
    return table + b"".join(_METADATA_ENTRY.pack(*item) for item in found)


def entries(blocks: int, ratio: int, has_parent: bool) -> int:
    """Of a BAT: after every `ratio` payload blocks there is one of a sector bitmap."""
    if has_parent:
        return -(-blocks // ratio) * (ratio + 1)
    return blocks + (blocks - 1) // ratio if blocks else 0
