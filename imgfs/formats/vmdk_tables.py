"""Structures of VMDK, little-endian; sectors are of 512 bytes.

Hosted sparse extents: VMware, "Virtual Disk Format 5.0" (SparseExtentHeader).  COWD: its "ESX
Server Sparse Extents".  seSparse is not documented by VMware; the names are those of qemu,
block/vmdk.c.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

SECTOR = 512

SPARSE_MAGIC = b"KDMV"
COWD_MAGIC = b"COWD"
SESPARSE_MAGIC = 0xCAFEBABE

FLAG_NEW_LINES = 1 << 0  # singleEndLineChar and its neighbours are valid
FLAG_REDUNDANT = 1 << 1  # rgdOffset is valid
FLAG_ZERO_GRAIN = 1 << 2  # GTE_ZERO is a grain of zeroes
FLAG_COMPRESSED = 1 << 16
FLAG_MARKERS = 1 << 17
KNOWN_FLAGS = FLAG_NEW_LINES | FLAG_REDUNDANT | FLAG_ZERO_GRAIN | FLAG_COMPRESSED | FLAG_MARKERS
NEW_LINES = b"\n \r\n"
COMPRESSION_NONE = 0
COMPRESSION_DEFLATE = 1  # as zlib writes it, RFC 1950
GD_AT_END = 0xFFFFFFFFFFFFFFFF
GTE_ZERO = 1

MARKER_EOS = 0
MARKER_GT = 1
MARKER_GD = 2
MARKER_FOOTER = 3


class SparseExtentHeader(NamedTuple):
    magicNumber: bytes
    version: int
    flags: int
    capacity: int  # sectors
    grainSize: int  # sectors
    descriptorOffset: int  # sectors
    descriptorSize: int  # sectors
    numGTEsPerGT: int
    rgdOffset: int  # sectors
    gdOffset: int  # sectors
    overHead: int  # sectors
    uncleanShutdown: int
    newLines: bytes  # singleEndLineChar, nonEndLineChar, doubleEndLineChar1 and 2
    compressAlgorithm: int


SPARSE_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")  # then zeroes up to a sector
MARKER = struct.Struct("<QII")  # val (sectors), size, type; then zeroes up to a sector
GRAIN_MARKER = struct.Struct("<QI")  # lba, size; then the compressed grain


class CowdHeader(NamedTuple):
    magicNumber: bytes
    version: int
    flags: int
    numSectors: int
    grainSize: int  # sectors
    gdOffset: int  # sectors
    numGDEntries: int
    freeSector: int


COWD_HEADER = struct.Struct("<4s7I")
COWD_GTES_PER_GT = 4096


class SeSparseHeader(NamedTuple):
    magic: int
    version: int
    capacity: int  # sectors, as all that follow
    grain_size: int
    grain_table_size: int
    flags: int
    reserved1: int
    reserved2: int
    reserved3: int
    reserved4: int
    volatile_header_offset: int
    volatile_header_size: int
    journal_header_offset: int
    journal_header_size: int
    journal_offset: int
    journal_size: int
    grain_dir_offset: int
    grain_dir_size: int
    grain_tables_offset: int
    grain_tables_size: int
    free_bitmap_offset: int
    free_bitmap_size: int
    backmap_offset: int
    backmap_size: int
    grains_offset: int
    grains_size: int


SESPARSE_HEADER = struct.Struct("<26Q")
SESPARSE_VERSION = 0x0000000200000001  # 2.1
SESPARSE_GRAIN_SIZE = 8
SESPARSE_GRAIN_TABLE_SIZE = 64
SESPARSE_VOLATILE_HEADER = struct.Struct(
    "<4Q"
)  # magic, free_gt_number, next_txn_seq_number, replay_journal
SESPARSE_VOLATILE_MAGIC = 0xCAFECAFE

# Entries of seSparse: what it is stands in the highest four bits.
SESPARSE_GDE_HIGH = 0x10000000  # the upper half of an allocated grain directory entry
SESPARSE_KIND_SHIFT = 60
SESPARSE_GTE_NONE = 0
SESPARSE_GTE_UNMAPPED = 1
SESPARSE_GTE_ZERO = 2
SESPARSE_GTE_DATA = 3
SESPARSE_LOW_SHIFT = 48  # the grain's number: its low twelve bits are bits 48 to 59,
SESPARSE_LOW_BITS = 12
SESPARSE_HIGH_MASK = (1 << 48) - 1  # the others bits 0 to 47
