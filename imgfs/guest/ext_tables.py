"""The superblock and the group descriptors of ext2, ext3 and ext4.

Names are those of the kernel's Documentation/filesystems/ext4 without their prefixes `s_` and
`bg_`.  All numbers are little-endian.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass

import google_crc32c

SUPERBLOCK = 1024  # where it is, and its size
MAGIC = 0xEF53
CLEAN = 1  # the state's only bit when nothing is wrong

HAS_JOURNAL = 0x4
SPARSE_SUPER2 = 0x200

RECOVER = 0x4
JOURNAL_DEV = 0x8
META_BG = 0x10
HAS_64BIT = 0x80
MMP = 0x100
CSUM_SEED = 0x2000
#: filetype, recover, journal_dev, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed,
#: largedir, inline_data, encrypt, casefold
KNOWN_INCOMPAT = 0x2 | 0x4 | 0x8 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x3E000

SPARSE_SUPER = 0x1
GDT_CSUM = 0x10
BIGALLOC = 0x200
METADATA_CSUM = 0x400
ORPHAN_PRESENT = 0x10000
#: sparse_super, large_file, btree_dir, huge_file, gdt_csum, dir_nlink, extra_isize, quota,
#: bigalloc, metadata_csum, read-only, project, shared_blocks, verity, orphan_present
KNOWN_RO_COMPAT = 0x77F | 0x1000 | 0x2000 | 0x4000 | 0x8000 | 0x10000

EXT2_INCOMPAT = 0x2 | META_BG
EXT3_INCOMPAT = 0x2 | META_BG | RECOVER
EXT3_RO_COMPAT = 0x7

BLOCK_UNINIT = 2  # flag of a group whose bitmap was never written

MMP_MAGIC = 0x004D4D50
MMP_CLEAN = 0xFF4D4D50
_CRC32C = 1  # the only checksum_type


@dataclass(frozen=True, slots=True)
class Superblock:
    inodes_count: int
    blocks_count: int
    free_blocks_count: int
    first_data_block: int
    log_block_size: int
    log_cluster_size: int
    blocks_per_group: int
    clusters_per_group: int
    inodes_per_group: int
    magic: int
    state: int
    rev_level: int
    inode_size: int
    feature_compat: int
    feature_incompat: int
    feature_ro_compat: int
    uuid: bytes
    volume_name: bytes
    reserved_gdt_blocks: int
    journal_inum: int
    journal_dev: int
    last_orphan: int
    desc_size: int
    first_meta_bg: int
    mmp_block: int
    checksum_type: int
    backup_bgs: tuple[int, int]
    checksum_seed: int

    @property
    def kind(self) -> str:
        """As blkid tells them apart."""
        if self.feature_incompat & JOURNAL_DEV:
            return "jbd"
        if self.feature_ro_compat & ~EXT3_RO_COMPAT:
            return "ext4"
        if self.feature_compat & HAS_JOURNAL:
            return "ext4" if self.feature_incompat & ~EXT3_INCOMPAT else "ext3"
        return "ext4" if self.feature_incompat & ~EXT2_INCOMPAT else "ext2"

    @property
    def has_metadata_csum(self) -> bool:
        return bool(self.feature_ro_compat & METADATA_CSUM)

    @property
    def has_gdt_csum(self) -> bool:
        """Either kind of checksum: only then does BLOCK_UNINIT mean anything."""
        return bool(self.feature_ro_compat & (METADATA_CSUM | GDT_CSUM))

    @property
    def seed(self) -> int:
        """What checksums of metadata begin with."""
        if self.feature_incompat & CSUM_SEED:
            return self.checksum_seed
        return crc32c(0xFFFFFFFF, self.uuid)


def parse_superblock(data: bytes) -> Superblock:
    """Its 1024 bytes, nothing checked."""
    (inodes, blocks, _, free, _, first, log_block, log_cluster) = struct.unpack_from("<8I", data, 0)
    (blocks_pg, clusters_pg, inodes_pg) = struct.unpack_from("<3I", data, 0x20)
    (magic, state) = struct.unpack_from("<2H", data, 0x38)
    (rev_level,) = struct.unpack_from("<I", data, 0x4C)
    (inode_size,) = struct.unpack_from("<H", data, 0x58)
    (compat, incompat, ro_compat, uuid, name) = struct.unpack_from("<3I16s16s", data, 0x5C)
    (reserved_gdt,) = struct.unpack_from("<H", data, 0xCE)
    (journal_inum, journal_dev, last_orphan) = struct.unpack_from("<3I", data, 0xE0)
    (desc_size, _, first_meta_bg) = struct.unpack_from("<HII", data, 0xFE)
    (blocks_hi, _, free_hi) = struct.unpack_from("<3I", data, 0x150)
    (mmp_block,) = struct.unpack_from("<Q", data, 0x168)
    (backup_0, backup_1) = struct.unpack_from("<2I", data, 0x24C)
    (seed,) = struct.unpack_from("<I", data, 0x270)
    wide = incompat & HAS_64BIT
    return Superblock(
        inodes_count=inodes,
        blocks_count=blocks | (blocks_hi << 32 if wide else 0),
        free_blocks_count=free | (free_hi << 32 if wide else 0),
        first_data_block=first,
        log_block_size=log_block,
        log_cluster_size=log_cluster,
        blocks_per_group=blocks_pg,
        clusters_per_group=clusters_pg,
        inodes_per_group=inodes_pg,
        magic=magic,
        state=state,
        rev_level=rev_level,
        inode_size=inode_size if rev_level else 128,
        feature_compat=compat,
        feature_incompat=incompat,
        feature_ro_compat=ro_compat,
        uuid=uuid,
        volume_name=name,
        reserved_gdt_blocks=reserved_gdt,
        journal_inum=journal_inum,
        journal_dev=journal_dev,
        last_orphan=last_orphan,
        desc_size=desc_size if wide else 32,
        first_meta_bg=first_meta_bg,
        mmp_block=mmp_block,
        checksum_type=data[0x175],
        backup_bgs=(backup_0, backup_1),
        checksum_seed=seed,
    )


def crc32c(seed: int, data: bytes) -> int:
    """As the kernel computes it: neither begun nor ended with a complement."""
    ended: int = google_crc32c.extend(seed ^ 0xFFFFFFFF, data)
    return ended ^ 0xFFFFFFFF


def _crc16_table() -> array[int]:
    table = array("H")
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ 0xA001 if value & 1 else value >> 1
        table.append(value)
    return table


_CRC16 = _crc16_table()


def crc16(crc: int, data: bytes) -> int:
    """Polynomial 0x8005, the lowest bit first."""
    for byte in data:
        crc = crc >> 8 ^ _CRC16[(crc ^ byte) & 0xFF]
    return crc


def superblock_checksum_is_right(data: bytes) -> bool:
    (stored,) = struct.unpack_from("<I", data, 0x3FC)
    return data[0x175] == _CRC32C and stored == crc32c(0xFFFFFFFF, data[:0x3FC])


@dataclass(frozen=True, slots=True)
class Group:
    """A group's descriptor; places are block numbers."""

    block_bitmap: int
    inode_bitmap: int
    inode_table: int
    free_clusters: int
    flags: int
    block_bitmap_csum: int
    checksum: int


