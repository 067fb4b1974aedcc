"""Extents: which byte ranges of an image are data, read as zeroes, or are not stored at all.

Ranges are half-open, `[start, end)`, in bytes.  A flag is a claim about the range,
and no flag is the safe answer (data): so two descriptions of one range merge with AND,
and a layer that cannot tell says "data".

An `ExtentList` is packed (nine bytes an extent) because disks have millions of
them.  It is made only by `ExtentListBuilder`, which proves that it is ascending,
contiguous and covering and joins equal neighbours; the native segment map takes it
as it is.
"""

from __future__ import annotations

import enum
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple


class Flags(enum.IntFlag):
    """What is claimed of a range.  The values are those of NBD's base:allocation."""

    DATA = 0
    HOLE = 1  #: not allocated in the source
    ZERO = 2  #: reads as zeroes; SEEK_HOLE reports this


class Extent(NamedTuple):
    start: int
    end: int
    flags: Flags

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def is_zero(self) -> bool:
        return bool(self.flags & Flags.ZERO)


class ExtentList:
    """Contiguous extents from `start` to `end`; immutable."""

    __slots__ = ("ends", "flags", "start")

    def __init__(self, start: int, ends: array[int], flags: bytes) -> None:
        """For `ExtentListBuilder` only."""
        self.start = start
        self.ends = ends
        self.flags = flags

    @property
    def end(self) -> int:
        return self.ends[-1] if self.ends else self.start

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[Extent]:
        start = self.start
        for end, flags in zip(self.ends, self.flags, strict=True):
            yield Extent(start, end, Flags(flags))
            start = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExtentList):
            return NotImplemented
        return (self.start, self.ends, self.flags) == (other.start, other.ends, other.flags)

    __hash__ = None  # type: ignore[assignment]

    def clip(self, start: int, end: int) -> ExtentList:
        """The part inside `[start, end)`, which must lie within this list."""
        if not self.start <= start <= end <= self.end:
            raise ValueError(f"[{start}, {end}) is not inside [{self.start}, {self.end})")
        if start == end:
            return ExtentList(start, array("Q"), b"")
        first = bisect_right(self.ends, start)
        last = bisect_right(self.ends, end - 1)
        ends = self.ends[first : last + 1]
        ends[-1] = end
        return ExtentList(start, ends, self.flags[first : last + 1])

    def stored_bytes(self) -> int:
        """How many bytes are allocated (not a hole)."""
        total, start = 0, self.start
        hole = int(Flags.HOLE)  # an enum's & takes longer than all else here
        for end, flags in zip(self.ends, self.flags, strict=True):
            if not flags & hole:
                total += end - start
            start = end
        return total

    def data_bytes(self) -> int:
        """How many bytes are not known to be zeroes."""
        total, start = 0, self.start
        zero = int(Flags.ZERO)
        for end, flags in zip(self.ends, self.flags, strict=True):
            if not flags & zero:
                total += end - start
            start = end
        return total

    def data_ranges(self, start: int | None = None) -> Iterator[tuple[int, int]]:
        """The maximal `[start, end)` ranges that are not known to be zeroes.

        With `start` (inside the list), from there on; costs no more than what is taken of it.
        """
        at = self.start if start is None else start
        run: int | None = None
        zero = int(Flags.ZERO)
        for index in range(bisect_right(self.ends, at), len(self.ends)):
            end = self.ends[index]
            if self.flags[index] & zero:
                if run is not None:
                    yield run, at
                    run = None
            elif run is None:
                run = at
            at = end
        if run is not None:
            yield run, at

    def hole_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The extents known to be zeroes, cut to `[start, end)`, which lies inside the list."""
        at = start
        zero = int(Flags.ZERO)
        for index in range(bisect_right(self.ends, start), len(self.ends)):
            if at >= end:
                break
            to = min(end, self.ends[index])
            if self.flags[index] & zero:
                yield at, to
            at = to


class ExtentListBuilder:
    """Builds an `ExtentList` by appending; refuses gaps, overlaps and no progress."""

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._end = start
        self._ends: array[int] = array("Q")
        self._flags = bytearray()

    @property
    def end(self) -> int:
        """Up to where the list reaches so far."""
        return self._end

    def append(self, end: int, flags: Flags | int) -> None:
        """Describe the bytes from the present end up to `end`.

        Raises ValueError when that is not forward.
        """
        if end <= self._end:
            raise ValueError(f"extent ends at {end}, not past {self._end}")
        if self._flags and self._flags[-1] == flags:
            self._ends[-1] = end
        else:
            self._ends.append(end)
            self._flags.append(int(flags))
        self._end = end

    def extend(self, ends: array[int], flags: bytes) -> None:
        """As `append` of several, which are ascending and unlike their neighbours."""
        if ends:
            self.append(ends[0], flags[0])
            self._ends.extend(ends[1:])
            self._flags += flags[1:]
            self._end = ends[-1]

    def finish(self, end: int) -> ExtentList:
        """The list, which must reach exactly `end` (ValueError otherwise)."""
        if end != self._end:
            raise ValueError(f"extents reach {self._end}, not {end}")
        return ExtentList(self._start, self._ends, bytes(self._flags))


def all_data(start: int, end: int) -> ExtentList:
    """The safe answer for a range of which nothing is known."""
    builder = ExtentListBuilder(start)
    if end > start:
        builder.append(end, Flags.DATA)
    return builder.finish(end)


def from_data_ranges(ranges: Iterator[tuple[int, int]], size: int) -> ExtentList:
    """Data at the ascending `[start, end)` ranges, holes between; clipped to `size`.

    Raises ValueError when the ranges are not ascending and apart.
    """
    hole = Flags.HOLE | Flags.ZERO
    builder = ExtentListBuilder()
    for start, end in ranges:
        if start < builder.end or end <= start:
            raise ValueError(f"data range [{start}, {end}) after {builder.end}")
        if start >= size:
            break
        if start > builder.end:
            builder.append(start, hole)
        builder.append(min(end, size), Flags.DATA)
    if builder.end < size:
        builder.append(size, hole)
    return builder.finish(size)
