"""Sparse extents of VMDK as ESXi writes them: seSparse."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from imgfs.formats import vmdk_tables as t
from imgfs.formats.entries import Entries
from imgfs.formats.vmdk_sparse import Grains, SparseExtent, Tables
from imgfs.pieces import Kind

_STORED = 1 << 60  # a bit that no grain's number has


@dataclass(frozen=True, slots=True, kw_only=True)
class SeSparseExtent(SparseExtent):
    """Entries of 64 bits that are numbers in areas of tables and of grains."""

    tables_offset: int  #: bytes
    grains_offset: int  #: bytes

    def _directory_entries(self) -> Entries:
        size = self.entries * self.width
        rules = [((1 << 64) - 1, 0, Kind.ZERO), (0, 0, Kind.DATA)]
        return Entries(
            self.width,
            rules,
            mask=0xFFFFFFFF,
            scale=size,
            base=self.tables_offset,
            high=self.file_size,
        )

    def _grain_entries(self) -> Entries:
        """Of what `_numbers` makes of them."""
        rules = [(_STORED, _STORED, Kind.DATA), (0, 0, Kind.ZERO)]
        return Entries(
            self.width,
            rules,
            mask=_STORED - 1,
            scale=self.grain,
            base=self.grains_offset,
            high=self.file_size,
        )

    def _numbers(self, table: bytes) -> bytes:
        """The grain's number in one piece, of those that are stored; 0 of others."""
        high, low = t.SESPARSE_HIGH_MASK, t.SESPARSE_LOW_BITS
        shift, mask = t.SESPARSE_LOW_SHIFT, (1 << t.SESPARSE_LOW_BITS) - 1
        return array(
            "Q",
            [
                _STORED | (each & high) << low | each >> shift & mask
                if each >> t.SESPARSE_KIND_SHIFT == t.SESPARSE_GTE_DATA
                else 0
                for each in array("Q", table)
            ],
        ).tobytes()

    def _directory_step(self) -> int:
        return 1

    def _table_step(self) -> int:
        return 1 << t.SESPARSE_LOW_SHIFT

    def _tables(self, count: int, value: int, step: int) -> Iterator[Tables]:
        if value == 0 and not step:
            yield Tables(count, 0)
            return
        each, times = (count, 1) if step else (1, count)
        offset = self.tables_offset + (value & 0xFFFFFFFF) * self.entries * self.width
        for _ in range(times):
            if (value + (each - 1) * step) >> 32 != t.SESPARSE_GDE_HIGH or (
                value >> 32 != t.SESPARSE_GDE_HIGH
            ):
                yield Tables(
                    each, 0, f"{self.where}: grain directory entry {value:#x} is of no known kind"
                )
            elif offset >= self.file_size:
                yield Tables(each, 0, self._past("grain directory entry", value, offset))
            else:
                yield Tables(each, offset)

    def _grains(self, count: int, value: int, step: int, offset: int) -> Iterator[Grains]:
        kind = value >> t.SESPARSE_KIND_SHIFT
        if kind != (value + (count - 1) * step) >> t.SESPARSE_KIND_SHIFT:
            for index in range(count):
                yield from self._grains(1, value + index * step, 0, offset + index * self.width)
        elif kind == t.SESPARSE_GTE_NONE and not value and not step:
            yield Grains(count, self.absent)
        elif kind in (t.SESPARSE_GTE_UNMAPPED, t.SESPARSE_GTE_ZERO):
            yield Grains(count, Kind.ZERO)
        elif kind == t.SESPARSE_GTE_DATA:
            low = value >> t.SESPARSE_LOW_SHIFT & ((1 << t.SESPARSE_LOW_BITS) - 1)
            number = (value & t.SESPARSE_HIGH_MASK) << t.SESPARSE_LOW_BITS | low
            stride = self.grain if step else 0
            yield Grains(count, Kind.DATA, self.grains_offset + number * self.grain, stride)
        else:
            problem = (
                f"{self.where}: the grain table entry {value:#x} at {offset} is of no known kind"
            )
            yield Grains(count, self.absent, problem=problem)
