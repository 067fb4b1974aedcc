"""The monolithicSparse VMDK that would hold a disk.

VMware, "Virtual Disk Format 5.0".  In order: header, descriptor, the redundant grain directory and
its tables, the grain directory and its tables, grains.  All tables are there, as VMware expects.
"""

from __future__ import annotations

from imgfs.errors import UnsupportedFeature
from imgfs.extents import ExtentList
from imgfs.formats import vmdk_tables as t
from imgfs.formats.generated import (
    Parts,
    by_rank,
    clusters_part,
    counted,
    fixed,
    little_table,
    sparse_table,
    sparse_table_bytes,
)
from imgfs.formats.layout import About, Clusters, Layout
from imgfs.pieces import PieceList

SECTOR = t.SECTOR
GRAIN = 64 << 10  # bytes
GRAIN_SECTORS = GRAIN // SECTOR
GTES = 512  # of a grain table
SPAN = GRAIN * GTES  # bytes of the disk that a grain table is for
TABLE_SECTORS = GTES * 4 // SECTOR
DESCRIPTOR_SECTORS = 20
MOST_SECTORS = 1 << 32  # of the file: entries have 32 bits
MOST_TABLES = 32 << 20  # qemu's limit

_HEADS, _SECTORS_PER_TRACK = 255, 63  # of what is not IDE


class VmdkLayout(Layout):
    def __init__(self, extents: ExtentList, about: About) -> None:
        """Raises UnsupportedFeature for a disk without a sector, and for one that is too large."""
        capacity = capacity_of(extents, about)
        grains = Clusters(extents, GRAIN)
        tables = -(-grains.total // GTES)
        directory_sectors = -(-tables * 4 // SECTOR)
        rgd = 1 + DESCRIPTOR_SECTORS
        gd = rgd + directory_sectors + tables * TABLE_SECTORS
        over_head = aligned(gd + directory_sectors + tables * TABLE_SECTORS)
        self.size = over_head * SECTOR + grains.count * GRAIN
        check_reach(self.size, tables, about)
        header = header_sector(
            capacity,
            version=1,
            flags=t.FLAG_NEW_LINES | t.FLAG_REDUNDANT,
            rgd=rgd,
            gd=gd,
            over_head=over_head,
        )

        def entries(first: int, end: int) -> bytes:
            return by_rank(grains, first, end, over_head, GRAIN_SECTORS, 0)

        head = header + descriptor(about, capacity, "monolithicSparse")
        self.own_bytes = len(head) + 2 * (tables * 4 + sparse_table_bytes(extents, GRAIN))
        parts = [fixed(0, head)]
        for start in (rgd, gd):
            first_table = start + directory_sectors

            def directory(first: int, end: int, first_table: int = first_table) -> bytes:
                at = first_table + first * TABLE_SECTORS
                return counted(at, end - first, TABLE_SECTORS)

            parts += [little_table(start * SECTOR, tables, directory)]
            parts += [sparse_table(first_table * SECTOR, grains.total, grains, entries)]
        parts += [clusters_part(over_head * SECTOR, grains, extents.end)]
        self._parts = Parts(parts)

    def map(self, offset: int, length: int) -> PieceList:
        return self._parts.map(offset, length)


def layout(extents: ExtentList, about: About) -> VmdkLayout:
    """`extents` are of the whole disk.  Raises UnsupportedFeature saying why it cannot be."""
    return VmdkLayout(extents, about)


def capacity_of(extents: ExtentList, about: About) -> int:
    """Sectors."""
    if not extents.end:
        raise UnsupportedFeature(f"{about.name}: a vmdk cannot hold a disk of 0 bytes")
    return -(-extents.end // SECTOR)


def check_reach(size: int, tables: int, about: About) -> None:
    """`size` is of the file, in bytes."""
    if size > MOST_SECTORS * SECTOR or tables > MOST_TABLES:
        raise UnsupportedFeature(
            f"{about.name}: a vmdk holds 2 TiB of data and tables at most, and this is {size} bytes"
        )


def aligned(sectors: int) -> int:
    """Up to where a grain may begin."""
    return -(-sectors // GRAIN_SECTORS) * GRAIN_SECTORS


def header_sector(
    capacity: int, *, version: int, flags: int, rgd: int, gd: int, over_head: int, compress: int = 0
) -> bytes:
    """All offsets in sectors."""
    header = t.SparseExtentHeader(
        magicNumber=t.SPARSE_MAGIC,
        version=version,
        flags=flags,
        capacity=capacity,
        grainSize=GRAIN_SECTORS,
        descriptorOffset=1,
        descriptorSize=DESCRIPTOR_SECTORS,
        numGTEsPerGT=GTES,
        rgdOffset=rgd,
        gdOffset=gd,
        overHead=over_head,
        uncleanShutdown=0,
        newLines=t.NEW_LINES,
        compressAlgorithm=compress,
    )
    return t.SPARSE_HEADER.pack(*header).ljust(SECTOR, b"\0")


def descriptor(about: About, capacity: int, create_type: str) -> bytes:
    """The text, without the zeroes that follow it."""
    # The name is for people: the one extent is this file, whatever it is called.
    name = about.name.encode("utf-8", "surrogateescape")
    if b'"' in name or len(name) > 255 or any(byte < 0x20 for byte in name):
        name = b"disk.vmdk"
    # The highest two values say that there is no parent, and that longContentID counts.
    content_id = min(int.from_bytes(about.unique("vmdk cid", 4), "big"), 0xFFFFFFFD)
    cylinders = max(1, capacity // (_HEADS * _SECTORS_PER_TRACK))
    return b"\n".join(
        [
            b"# Disk DescriptorFile",
            b"version=1",
            b'encoding="UTF-8"',
            b"CID=%08x" % content_id,
            b"parentCID=ffffffff",
            b'createType="%s"' % create_type.encode(),
            b"",
            b"# Extent description",
            b'RW %d SPARSE "%s"' % (capacity, name),
            b"",
            b"# The Disk Data Base",
            b"#DDB",
            b"",
            b'ddb.adapterType = "lsilogic"',
            b'ddb.geometry.cylinders = "%d"' % cylinders,
            b'ddb.geometry.heads = "%d"' % _HEADS,
            b'ddb.geometry.sectors = "%d"' % _SECTORS_PER_TRACK,
            b'ddb.longContentID = "%s"'
            % (about.unique("vmdk cid", 16)[4:] + content_id.to_bytes(4, "big")).hex().encode(),
            b'ddb.toolsVersion = "2147483647"',
            b'ddb.virtualHWVersion = "4"',
            b"",
        ]
    )
