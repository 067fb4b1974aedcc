"""The dynamic VDI that would hold a disk: header, map of blocks, blocks in order.

VirtualBox, Storage/VDICore.h; blocks begin at a multiple of 1 MiB, as its VDI_DATA_ALIGN asks.
"""

from __future__ import annotations

from uuid import UUID

from imgfs.errors import UnsupportedFeature
from imgfs.extents import ExtentList
from imgfs.formats import vdi_tables as t
from imgfs.formats.generated import Parts, by_rank, clusters_part, fixed, little_table
from imgfs.formats.layout import About, Clusters, Layout
from imgfs.pieces import PieceList

BLOCK = 1 << 20  # bytes
OFF_BLOCKS = 512
_HEADER_SIZE = t.HEADER.size + t.LCHS_GEOMETRY.size


class VdiLayout(Layout):
    def __init__(self, extents: ExtentList, about: About) -> None:
        """Raises UnsupportedFeature for a disk that is too large."""
        blocks = Clusters(extents, BLOCK)
        off_data = -(-(OFF_BLOCKS + blocks.total * 4) // BLOCK) * BLOCK
        if off_data >= 1 << 32:
            raise UnsupportedFeature(
                f"{about.name}: a vdi holds less than 1 PiB, and the disk has {extents.end} bytes"
            )
        self.size = off_data + blocks.count * BLOCK
        header = t.Header(
            szFileInfo=t.FILE_INFO,
            u32Signature=t.SIGNATURE,
            u32Version=t.VERSION,
            cbHeader=_HEADER_SIZE - t.PREHEADER_SIZE,
            u32Type=t.TYPE_NORMAL,
            fFlags=0,
            szComment=b"",
            offBlocks=OFF_BLOCKS,
            offData=off_data,
            cCylinders=0,  # of no geometry
            cHeads=0,
            cSectors=0,
            cbSector=t.SECTOR,
            u32Dummy=0,
            cbDisk=-(-extents.end // t.SECTOR) * t.SECTOR,
            cbBlock=BLOCK,
            cbBlockExtra=0,
            cBlocks=blocks.total,
            cBlocksAllocated=blocks.count,
            uuidCreate=_uuid(about, "vdi uuidCreate"),
            uuidModify=_uuid(about, "vdi uuidModify"),
            uuidLinkage=bytes(16),
            uuidParentModify=bytes(16),
        )
        head = t.HEADER.pack(*header) + t.LCHS_GEOMETRY.pack(0, 0, 0, t.SECTOR)

        self.own_bytes = len(head) + blocks.total * 4

        def entries(first: int, end: int) -> bytes:
            return by_rank(blocks, first, end, 0, 1, t.BLOCK_FREE)

        self._parts = Parts(
            [
                fixed(0, head),
                little_table(OFF_BLOCKS, blocks.total, entries),
                clusters_part(off_data, blocks, extents.end),
            ]
        )

    def map(self, offset: int, length: int) -> PieceList:
        return self._parts.map(offset, length)


def _uuid(about: About, what: str) -> bytes:
    return UUID(bytes=about.unique(what), version=4).bytes_le


def layout(extents: ExtentList, about: About) -> VdiLayout:
    """`extents` are of the whole disk.  Raises UnsupportedFeature saying why it cannot be."""
    return VdiLayout(extents, about)
