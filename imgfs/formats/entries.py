"""What entries of tables mean where nothing is out of the ordinary: millions of them at once."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from imgfs._native import _pieces, _tables
from imgfs.image import Buffer
from imgfs.pieces import Kind, PieceListBuilder


class Entries:
    """`rules` are a mask, a value and a kind (ZERO, BELOW or DATA) each: the first whose value an
    entry has under its mask says what it is.

    The data of an entry begins at byte `((entry & mask) >> shift) * scale + base` of the file, and
    must lie inside of [low, high).
    """

    def __init__(
        self,
        width: int,
        rules: Sequence[tuple[int, int, Kind]],
        *,
        big_endian: bool = False,
        mask: int,
        shift: int = 0,
        scale: int = 1,
        base: int = 0,
        low: int = 0,
        high: int,
    ) -> None:
        self.width = width
        self._big_endian = big_endian
        self._rules = array("Q", [number for rule in rules for number in rule])
        self._place = (mask, shift, scale, base, low, high)

    def append(
        self,
        pieces: PieceListBuilder,
        table: Buffer,
        unit: int,
        end: int,
        most: int,
        file: int = 0,
    ) -> int:
        """Append the table's first entries, of `unit` bytes of the disk each, up to one that the
        rules do not tell of, or to `most` more pieces.  Returns how many entries those were.

        Nothing is appended past `end` of the disk.
        """
        count, ends, kinds, offsets = _pieces.entries(
            table,
            self.width,
            self._big_endian,
            self._rules,
            self._place,
            pieces.end,
            unit,
            end,
            most,
        )
        pieces.extend(ends, kinds, offsets, file)
        return count

    def overlap(
        self, table: Buffer, unit: int, taken: Sequence[tuple[int, int]] = (), alone: int = 0
    ) -> tuple[int, int] | None:
        """Two of the table's entries whose data, of `unit` bytes each, share bytes of the file; or
        one, and -1 - n for the nth of the ranges [start, end) that something else has.

        The ranges ascend.  An entry whose data does not begin in the file is left out.  Entries
        may share where none of them has a bit of `alone`, if that is not 0.
        """
        ranges = array("Q", [edge for each in taken for edge in each])
        return _tables.overlap(
            table, self.width, self._big_endian, self._rules, self._place, unit, alone, ranges
        )
