"""Packed lists of pieces, made of tables and looked through; tens of millions of entries a second."""

from array import array

from typing_extensions import Buffer

from imgfs.pieces import Packed

def entries(
    table: Buffer,
    width: int,
    big_endian: bool,
    rules: array[int],
    place: tuple[int, int, int, int, int, int],
    start: int,
    unit: int,
    end: int,
    most: int,
) -> tuple[int, array[int], bytes, array[int]]:
    """Of a table's entries of 4 or 8 bytes, of `unit` bytes of a disk each and the first for `start`,
    the longest beginning that the rules tell of and that `most` pieces hold: how many entries those
    are, and the pieces' ends, kinds and offsets.  Nothing is told of what is past `end`.

    `rules` are a mask, a value and a Kind each.  The first whose value an entry has under its mask
    says what it is: ZERO, BELOW or DATA.  `place` is (mask, shift, scale, base, low, high): an entry's
    data begins at `((entry & mask) >> shift) * scale + base`, and must lie in [low, high), or the
    rules do not tell of it.  ValueError when the entries are not whole."""

def reaches(packed: Packed) -> dict[int, tuple[int, int]]:
    """Of each file that DATA is in, from where to where it is used."""

def extents(
    packed: Packed, start: int, end: int, known: list[tuple[int, array[int], bytes]]
) -> tuple[array[int], bytes]:
    """[start, end), which lies in the pieces, as an ExtentList's (ends, flags).  `known` has of each
    file, by its number, (start, ends, flags) of an ExtentList; what that does not tell of is data."""
