"""The streamOptimized VMDK that would hold a disk, with stored instead of compressed grains.

VMware, "Virtual Disk Format 5.0", "Stream-Optimized Compressed Sparse Extents".  In order: header,
descriptor, for each grain table that is not empty its grains and itself, the grain directory,
footer, end of stream.  A grain is a zlib stream (RFC 1950) of two stored blocks (RFC 1951), so that
all sizes are known; its checksum depends on what it holds, so that it is a piece that is derived.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass

from isal.isal_zlib import adler32

from imgfs.extents import ExtentList
from imgfs.formats import vmdk_tables as t
from imgfs.formats.generated import Part, Parts, by_rank, fixed, little_table
from imgfs.formats.layout import About, Clusters, Layout
from imgfs.formats.vmdk_layout import (
    DESCRIPTOR_SECTORS,
    GRAIN,
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
from imgfs.pieces import Derived, PieceList, PieceListBuilder

_UNIT_HEAD = t.GRAIN_MARKER.size + 7  # bytes of marker, zlib header and block header
_BLOCK = GRAIN // 2  # a stored block has at most 65535 bytes
_ZLIB_HEADER = b"\x78\x01"
_STORED = struct.Struct("<BHH")  # BFINAL and BTYPE=00, LEN, NLEN
_FIRST = _STORED.pack(0, _BLOCK, _BLOCK ^ 0xFFFF)
_LAST = _STORED.pack(1, _BLOCK, _BLOCK ^ 0xFFFF)
_CODED = len(_ZLIB_HEADER) + 2 * _STORED.size + GRAIN + 4  # bytes
_CHECKSUM = t.GRAIN_MARKER.size + _CODED - 4  # where it is in a unit
_UNIT = -(-(t.GRAIN_MARKER.size + _CODED) // SECTOR)  # sectors of a grain with its marker
_PADDING = bytes(_UNIT * SECTOR - t.GRAIN_MARKER.size - _CODED)
_TABLE = 1 + TABLE_SECTORS  # sectors of a grain table with its marker


def _marker(sectors: int, kind: int) -> bytes:
    return t.MARKER.pack(sectors, 0, kind).ljust(SECTOR, b"\0")


@dataclass(frozen=True, slots=True)
class StoredGrains(Derived):
    """Units of grains that follow each other on the disk, as far as it goes.

    A unit is marker, zlib header, two stored blocks, checksum, and zeroes up to a sector.
    """

    offset: int  #: of the first grain on the disk, in bytes
    disk_size: int  #: bytes

    def needs(self, start: int, end: int) -> tuple[int, int]:
        first, low = divmod(start, _UNIT * SECTOR)
        last, high = divmod(end, _UNIT * SECTOR)
        in_first = high if last == first else _UNIT * SECTOR
        if low < _CHECKSUM + 4 and in_first > _CHECKSUM:
            low = 0
        a, b = first * GRAIN + _stored_before(low), last * GRAIN + _stored_before(high)
        return min(self.offset + a, self.disk_size), min(self.offset + b, self.disk_size)

    def make(self, data: bytes | memoryview, start: int, end: int) -> bytes:
        size = _UNIT * SECTOR
        at, _ = self.needs(start, end)  # where the data begins on the disk
        data = memoryview(data)
        made: list[bytes | memoryview] = []
        for grain in range(start // size, -(-end // size)):
            offset = self.offset + grain * GRAIN
            stored = data[max(0, offset - at) : max(0, offset + GRAIN - at)]
            if len(stored) < GRAIN:
                lead = bytes(max(0, at - offset)) if stored else b""
                stored = memoryview(b"".join((lead, stored)).ljust(GRAIN, b"\0"))
            unit = _unit(offset // SECTOR, stored)
            low, high = start - grain * size, end - grain * size
            made += unit if low <= 0 and high >= size else [b"".join(unit)[max(0, low) : high]]
        return b"".join(made)


def _stored_before(at: int) -> int:
    """How many bytes of the grain a unit has before byte `at`."""
    first = min(max(0, at - _UNIT_HEAD), _BLOCK)
    second = min(max(0, at - _UNIT_HEAD - _BLOCK - _STORED.size), _BLOCK)
    return first + second


def _unit(sector: int, grain: memoryview) -> list[bytes | memoryview]:
    """In parts."""
    marker = t.GRAIN_MARKER.pack(sector, _CODED)
    checksum = adler32(grain).to_bytes(4, "big")
    blocks = (_FIRST, grain[:_BLOCK], _LAST, grain[_BLOCK:])
    return [marker, _ZLIB_HEADER, *blocks, checksum, _PADDING]


class VmdkStreamLayout(Layout):
    holds_data = False  # but derived from it, whole grains at a time

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
        head = header(t.GD_AT_END) + text
        self.own_bytes = len(head) + (directory - self._first + 1) * SECTOR
        self.own_bytes += self._tables.total * 4 + len(footer)
        self._parts = Parts(
            [
                fixed(0, head),
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
            at = start + (before - rank) * size  # in the file
            end = min(b, at + (high - low) * size)
            skip = builder.end - at
            builder.derived(end, StoredGrains(low * GRAIN, self._disk_size, skip=skip))

    def _append_table(self, builder: PieceListBuilder, table: int, at: int, b: int) -> None:
        """As much as there is to `b` of a table, whose marker is at byte `at` of the file."""
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