_LOW = struct.Struct("<3IHHHHIHHHH")
_HIGH = struct.Struct("<3IHHHHIHH")


def parse_group(data: bytes) -> Group:
    """Of a whole descriptor, of 32 bytes or of 64 and more."""
    (blocks, inodes, table, free, _, _, flags, _, csum, _, _, checksum) = _LOW.unpack_from(data)
    if len(data) >= 64:
        (blocks_hi, inodes_hi, table_hi, free_hi, _, _, _, _, csum_hi, _) = _HIGH.unpack_from(
            data, 32
        )
        blocks |= blocks_hi << 32
        inodes |= inodes_hi << 32
        table |= table_hi << 32
        free |= free_hi << 16
        csum |= csum_hi << 16
    return Group(blocks, inodes, table, free, flags, csum, checksum)


class GroupChecksums:
    """What group descriptors and bitmaps should have as checksums."""

    def __init__(self, sb: Superblock) -> None:
        self._crc32c = sb.has_metadata_csum
        self._seed = sb.seed if self._crc32c else crc16(0xFFFF, sb.uuid)
        self._wide = sb.desc_size >= 64

    def of_group(self, number: int, descriptor: bytes) -> int:
        counted = struct.pack("<I", number)
        if self._crc32c:
            whole = counted + descriptor[:0x1E] + b"\0\0" + descriptor[0x20:]
            return crc32c(self._seed, whole) & 0xFFFF
        return crc16(self._seed, counted + descriptor[:0x1E] + descriptor[0x20:])

    def of_bitmap(self, bitmap: bytes) -> int:
        """Of crc32c only; as wide as the descriptor keeps it."""
        crc = crc32c(self._seed, bitmap)
        return crc if self._wide else crc & 0xFFFF
