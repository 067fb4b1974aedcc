"""How an ext2, ext3 or ext4 filesystem is divided into groups, and what lies at fixed places."""

from __future__ import annotations

from dataclasses import dataclass

from imgfs.guest import ext_tables as tables
from imgfs.guest.doubt import Doubt
from imgfs.guest.ext_tables import Superblock

MOST_GROUPS = 1 << 19  # 64 TiB in blocks of 4 KiB; more would take long and much memory
_LARGEST_CLUSTER_LOG = 19  # 512 MiB


@dataclass(frozen=True, slots=True)
class Geometry:
    """Counts are of blocks where nothing else is said."""

    block_size: int  #: bytes
    ratio: int  #: blocks of a cluster, the unit of block bitmaps
    first: int  #: the first block of group 0
    blocks: int  #: of the filesystem, with those before `first`
    group_blocks: int
    groups: int
    inode_table_blocks: int  #: of one group
    desc_size: int  #: bytes
    reserved_gdt_blocks: int
    first_meta_bg: int | None  #: None: descriptors are all together
    backups: frozenset[int] | None  #: groups that have a superblock; None: see `sparse`
    sparse: bool

    @property
    def size(self) -> int:
        """Bytes."""
        return self.blocks * self.block_size

    @property
    def group_clusters(self) -> int:
        return self.group_blocks // self.ratio

    @property
    def descs_per_block(self) -> int:
        return self.block_size // self.desc_size

    @property
    def desc_blocks(self) -> int:
        return -(-self.groups // self.descs_per_block)

    def group_start(self, group: int) -> int:
        return self.first + group * self.group_blocks

    def clusters_in(self, group: int) -> int:
        """Of the group; the last may be smaller, and its last cluster may not be whole."""
        blocks = min(self.group_blocks, self.blocks - self.group_start(group))
        return -(-blocks // self.ratio)

    def has_super(self, group: int) -> bool:
        if group == 0:
            return True
        if self.backups is not None:
            return group in self.backups
        if not self.sparse or group == 1:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))

    def descriptor_blocks(self) -> list[tuple[int, int]]:
        """Where descriptors are, in order: first block, how many."""
        together = self.desc_blocks if self.first_meta_bg is None else self.first_meta_bg
        places = [(self._super_block(0) + 1, together)] if together else []
        for number in range(together, self.desc_blocks):
            group = number * self.descs_per_block
            places.append((self._super_block(group) + self.has_super(group), 1))
        return places

    def _super_block(self, group: int) -> int:
        """Where it is, if the group has one.  In blocks of 1 KiB the boot sector has block 0."""
        start = self.group_start(group)
        return 1 if start == 0 and self.block_size == tables.SUPERBLOCK else start

    def fixed(self, group: int) -> tuple[int, int]:
        """The blocks [start, end) that superblock and descriptors have of the group; they may be
        none."""
        begin = self._super_block(group)
        end = begin + self.has_super(group)
        row = group // self.descs_per_block
        if self.first_meta_bg is not None and row >= self.first_meta_bg:
            in_row = group % self.descs_per_block
            end += in_row in (0, 1, self.descs_per_block - 1)
        elif self.has_super(group):
            together = self.desc_blocks if self.first_meta_bg is None else self.first_meta_bg
            end += together + (self.reserved_gdt_blocks if self.first_meta_bg is None else 0)
        return (0 if begin == 1 and self.first == 0 else begin), min(end, self.blocks)


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1


def geometry(sb: Superblock, size: int) -> Geometry:
    """Of a partition of `size` bytes.  Raises Doubt where a field is not what it may be."""

    def require(name: str, value: int, fits: bool) -> None:
        if not fits:
            raise Doubt(f"s_{name} is {value}, which cannot be")

    require("log_block_size", sb.log_block_size, sb.log_block_size <= 6)
    block_size = tables.SUPERBLOCK << sb.log_block_size
    bigalloc = bool(sb.feature_ro_compat & tables.BIGALLOC)
    shift = sb.log_cluster_size - sb.log_block_size
    possible = shift >= 0 and sb.log_cluster_size <= _LARGEST_CLUSTER_LOG
    require("log_cluster_size", sb.log_cluster_size, possible if bigalloc else shift == 0)
    clusters = sb.clusters_per_group
    require("clusters_per_group", clusters, 0 < clusters <= 8 * block_size and clusters % 8 == 0)
    require("blocks_per_group", sb.blocks_per_group, sb.blocks_per_group == clusters << shift)
    first = int(block_size == tables.SUPERBLOCK and not bigalloc)
    require("first_data_block", sb.first_data_block, sb.first_data_block == first)
    require("blocks_count", sb.blocks_count, sb.blocks_count > first + 1)
    if sb.blocks_count * block_size > size:
        raise Doubt(f"{sb.blocks_count} blocks of {block_size} are more than {size} bytes")
    groups = -(-(sb.blocks_count - first) // sb.blocks_per_group)
    if groups > MOST_GROUPS:
        raise Doubt(f"{groups} groups are more than {MOST_GROUPS}")
    inodes, inode_size = sb.inodes_per_group, sb.inode_size
    require("inode_size", inode_size, 128 <= inode_size <= block_size and _is_power(inode_size, 2))
    require("inodes_per_group", inodes, 0 < inodes <= 8 * block_size)
    require("inodes_count", sb.inodes_count, sb.inodes_count == inodes * groups)
    desc_size = sb.desc_size
    smallest = 64 if sb.feature_incompat & tables.HAS_64BIT else 32
    require("desc_size", desc_size, smallest <= desc_size <= 1024 and _is_power(desc_size, 2))
    found = Geometry(
        block_size=block_size,
        ratio=1 << shift,
        first=first,
        blocks=sb.blocks_count,
        group_blocks=sb.blocks_per_group,
        groups=groups,
        inode_table_blocks=-(-inodes * inode_size // block_size),
        desc_size=desc_size,
        reserved_gdt_blocks=sb.reserved_gdt_blocks,
        first_meta_bg=sb.first_meta_bg if sb.feature_incompat & tables.META_BG else None,
        backups=frozenset(sb.backup_bgs) if sb.feature_compat & tables.SPARSE_SUPER2 else None,
        sparse=bool(sb.feature_ro_compat & tables.SPARSE_SUPER),
    )
    if found.first_meta_bg is not None and found.first_meta_bg > found.desc_blocks:
        raise Doubt(f"s_first_meta_bg {sb.first_meta_bg} is past {found.desc_blocks} blocks")
    return found
