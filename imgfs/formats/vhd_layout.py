"""A disk as a dynamic VHD (see `vhd_tables`)."""

from __future__ import annotations

import sys
import uuid
from array import array

from imgfs.errors import UnsupportedFeature
from imgfs.extents import ExtentList
from imgfs.formats import vhd_tables as vt
from imgfs.formats.block_layout import BlockLayout, rounded_up
from imgfs.formats.layout import About, Clusters

BLOCK_SIZE = 2 << 20  # what everybody has
_PAGE = 4096  # so that a block's bytes lie in the file as they lie in pages of the disk
_HEADER_AT = vt.FOOTER_SIZE
_TABLE_AT = _HEADER_AT + vt.HEADER_SIZE


def layout(extents: ExtentList, about: About) -> VhdLayout:
    """Of the disk that has these extents.  Raises UnsupportedFeature above 2040 GiB."""
    if extents.end > vt.MOST_SECTORS * vt.SECTOR:
        raise UnsupportedFeature(
            f"{about.name}: a VHD holds at most 2040 GiB, not the disk's {extents.end} bytes"
        )
    return VhdLayout(extents, about)


class VhdLayout(BlockLayout):
    def __init__(self, extents: ExtentList, about: About) -> None:
        blocks = Clusters(extents, BLOCK_SIZE)
        table_end = _TABLE_AT + rounded_up(blocks.total * vt.ENTRY_SIZE, vt.SECTOR)
        footer = _footer(rounded_up(extents.end, vt.SECTOR), about)
        bitmap = b"\xff" * vt.bitmap_size(BLOCK_SIZE)
        super().__init__(
            extents,
            blocks,
            [(0, footer), (_HEADER_AT, _header(blocks.total))],
            (_TABLE_AT, table_end),
            rounded_up(table_end, _PAGE),
            bitmap.rjust(_PAGE, b"\0"),
            footer,
        )

    def _table(self, start: int, end: int) -> bytes:
        first, last = start // vt.ENTRY_SIZE, -(-end // vt.ENTRY_SIZE)
        table = array("I", [vt.NOT_ALLOCATED]) * (last - first)
        step = self._stride // vt.SECTOR
        bitmap_at = (self._blocks_at + _PAGE) // vt.SECTOR - vt.bitmap_size(BLOCK_SIZE) // vt.SECTOR
        for block, run_end, rank in self._blocks.runs(first, last):
            sector = bitmap_at + rank * step
            sectors = range(sector, sector + (run_end - block) * step, step)
            table[block - first : run_end - first] = array("I", sectors)
        if sys.byteorder == "little":
            table.byteswap()
        skip = start - first * vt.ENTRY_SIZE
        return table.tobytes()[skip : skip + end - start]


def _footer(size: int, about: About) -> bytes:
    """By "win " qemu and others know that the size is the size, whatever the geometry."""
    cylinders, heads, sectors_per_track = _geometry(size // vt.SECTOR)
    return vt.Footer(
        vt.COOKIE,
        vt.FEATURES,
        vt.VERSION,
        _HEADER_AT,
        min(max(0, about.mtime_s - vt.EPOCH_S), 0xFFFFFFFF),
        b"win ",
        0x000A0000,
        b"Wi2k",
        size,
        size,
        cylinders,
        heads,
        sectors_per_track,
        vt.DYNAMIC,
        0,
        uuid.UUID(bytes=about.unique("vhd unique id"), version=4).bytes,
        0,
    ).pack()


def _header(entries: int) -> bytes:
    return vt.Header(
        vt.HEADER_COOKIE,
        vt.NO_OFFSET,
        _TABLE_AT,
        vt.VERSION,
        entries,
        BLOCK_SIZE,
        0,
        bytes(16),
        0,
        b"",
        b"",
    ).pack()


def _geometry(sectors: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors a track, as the specification's CHS Calculation has it; they
    make no more sectors than there are."""
    most = vt.MOST_CYLINDERS * vt.MOST_HEADS
    if sectors >= most * 63:
        cylinders = min(vt.MOST_CYLINDERS, sectors // (vt.MOST_HEADS * vt.MOST_SECTORS_PER_TRACK))
        return cylinders, vt.MOST_HEADS, vt.MOST_SECTORS_PER_TRACK
    tracks = sectors // 17
    heads = max(4, -(-tracks // 1024))
    if heads <= vt.MOST_HEADS and tracks < heads * 1024:
        return tracks // heads, heads, 17
    tracks = sectors // 31
    if tracks < vt.MOST_HEADS * 1024:
        return tracks // vt.MOST_HEADS, vt.MOST_HEADS, 31
    return sectors // 63 // vt.MOST_HEADS, vt.MOST_HEADS, 63
