"""What each byte of a disk is to its guest: in use, a hole, or deleted and still stored."""

from __future__ import annotations

import enum
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from imgfs.extents import ExtentList
from imgfs.guest.disk import Content, Guest

OUTSIDE = "outside of partitions"


class State(enum.IntEnum):
    HOLE = 0  #: not stored, or known to be zero
    DATA = 1
    DELETED = 2  #: data in a block that its filesystem calls free: what `sparse/` leaves out


@dataclass(frozen=True, slots=True)
class Amounts:
    """Bytes."""

    data: int = 0
    hole: int = 0
    deleted: int = 0

    @property
    def size(self) -> int:
        return self.data + self.hole + self.deleted

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(self.data + other.data, self.hole + other.hole, self.deleted + other.deleted)


class Usage:
    """Runs of one state from byte 0 to `size`; immutable."""

    def __init__(self, extents: ExtentList, free: Sequence[int] = ()) -> None:
        """`extents` are of the whole disk; `free` as in `Guest`."""
        self._ends = array("Q")
        self._states = bytearray()
        self._data = array("Q")  # bytes in the runs before, and
        self._deleted = array("Q")
        data = deleted = 0
        for end, state in _runs(extents, free):
            start = self._ends[-1] if self._ends else 0
            self._data.append(data)
            self._deleted.append(deleted)
            self._ends.append(end)
            self._states.append(state)
            data += end - start if state == State.DATA else 0
            deleted += end - start if state == State.DELETED else 0

    @property
    def size(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[tuple[int, int, State]]:
        start = 0
        for end, state in zip(self._ends, self._states, strict=True):
            yield start, end, State(state)
            start = end

    def amounts(self, start: int, end: int) -> Amounts:
        """Of `[start, end)`, which must lie inside."""
        (data, deleted), (data_before, deleted_before) = self._until(end), self._until(start)
        data, deleted = data - data_before, deleted - deleted_before
        return Amounts(data, end - start - data - deleted, deleted)

    def _until(self, offset: int) -> tuple[int, int]:
        """The bytes of data, and the deleted ones, before the offset."""
        if offset == 0:
            return 0, 0
        index = bisect_left(self._ends, offset)
        begun = self._ends[index - 1] if index else 0
        part, state = offset - begun, self._states[index]
        return (
            self._data[index] + (part if state == State.DATA else 0),
            self._deleted[index] + (part if state == State.DELETED else 0),
        )


def _runs(extents: ExtentList, free: Sequence[int]) -> Iterator[tuple[int, State]]:
    """Where each run ends, and what it is; neighbours differ."""
    at, state = 0, State.HOLE
    for end, following in _pieces(extents, free):
        if following != state and at:
            yield at, state
        at, state = end, following
    if at:
        yield at, state


def _pieces(extents: ExtentList, free: Sequence[int]) -> Iterator[tuple[int, State]]:
    index = at = 0
    for start, end in extents.data_ranges():
        if at < start:
            yield start, State.HOLE
        at = start
        while at < end:
            while index < len(free) and free[index] <= at:
                index += 1
            # An odd number of bounds have passed inside of a free range.
            at = min(end, free[index]) if index < len(free) else end
            yield at, State.DELETED if index % 2 else State.DATA
    if at < extents.end:
        yield extents.end, State.HOLE


@dataclass(frozen=True, slots=True)
class Part:
    """A partition, a volume, the whole disk where it has no table, or what is between partitions.

    `ranges` are the disk's, none where it has no place there.  `left_whole` says why nothing of it
    is called deleted.
    """

    name: str
    ranges: tuple[tuple[int, int], ...]
    amounts: Amounts
    holds: str  #: type and label, or the signatures that there are
    left_whole: str = ""
    is_volume: bool = False  #: its bytes are also those of a partition


def parts_of(guest: Guest, usage: Usage) -> list[Part]:
    """In the disk's order; then what is outside of all partitions, and then volumes."""
    found: list[Part] = []
    taken: list[tuple[int, int]] = []
    volumes = {f"volume {volume.name}" for volume in guest.volumes}
    for name, content, segments in guest.places():
        ranges = tuple(
            each
            for segment in segments
            for each in segment.on_disk(segment.start, segment.start + segment.size)
        )
        why = guest.left_whole or content.left_whole
        amounts = _sum(usage, ranges)
        found.append(Part(name, ranges, amounts, holds(content), why, name in volumes))
        taken += ranges if name not in volumes else ()
    gaps = tuple(_gaps(sorted(taken), usage.size))
    if gaps:
        found.append(Part(OUTSIDE, gaps, _sum(usage, gaps), ""))
    return sorted(found, key=lambda part: (part.is_volume, part.name == OUTSIDE, part.ranges[:1]))


def holds(content: Content) -> str:
    """A filesystem's type and label, or the signatures that there are."""
    found = content.filesystem
    if found is None:
        return " and ".join(content.holds)
    return " ".join(word for word in (found.kind, found.label) if word)


def _sum(usage: Usage, ranges: Iterable[tuple[int, int]]) -> Amounts:
    return sum((usage.amounts(*each) for each in ranges), Amounts())


def _gaps(taken: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    at = 0
    for start, end in taken:
        if at < start:
            yield at, start
        at = max(at, end)
    if at < size:
        yield at, size
