"""The structures of a VHD: "Virtual Hard Disk Image Format Specification" 1.0 (2006).

Everything is big-endian; names are the specification's.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

SECTOR = 512

# Hard Disk Footer Format
FOOTER_SIZE = 512
OLD_FOOTER_SIZE = 511  # before Virtual PC 2004
COOKIE = b"conectix"
FEATURES = 2  # a reserved bit, always set
VERSION = 0x00010000
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
EPOCH_S = 946_684_800  # 2000-01-01, in seconds since 1970
NO_OFFSET = 0xFFFFFFFFFFFFFFFF
_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427x")
_FOOTER_CHECKSUM_AT = 64
#: what the footer and its copy cannot have differently
SAME_IN_COPY = (
    "creator_application",
    "data_offset",
    "current_size",
    "cylinders",
    "heads",
    "sectors_per_track",
    "disk_type",
    "unique_id",
)

MOST_SECTORS = 0xFF000000  # 2040 GiB
# CHS Calculation
MOST_CYLINDERS, MOST_HEADS, MOST_SECTORS_PER_TRACK = 65535, 16, 255

# Dynamic Disk Header Format
HEADER_SIZE = 1024
HEADER_COOKIE = b"cxsparse"
_HEADER = struct.Struct(">8sQQIIII16sI4x512s192s256x")
_HEADER_CHECKSUM_AT = 36
LOCATORS = 8
_LOCATOR = struct.Struct(">4sII4xQ")
LOCATORS_AT = 576

# Block Allocation Table
ENTRY_SIZE = 4
NOT_ALLOCATED = 0xFFFFFFFF  # else the sector where the block's bitmap begins


class Footer(NamedTuple):
    cookie: bytes
    features: int
    file_format_version: int
    data_offset: int
    time_stamp: int
    creator_application: bytes
    creator_version: int
    creator_host_os: bytes
    original_size: int
    current_size: int
    cylinders: int
    heads: int
    sectors_per_track: int
    disk_type: int
    checksum: int
    unique_id: bytes
    saved_state: int

    def pack(self) -> bytes:
        """With its checksum."""
        return _with_checksum(_FOOTER.pack(*self), _FOOTER_CHECKSUM_AT)


class Header(NamedTuple):
    """Of dynamic and differencing disks."""

    cookie: bytes
    data_offset: int
    table_offset: int
    header_version: int
    max_table_entries: int
    block_size: int
    checksum: int
    parent_unique_id: bytes
    parent_time_stamp: int
    parent_unicode_name: bytes
    parent_locators: bytes

    def pack(self) -> bytes:
        """With its checksum."""
        return _with_checksum(_HEADER.pack(*self), _HEADER_CHECKSUM_AT)


class Locator(NamedTuple):
    """Parent Locator entry: where in the file a name of the parent is."""

    platform_code: bytes
    platform_data_space: int
    platform_data_length: int
    platform_data_offset: int

    def pack(self) -> bytes:
        return _LOCATOR.pack(*self)


def footer(data: bytes) -> Footer | None:
    """None when that is no footer: its cookie or its checksum is wrong."""
    data = data[:FOOTER_SIZE].ljust(FOOTER_SIZE, b"\0")
    found = Footer(*_FOOTER.unpack(data))
    if found.cookie != COOKIE or found.checksum != _checksum(data, _FOOTER_CHECKSUM_AT):
        return None
    return found


def header(data: bytes) -> tuple[Header, int]:
    """A header of HEADER_SIZE bytes and what its checksum would have to be."""
    return Header(*_HEADER.unpack(data)), _checksum(data, _HEADER_CHECKSUM_AT)


def locators(header: Header) -> list[Locator]:
    return [Locator(*fields) for fields in _LOCATOR.iter_unpack(header.parent_locators)]


def bitmap_size(block_size: int) -> int:
    """Bytes of the sector bitmap in front of each block."""
    return -(-block_size // (SECTOR * 8 * SECTOR)) * SECTOR


def _checksum(data: bytes, at: int) -> int:
    """The ones' complement of the sum of all bytes but the checksum's own."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


def _with_checksum(data: bytes, at: int) -> bytes:
    return data[:at] + struct.pack(">I", _checksum(data, at)) + data[at + 4 :]
