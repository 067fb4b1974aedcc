"""The streamOptimized VMDK that would hold a disk, with stored instead of compressed grains.

VMware, "Virtual Disk Format 5.0", "Stream-Optimized Compressed Sparse Extents".  In order: header,
descriptor, for each grain table that is not empty its grains and itself, the grain directory,
footer, end of stream.  A grain is a zlib stream (RFC 1950) of two stored blocks (RFC 1951), so that
all sizes are known; only its checksum depends on what it holds.
"""

from __future__ import annotations

import struct
from bisect import bisect_right

from imgfs.extents import ExtentList
from imgfs.formats import vmdk_tables as t
from imgfs.formats.generated import Part, Parts, by_rank, fixed, little_table
from imgfs.formats.layout import About, Clusters, Layout
from imgfs.formats.vmdk_layout import (
    DESCRIPTOR_SECTORS,
    GRAIN,
    GRAIN_SECTORS,
    GTES,
    SECTOR,
    SPAN,
    TABLE_SECTORS,
    aligned,
    capacity_of,
    check_reach,
    descriptor,
    header_sector,
)
from imgfs.pieces import Adler32, PieceList, PieceListBuilder

_BLOCK = GRAIN // 2  # a stored block has at most 65535 bytes
_ZLIB_HEADER = b"\x78\x01"
_STORED = struct.Struct("<BHH")  # BFINAL and BTYPE=00, LEN, NLEN
_FIRST = _STORED.pack(0, _BLOCK, _BLOCK ^ 0xFFFF)
_LAST = _STORED.pack(1, _BLOCK, _BLOCK ^ 0xFFFF)
_CODED = len(_ZLIB_HEADER) + 2 * _STORED.size + GRAIN + 4  # bytes
_UNIT = -(-(t.GRAIN_MARKER.size + _CODED) // SECTOR)  # sectors of a grain with its marker
_TABLE = 1 + TABLE_SECTORS  # sectors of a grain table with its marker


def _marker(sectors: int, kind: int) -> bytes:
    return t.MARKER.pack(sectors, 0, kind).ljust(SECTOR, b"\0")


class VmdkStreamLayout(Layout):
    def __init__(self, extents: ExtentList, about: About) -> None:
        """Raises UnsupportedFeature for a disk without a sector, and for one that is too large."""
        capacity = capacity_of(extents, about)
        self._disk_size = extents.end
        self._grains = Clusters(extents, GRAIN)
        self._tables = Clusters(extents, SPAN)
        self._first = aligned(1 + DESCRIPTOR_SECTORS)  # sector of the first grain
        directory = self._first + self._grains.count * _UNIT + self._tables.count * _TABLE
        directory_sectors = -(-self._tables.total * 4 // SECTOR)
        end = directory + 1 + directory_sectors
        self.size = (end + 3) * SECTOR
        check_reach(self.size, self._tables.total, about)

        def header(gd: int) -> bytes:
            return header_sector(
                capacity,
                version=3,
                flags=t.FLAG_NEW_LINES | t.FLAG_COMPRESSED | t.FLAG_MARKERS,
                rgd=0,
                gd=gd,
                over_head=self._first,
                compress=t.COMPRESSION_DEFLATE,
            )

        text = descriptor(about, capacity, "streamOptimized")
        footer = _marker(1, t.MARKER_FOOTER) + header(directory + 1) + _marker(0, t.MARKER_EOS)
        self._parts = Parts(
            [
                fixed(0, header(t.GD_AT_END) + text),
                Part(self._first * SECTOR, directory * SECTOR, self._append_spans),
                fixed(directory * SECTOR, _marker(directory_sectors, t.MARKER_GD)),
                little_table((directory + 1) * SECTOR, self._tables.total, self._directory),
                fixed(end * SECTOR, footer),
            ]
        )

    def map(self, offset: int, length: int) -> PieceList:
        return self._parts.map(offset, length)

    def _span_sector(self, table: int) -> int:
        """Where the grains of a table begin, or would."""
        return (
            self._first
            + self._grains.rank(table * GTES) * _UNIT
            + self._tables.rank(table) * _TABLE
        )

    def _table_sector(self, table: int) -> int:
        """Where the marker of a table that is not empty is."""
        return self._span_sector(table + 1) - _TABLE

    def _directory(self, first: int, end: int) -> bytes:
        entries = [0] * (end - first)
        for a, b, _ in self._tables.runs(first, end):
            for table in range(a, b):
                entries[table - first] = self._table_sector(table) + 1
        return struct.pack(f"<{len(entries)}I", *entries)

    def _append_spans(self, builder: PieceListBuilder, a: int, b: int) -> None:
        # The last table whose grains begin at or before `a`.
        table = bisect_right(range(self._tables.total), a // SECTOR, key=self._span_sector) - 1
        for first, end, _ in self._tables.runs(table, self._tables.total):
            for index in range(first, end):
                if self._span_sector(index) * SECTOR >= b:
                    return
                marker = self._table_sector(index)
                if builder.end < marker * SECTOR:
                    self._append_grains(builder, index, min(b, marker * SECTOR))
                self._append_table(builder, index, marker * SECTOR, b)

    def _append_grains(self, builder: PieceListBuilder, table: int, b: int) -> None:
        """Up to byte `b` of the file, all of this table."""
        start, rank = self._span_sector(table) * SECTOR, self._grains.rank(table * GTES)
        size = _UNIT * SECTOR
        first, end = (builder.end - start) // size, -(-(b - start) // size)
        for low, high, before in self._grains.runs_by_rank(rank + first, rank + end):
            for grain in range(low, high):
                at = start + (before - rank + grain - low) * size
                self._append_grain(builder, grain, at, b)

    def _append_grain(self, builder: PieceListBuilder, grain: int, at: int, b: int) -> None:
        """The part of it, which begins at byte `at` of the file, from the builder's end to `b`."""
        whole = PieceListBuilder(at)
        offset = grain * GRAIN
        whole.literal(t.GRAIN_MARKER.pack(grain * GRAIN_SECTORS, _CODED) + _ZLIB_HEADER + _FIRST)
        self._append_block(whole, offset)
        whole.literal(_LAST)
        self._append_block(whole, offset + _BLOCK)
        stored = min(GRAIN, self._disk_size - offset)
        whole.adler32(offset, Adler32(stored, GRAIN - stored))
        end = at + _UNIT * SECTOR
        if whole.end < end:
            whole.zero(end)
        for piece in whole.finish(end).between(max(at, builder.end), min(b, end)):
            builder.piece(piece)

    def _append_block(self, builder: PieceListBuilder, offset: int) -> None:
        end = builder.end + _BLOCK
        stored = min(_BLOCK, max(0, self._disk_size - offset))
        if stored:
            builder.data(builder.end + stored, offset)
        if stored < _BLOCK:
            builder.zero(end)

    def _append_table(self, builder: PieceListBuilder, table: int, at: int, b: int) -> None:
        """As `_append_grain`, of a table, whose marker is at byte `at` of the file."""
        end = at + _TABLE * SECTOR
        if not builder.end < min(b, end):
            return
        first = table * GTES
        base = self._span_sector(table) - self._grains.rank(first) * _UNIT
        last = min(first + GTES, self._grains.total)
        entries = by_rank(self._grains, first, last, base, _UNIT, 0).ljust(GTES * 4, b"\0")
        content = _marker(TABLE_SECTORS, t.MARKER_GT) + entries
        builder.literal(content[builder.end - at : min(b, end) - at])


def layout(extents: ExtentList, about: About) -> VmdkStreamLayout:
    """`extents` are of the whole disk.  Raises UnsupportedFeature saying why it cannot be."""
    return VmdkStreamLayout(extents, about)
