"""Moves a view's bytes to a destination: what is data is read and written, holes are not read.

    pieces, in order:   not begun ----> under way: read, then written ----> done
                                        ^ first of these
                        all before this is done: the mark, which is recorded once it is durable

Pieces are under way as many at a time as the budget has room for, whichever images they are of, and
are done in any order.  Of one image no more are asked for than its line holds (cache/window.py):
what queues before a slow line keeps the other images waiting.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Awaitable, Callable, Iterator

import trio

from imgfs.cache.window import Flight, Window
from imgfs.copying.budget import LEAST, MIB, Budget
from imgfs.copying.destination import Destination
from imgfs.errors import CopyDiffers, NeverDurable, SourceUnreachable
from imgfs.extents import ExtentList
from imgfs.image import Buffer, Image
from imgfs.views.view import View
from imgfs.views.zeroes import BLOCK, is_zero

PIECE = MIB
FIRST = 4 * MIB  # on its way until it is known what the line holds
ZEROES = 1 << 30  # of a hole, at once
DURABLE_S = 5.0  # how often the destination is made durable
CHECK_S = 5.0  # how often the source is asked whether it is the same

Piece = tuple[int, int, bool]  #: start, end, whether it is zeroes


class Move:
    """One copy.  `extents` are the view's; `advanced` hears of data that has been written."""

    def __init__(
        self,
        view: View,
        extents: ExtentList,
        destination: Destination,
        budget: Budget,
        advanced: Callable[[int], None],
    ) -> None:
        self._view = view
        self._extents = extents
        self._destination = destination
        self._budget = budget
        self._advanced = advanced
        self._under_way: dict[int, None] = {}
        self._fed = 0
        self._failure: Exception | None = None
        self._line = Window(FIRST)
        self._came = trio.Event()

    async def run(self, start: int, recorded: Callable[[int], None]) -> None:
        """Copy all from `start` on, and make it durable.

        `recorded` hears up to where all is durable.  Raises SourceChanged, and what reading and
        writing raise: the first of it; NeverDurable when all is there, and nothing else is wrong.
        """
        self._fed = start
        async with trio.open_nursery() as background:
            background.start_soon(self._guarded, background, self._watch)
            background.start_soon(self._guarded, background, self._sync, recorded)
            async with trio.open_nursery() as nursery:
                await self._feed(start, nursery, background)
            background.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure
        await self._view.check()
        await self._destination.flush()

    async def _feed(self, start: int, nursery: trio.Nursery, scope: trio.Nursery) -> None:
        for piece in pieces(self._extents, start):
            first, end, zero = piece
            self._fed = end
            if zero and self._destination.is_blank:
                continue
            cost = LEAST if zero else max(LEAST, end - first)
            while not (zero or self._line.has_room):
                await self._came.wait()
            self._under_way[first] = None
            await self._budget.take(cost)
            flight = None if zero else self._line.started(trio.current_time(), end - first)
            nursery.start_soon(self._guarded, scope, self._piece, piece, cost, flight)

    async def _guarded(
        self, scope: trio.Nursery, work: Callable[..., Awaitable[None]], *args: object
    ) -> None:
        """The first failure ends all."""
        try:
            await work(*args)
        except Exception as exc:
            self._failure = self._failure or exc
            scope.cancel_scope.cancel()

    async def _piece(self, piece: Piece, cost: int, flight: Flight | None) -> None:
        start, end, _ = piece
        try:
            if flight is None:
                await self._destination.zero(start, end - start)
            else:
                data = await self._fetched(start, flight)
                for first, part in parts(start, data):
                    if not isinstance(part, int):
                        await self._destination.write(first, part)
                    elif not self._destination.is_blank:
                        await self._destination.zero(first, part)
                self._advanced(end - start)
            del self._under_way[start]
        finally:
            self._budget.give(cost)

    async def _fetched(self, start: int, flight: Flight) -> Buffer:
        got = 0
        try:
            data = await self._view.read(start, flight.length)
            got = flight.length
            return data
        finally:
            self._line.ended(flight, trio.current_time(), got)
            self._came.set()
            self._came = trio.Event()

    async def _watch(self) -> None:
        while True:
            await trio.sleep(CHECK_S)
            with contextlib.suppress(SourceUnreachable):  # who reads will see
                await self._view.check()

    async def _sync(self, recorded: Callable[[int], None]) -> None:
        known = 0
        while self._destination.can_resume:
            await trio.sleep(DURABLE_S)
            mark = next(iter(self._under_way), self._fed)
            if mark > known:
                try:
                    await self._destination.flush()
                except NeverDurable:
                    return
                recorded(mark)
                known = mark


def pieces(extents: ExtentList, start: int) -> Iterator[Piece]:
    """What is to be done from `start` on, in order and without gaps."""
    at = start
    if start < extents.end:
        for first, end in extents.data_ranges(start):
            yield from _cut(at, first, ZEROES, True)
            yield from _cut(first, end, PIECE, False)
            at = end
    yield from _cut(at, extents.end, ZEROES, True)


def _cut(start: int, end: int, step: int, zero: bool) -> Iterator[Piece]:
    while start < end:
        stop = min(end, start - start % step + step)
        yield start, stop, zero
        start = stop


def parts(start: int, data: Buffer) -> Iterator[tuple[int, memoryview | int]]:
    """Data apart from aligned blocks of zeroes in it, of which only the length is given."""
    view, end = memoryview(data), start + len(data)
    at = run = start
    zero = False
    while at < end:
        stop = min(end, at - at % BLOCK + BLOCK)
        found = is_zero(view[at - start : stop - start])
        if found != zero and at > run:
            yield run, at - run if zero else view[run - start : at - start]
            run = at
        zero, at = found, stop
    if end > run:
        yield run, end - run if zero else view[run - start :]


async def compare(
    view: View, extents: ExtentList, copy: Image, budget: Budget, advanced: Callable[[int], None]
) -> None:
    """Are the view's bytes, where `extents` reach, those of the copy, which may be longer?

    `advanced` hears of the view's data that has been compared.  Raises CopyDiffers.
    """
    failures: list[Exception] = []
    theirs = await copy.extents(extents.start, extents.end - extents.start)

    async def one(start: int, end: int) -> None:
        try:
            wanted, known = bytearray(end - start), 0
            found = await copy.read(start, end - start)
            for first, to in extents.clip(start, end).data_ranges():
                wanted[first - start : to - start] = await view.read(first, to - first)
                known += to - first
            if wanted != found:
                pairs = zip(wanted, bytes(found), strict=True)
                at = start + next(i for i, (a, b) in enumerate(pairs) if a != b)
                raise CopyDiffers(f"{copy.name}: differs from {view.name} at byte {at}")
            advanced(known)
        except Exception as exc:
            failures.append(exc)
            nursery.cancel_scope.cancel()
        finally:
            budget.give(2 * PIECE)

    async with trio.open_nursery() as nursery:
        for start, end in _either(extents, theirs):
            for first, to, _ in _cut(start, end, PIECE, False):
                await budget.take(2 * PIECE)
                nursery.start_soon(one, first, to)
    if failures:
        raise failures[0]


def _either(one: ExtentList, other: ExtentList) -> Iterator[tuple[int, int]]:
    """The ranges that are data in one of them, ascending and apart."""
    reach: tuple[int, int] | None = None
    for start, end in heapq.merge(one.data_ranges(), other.data_ranges()):
        if reach is not None and start <= reach[1]:
            reach = reach[0], max(reach[1], end)
            continue
        if reach is not None:
            yield reach
        reach = start, end
    if reach is not None:
        yield reach
