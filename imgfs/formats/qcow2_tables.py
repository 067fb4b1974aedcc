"""qcow2's structures, with the names of its specification: qemu's docs/interop/qcow2.rst.

All numbers are big-endian.  What the specification leaves open is limited as qemu does
(block/qcow2.h), so that what is refused here could not be opened there.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

MAGIC = 0x514649FB  # "QFI\xfb"

MIN_CLUSTER_BITS = 9
MIN_CLUSTER_BITS_EXTENDED = 14
MAX_CLUSTER_BITS = 21
MAX_REFCOUNT_ORDER = 6
MAX_REFCOUNT_TABLE = 8 << 20  # bytes
MAX_L1_TABLE = 32 << 20  # bytes
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_EXTRA_DATA = 1024
MAX_BACKING_NAME = 1023
MAX_BACKING_FORMAT = 15
MAX_HOST_OFFSET = (1 << 56) - 1

# Header.  Version 2 ends at 72; what follows is there from version 3 on.
HEADER_V2 = struct.Struct(">IIQIIQIIQQIIQ")
HEADER_V3 = struct.Struct(">QQQII")
HEADER_V2_LENGTH = 72
HEADER_V3_LENGTH = 104
REFCOUNT_ORDER_V2 = 4


class HeaderV2(NamedTuple):
    magic: int
    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int


class HeaderV3(NamedTuple):
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = REFCOUNT_ORDER_V2
    header_length: int = HEADER_V2_LENGTH


#: where the fields are that messages name
FIELD_OFFSETS = {
    "magic": 0,
    "version": 4,
    "backing_file_offset": 8,
    "backing_file_size": 16,
    "cluster_bits": 20,
    "size": 24,
    "crypt_method": 32,
    "l1_size": 36,
    "l1_table_offset": 40,
    "refcount_table_offset": 48,
    "refcount_table_clusters": 56,
    "nb_snapshots": 60,
    "snapshots_offset": 64,
    "incompatible_features": 72,
    "refcount_order": 96,
    "header_length": 100,
    "compression_type": 104,
}

CRYPT_METHODS = {1: "AES", 2: "LUKS"}


class Incompatible(enum.IntFlag):
    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


INCOMPATIBLE_KNOWN = 0b11111
COMPATIBLE_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_RAW_DATA_FILE = 1 << 1

COMPRESSION_DEFLATE = 0
COMPRESSION_ZSTD = 1

# Header extensions
EXTENSION = struct.Struct(">II")  # type, length of what follows, which is padded to 8
EXTENSION_END = 0
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_FEATURE_NAMES = 0x6803F857
EXTENSION_DATA_FILE = 0x44415441
EXTENSION_BITMAPS = 0x23852875
BITMAPS = struct.Struct(">I4xQQ")  # number, directory's size and offset
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY = 64 << 20  # bytes
FEATURE_NAME = struct.Struct(">BB46s")  # type (0: incompatible), bit, name
FEATURE_INCOMPATIBLE = 0

# Table entries.  The same bits are the offset in L1 and in standard L2 entries.
ENTRY = struct.Struct(">Q")
ENTRY_OFFSET = 0x00FF_FFFF_FFFF_FE00
ENTRY_COPIED = 1 << 63  # the refcount is exactly one
ENTRY_COMPRESSED = 1 << 62
ENTRY_ZERO = 1 << 0
COMPRESSED_SECTOR = 512
SUBCLUSTERS = 32
SUBCLUSTERS_ALL = (1 << SUBCLUSTERS) - 1

# Snapshot table
SNAPSHOT = struct.Struct(">QIHHIIQII")


class SnapshotEntry(NamedTuple):
    l1_table_offset: int
    l1_size: int
    id_str_size: int
    name_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    extra_data_size: int


SNAPSHOT_DISK_SIZE_AT = 8  # in the extra data
