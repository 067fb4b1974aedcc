"""Whether a table's entries leave each other, and other structures, their places in the file.

No writer gives two entries one place: where that is so one of them is damaged, and nobody can tell
which.  A table that is small is looked at as a whole before anything is read by it; of a larger one
each part that is read, so that neither memory nor the first read depends on how large it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

from imgfs.errors import CorruptImage
from imgfs.formats.entries import Entries
from imgfs.image import Buffer

WHOLE = 1 << 20  # bytes of a table that is looked at as a whole

Taken = tuple[int, int, str]  #: [start, end) of the file, and what is there


def sorted_apart(name: str, taken: Iterable[Taken]) -> list[Taken]:
    """The ranges in order, without those that are empty.  Raises CorruptImage where two overlap."""
    found = sorted(each for each in taken if each[0] < each[1])
    for before, after in pairwise(found):
        if after[0] < before[1]:
            raise CorruptImage(
                f"{name}: {after[2]} at offset {after[0]} overlaps {before[2]}, which is at offset "
                f"{before[0]} and ends at {before[1]}"
            )
    return found


def check_entries(
    entries: Entries,
    table: Buffer,
    unit: int,
    taken: list[Taken],
    name: str,
    of: Callable[[int], str],
    alone: int = 0,
) -> None:
    """Raises CorruptImage where two entries, of `unit` bytes of the file each, share some, or one
    has some of what is taken; `of` is what a person calls an entry, `alone` as of `overlap`."""
    found = entries.overlap(table, unit, [each[:2] for each in taken], alone)
    if found is None:
        return
    first, second = found
    if second < 0:
        start, end, what = taken[-1 - second]
        raise CorruptImage(
            f"{name}: {of(first)} is in the place of {what}, at offset {start} to {end}"
        )
    raise CorruptImage(f"{name}: {of(first)} and {of(second)} are in the same place")
