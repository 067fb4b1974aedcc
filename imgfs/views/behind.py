"""Write-behind: what was accepted goes to the source later, several writes at once, joined.

Memory is bounded: who writes more waits.  What fails is dropped, as a kernel does it: the error
is logged, counted, and kept for every writer's next fsync and close; the range is the source's
again.

Own writes change what the source is told by.  So they are made in bursts: the first one's flight
asks whether the source is still what it was (`begin_writing`), and when none is in flight any more
its new state becomes the one that counts (`pin`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable

import trio

from imgfs.budget import shared
from imgfs.errors import ImgfsError, OutOfMemory, SourceChanged
from imgfs.image import Buffer
from imgfs.sources.base import WritableSource
from imgfs.views.dirty import Dirty, Flight

log = logging.getLogger(__name__)

MIB = 1 << 20
SHARE = 4  # the part of the budget that one source's writes may take
LEAST = 1 * MIB  # what they may have in any case: other sources' may not have left for long
FLIGHTS = 64
RUN = 2 * MIB  # sent at once
JOIN = 512 << 10  # what is shorter waits for more while something else is on its way
HARD_PAUSE_S = 1.0
LOOK_S = 0.1  # how often it is asked whether others have left room

#: (start, end, whether it is at the source)
Left = Callable[[int, int, bool], None]


class WriteBehind:
    """The way to `source`; its tasks run in `nursery`.

    `written(start, end)` is awaited when a range has reached the source, or failed, and its newest
    bytes are still here; `left` is called when they are no more, without an await in between.
    """

    def __init__(
        self,
        source: WritableSource,
        nursery: trio.Nursery,
        written: Callable[[int, int], Awaitable[None]],
        left: Left,
        failed: Callable[[ImgfsError], None],
        *,
        hard: bool,
    ) -> None:
        self.dirty = Dirty()
        self._budget = shared()
        self._counted = 0
        self._source = source
        self._nursery = nursery
        self._written = written
        self._left = left
        self._failed = failed
        self.is_hard = hard  #: send again for ever while the source is away
        self._urgent = 0  # who waits for all of it
        self._moved = trio.Event()
        self._burst = trio.Lock()
        self.is_in_burst = False  #: the source is not pinned since it was written to

    async def wait_for_room(self, length: int) -> None:
        """Until so many bytes may be put; raises nothing."""
        while self.dirty.held and not self._has_room(length):
            self._pump()
            with trio.move_on_after(LOOK_S):  # other sources' writes leave, too
                await self._moved.wait()

    def _has_room(self, length: int) -> bool:
        held = self.dirty.held + length
        if held <= LEAST:
            return True
        return held <= self._budget.limit // SHARE and self._budget.has_room(length)

    def _count(self) -> None:
        """Have the budget know what is held now."""
        more = self.dirty.held - self._counted
        self._counted = self.dirty.held
        if more > 0:
            self._budget.add(more)
        else:
            self._budget.sub(-more)

    def put(self, start: int, end: int, data: Buffer | None) -> None:
        """Accept bytes, or zeroes (None), for a range.  Not empty."""
        self.dirty.put(start, end, data)
        self._count()
        self._pump()

    async def drain(self) -> None:
        """Until all that was accepted before has left, and the source's state is pinned."""
        number = self.dirty.number
        self._urgent += 1
        try:
            while not self.dirty.is_settled(number) or self.dirty.flights:
                self._pump()
                await self._moved.wait()
        finally:
            self._urgent -= 1
        await self.pin()

    async def alone(self, change: Callable[[], Awaitable[None]]) -> None:
        """Change the source while nothing is in flight.  Raises what that raises."""
        async with self._burst:
            await self._begin()
            await change()
            await self._source.pin()
            self.is_in_burst = False

    async def around(self, change: Callable[[], Awaitable[None]]) -> None:
        """Change the source's name while nothing is in flight.  Raises what that raises."""
        async with self._burst:
            with contextlib.suppress(ImgfsError):  # who writes next is told
                await self._begin()
            await change()
        await self.pin()

    async def _begin(self) -> None:
        if not self.is_in_burst:
            await self._source.begin_writing()
            self.is_in_burst = True

    async def pin(self) -> None:
        """If nothing is on its way: what the source is now counts.  Its errors are failures."""
        async with self._burst:
            if not self.is_in_burst or self.dirty.flights:
                return
            try:
                await self._source.pin()
            except ImgfsError as exc:
                if not exc.temporary:
                    self._failed(exc)
                return  # of one that is away the next pin or burst will tell
            self.is_in_burst = False

    def drop(self) -> None:
        """Forget what is not in flight."""
        self.dirty.clear()
        self._move()

    def _pump(self) -> None:
        dirty = self.dirty
        while len(dirty.flights) < FLIGHTS:
            much = self._budget.limit // SHARE // 2
            is_urgent = self._urgent or not dirty.flights or dirty.held > much
            flight = dirty.take_off(1 if is_urgent else JOIN, RUN)
            if flight is None:
                return
            self._nursery.start_soon(self._fly, flight)

    async def _fly(self, flight: Flight) -> None:
        is_there = False
        try:
            await self._send(flight)
            is_there = True
        except ImgfsError as exc:
            self._failed(exc)
        except MemoryError:
            self._failed(OutOfMemory(f"{self._source.name}: there is no memory to write it"))
        except Exception as exc:
            log.exception("%s: a write failed: this is a bug in imgfs", self._source.name)
            self._failed(ImgfsError(f"{self._source.name}: {exc!r}"))
        finally:
            with trio.CancelScope(shield=True):
                await self._written(flight.start, flight.end)
        for start, end in self.dirty.land(flight):
            self._left(start, end, is_there)
        self._move()
        self._pump()
        if not self.dirty.flights:
            await self.pin()

    async def _send(self, flight: Flight) -> None:
        while True:
            try:
                async with self._burst:
                    await self._begin()
                if flight.parts is None:
                    await self._zero(flight.start, flight.end)
                else:
                    await self._source.write(flight.start, flight.data())
                return
            except SourceChanged:
                raise
            except ImgfsError as exc:
                if not (self.is_hard and exc.temporary):
                    raise
                log.warning("%s; trying again", exc)
                await trio.sleep(HARD_PAUSE_S)

    async def _zero(self, start: int, end: int) -> None:
        """What lies beyond the source's end, and is to be written later or not at all, is zeroes
        when the source has grown."""
        if self._source.knows_size:
            end = min(end, self._source.size)
        if start < end:
            await self._source.zero(start, end - start)

    def _move(self) -> None:
        self._count()
        self._moved.set()
        self._moved = trio.Event()
