r"""What was written to a view and is not at its source yet: the newest bytes of each range.

    accepted ----> in flight ----> landed
        \---- replaced by something newer ----/

Chunks are ascending and apart.  One that is overwritten in part is cut; what is left of it keeps
its flight, so that it leaves when that lands, and what is newer stays.  While a range is in flight
nothing newer of it is sent: a server may do two writes in any order.  No await in here.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from imgfs.image import Buffer

LOOK = 64  # chunks that are looked at for a long run


@dataclass(slots=True, eq=False)
class Flight:
    """A range on its way, as `parts` of bytes, or zeroes (None)."""

    start: int
    end: int
    parts: list[memoryview] | None

    def data(self) -> Buffer:
        assert self.parts is not None
        return self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)


@dataclass(slots=True, eq=False)
class Chunk:
    """`data` None: zeroes.  `number` is when it was accepted."""

    start: int
    end: int
    data: memoryview | None
    number: int
    flight: Flight | None = None

    def cut(self, start: int, end: int) -> Chunk:
        data = self.data
        if data is not None:
            data = data[start - self.start : end - self.start]
            if 2 * (end - start) < self.end - self.start:
                data = memoryview(bytes(data))  # what is cut off is let go of
        return Chunk(start, end, data, self.number, self.flight)


class Dirty:
    """`held` is the bytes that it keeps in memory; ranges of zeroes need none."""

    def __init__(self) -> None:
        self.held = 0
        self.flights: list[Flight] = []
        self._starts: list[int] = []
        self._chunks: list[Chunk] = []
        self._number = 0
        self._cursor = 0

    def __bool__(self) -> bool:
        return bool(self._chunks)

    @property
    def number(self) -> int:
        """Of what was accepted last."""
        return self._number

    @property
    def end(self) -> int:
        """Up to where there is anything, or something in flight; 0: nowhere."""
        last = self._chunks[-1].end if self._chunks else 0
        return max([last, *(flight.end for flight in self.flights)])

    def put(self, start: int, end: int, data: Buffer | None) -> None:
        """The range is this from now on.  Not empty."""
        self._number += 1
        first, last = self._span(start, end)
        new: list[Chunk] = []
        for chunk in self._chunks[first:last]:
            if chunk.start < start:
                new.append(chunk.cut(chunk.start, start))
            if chunk.end > end:
                new.append(chunk.cut(end, chunk.end))
        view = None if data is None else memoryview(data)
        new.append(Chunk(start, end, view, self._number))
        new.sort(key=lambda chunk: chunk.start)
        self._replace(first, last, new)

    def between(self, start: int, end: int) -> Iterator[tuple[int, int, memoryview | None]]:
        """What there is of the range, ascending."""
        first, last = self._span(start, end)
        for chunk in self._chunks[first:last]:
            a, b = max(start, chunk.start), min(end, chunk.end)
            data = chunk.data
            yield a, b, None if data is None else data[a - chunk.start : b - chunk.start]

    def overlaps(self, start: int, end: int) -> bool:
        """Is any of the range here, or in flight?"""
        first, last = self._span(start, end)
        return first < last or any(f.start < end and start < f.end for f in self.flights)

    def is_settled(self, number: int) -> bool:
        """Has all that was accepted up to this number left?"""
        return all(chunk.number > number for chunk in self._chunks)

    def take_off(self, least: int, most: int) -> Flight | None:
        """The next run of one kind, of `least` bytes and about `most`; it is in flight then.

        None: there is none that may be sent, or, of long ones, none soon after the last.
        """
        count = len(self._chunks)
        at = bisect_left(self._starts, self._cursor)
        seen = 0
        while seen < (count if least <= 1 else min(count, LOOK)):
            index = (at + seen) % count
            run = self._run(index, most)
            if run and (run[0].data is None or run[-1].end - run[0].start >= least):
                return self._fly(run)
            seen += max(1, len(run))
        return None

    def land(self, flight: Flight) -> list[tuple[int, int]]:
        """It is over: the ranges of it that nothing newer has replaced, which leave."""
        self.flights.remove(flight)
        first, last = self._span(flight.start, flight.end)
        gone = [c for c in self._chunks[first:last] if c.flight is flight]
        self._replace(first, last, [c for c in self._chunks[first:last] if c.flight is not flight])
        return [(chunk.start, chunk.end) for chunk in gone]

    def clear(self) -> None:
        """Forget all that is not in flight."""
        self._replace(0, len(self._chunks), [])

    def _run(self, first: int, most: int) -> list[Chunk]:
        """From this chunk on, those that can be sent as one."""
        run: list[Chunk] = []
        for index in range(first, len(self._chunks)):
            chunk = self._chunks[index]
            if chunk.flight is not None or (
                run
                and (chunk.start != run[-1].end or (chunk.data is None) != (run[0].data is None))
            ):
                break
            if any(f.start < chunk.end and chunk.start < f.end for f in self.flights):
                break
            if run and chunk.data is not None and chunk.end - run[0].start > most:
                break
            run.append(chunk)
        return run

    def _fly(self, run: list[Chunk]) -> Flight:
        parts = None if run[0].data is None else [c.data for c in run if c.data is not None]
        flight = Flight(run[0].start, run[-1].end, parts)
        for chunk in run:
            chunk.flight = flight
        self.flights.append(flight)
        self._cursor = flight.end
        return flight

    def _span(self, start: int, end: int) -> tuple[int, int]:
        """Which chunks touch the range."""
        first = bisect_right(self._starts, start)
        if first and self._chunks[first - 1].end > start:
            first -= 1
        return first, max(first, bisect_left(self._starts, end))

    def _replace(self, first: int, last: int, new: list[Chunk]) -> None:
        self.held -= sum(c.end - c.start for c in self._chunks[first:last] if c.data is not None)
        self.held += sum(c.end - c.start for c in new if c.data is not None)
        self._chunks[first:last] = new
        self._starts[first:last] = [c.start for c in new]
