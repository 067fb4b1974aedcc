"""Tables of formats and bitmaps of filesystems as runs; tens of millions of entries a second."""

from array import array

from typing_extensions import Buffer

def runs(table: Buffer, width: int, big_endian: bool, step: int) -> array[int]:
    """The maximal runs of a table's entries of 4 or 8 bytes, in order, three numbers a run: how many
    entries, the first one's value, and by how much each next one is larger, `step` or 0 (of one
    entry alone: 0).  ValueError when the entries are not whole."""

def clear_runs(bitmap: Buffer, count: int) -> array[int]:
    """The maximal runs [start, end) of clear bits among the first `count`, two numbers a run.  The
    lowest bit of a byte is its first.  ValueError when there are fewer bits."""

def overlap(
    table: Buffer,
    width: int,
    big_endian: bool,
    rules: array[int],
    place: tuple[int, int, int, int, int, int],
    unit: int,
    alone: int,
    taken: array[int],
) -> tuple[int, int] | None:
    """Two of a table's entries whose data, of `unit` bytes each, overlap in the file; or one, and
    -1 - n for the nth of the ranges that are `taken` (start, end, start, end and so on, ascending).

    Entries may share a place where none of them has a bit of `alone`, if that is not 0.  `rules` and
    `place` are as of `_pieces.entries`; what does not begin in [low, high) is left out.
    """
