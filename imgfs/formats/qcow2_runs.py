"""The entries of an L2 table of qcow2 as runs: millions of them are looked at by few steps."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import lru_cache

from imgfs._native import _tables
from imgfs.formats import qcow2_tables as t

#: bitmaps of clusters whose subclusters are all alike
ALIKE = (0, t.SUBCLUSTERS_ALL, t.SUBCLUSTERS_ALL << t.SUBCLUSTERS)


def host_runs(table: bytes, step: int) -> Iterator[tuple[int, int]]:
    """A table's entries as runs, (how many, the first one): standard ones with an offset follow
    one another in the file, ones without are the same, and compressed ones are alone."""
    numbers = iter(_tables.runs(table, t.ENTRY.size, True, step))
    for count, value, stride in zip(numbers, numbers, numbers, strict=True):
        if count > 1 and (value & t.ENTRY_COMPRESSED or (not stride and value & t.ENTRY_OFFSET)):
            for index in range(count):
                yield 1, value + index * stride
        elif stride and not value & t.ENTRY_OFFSET:
            yield 1, value
            yield count - 1, value + stride
        else:
            yield count, value


def extended_runs(table: bytes, step: int) -> Iterator[tuple[int, int, int]]:
    """As `host_runs`, of extended entries, with the subcluster bitmap that they all have.

    A cluster whose subclusters are not alike is alone.
    """
    words = array("Q", table)
    numbers = iter(_tables.runs(words[1::2].tobytes(), t.ENTRY.size, True, 0))
    bitmaps = zip(numbers, numbers, numbers, strict=True)
    left, bitmap = 0, 0
    for count, value in host_runs(words[::2].tobytes(), step):
        while count:
            if not left:
                left, bitmap, _ = next(bitmaps)
            taken = min(count, left) if bitmap in ALIKE else 1
            yield taken, value, bitmap
            count, left = count - taken, left - taken
            if value & t.ENTRY_OFFSET:
                value += taken * step


@lru_cache(maxsize=256)
def subcluster_runs(bitmap: int) -> tuple[tuple[int, int], ...]:
    """Of a cluster: (end, what the bitmap has set of the run's first), of subclusters alike."""
    each = 1 << t.SUBCLUSTERS | 1  # the two bits of a subcluster
    runs: list[tuple[int, int]] = []
    for index in range(t.SUBCLUSTERS):
        bits = bitmap >> index & each
        if runs and runs[-1][1] == bits:
            runs[-1] = (index + 1, bits)
        else:
            runs.append((index + 1, bits))
    return tuple(runs)
