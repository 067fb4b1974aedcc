"""The connections to one export, and what a lost one means.

    opening ----> open ----> cut (no connection is left) ----> open, when the person gave a pin
                                          |
                                          +-------------------> changed, without

Connections are made when the export is opened: one, and where the server says that all of them
show the same (NBD_FLAG_CAN_MULTI_CONN) up to `connections`.  One that is lost later is not replaced
while others live.  NBD has nothing to tell one state of an image from another, so as long as a
single connection has lived all the time what it shows is taken for one image; when the last one is
lost, whatever answers next may be another.  Then all reads raise SourceChanged, for good, unless
the settings' `pin` says that it is the same; its size and flags must be the same in any case.

Invariants.  There is one attempt to connect at a time, whoever waits for it, and waiters that go
away do not end it.  A request holds its slot until it is answered, even if nobody wants the
answer any more, so the server never has more than `depth` of them.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import trio

from imgfs._native import _heap
from imgfs.errors import (
    ImgfsError,
    ReadOnlyView,
    SourceChanged,
    SourceTimeout,
    SourceUnreachable,
)
from imgfs.sources.base import Broken
from imgfs.sources.nbd.connection import Connection, Facts
from imgfs.sources.nbd.requests import Done, Status
from imgfs.sources.nbd.settings import NbdSettings
from imgfs.url.nbd import NbdUrl

log = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Where to connect to now.  Raises ImgfsError or Broken.
Dial = Callable[[], Awaitable[NbdUrl]]

FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 2.0
PIECE = 256 << 10


@dataclass(slots=True, eq=False)
class Attempt:
    """To connect; `error` is why that failed."""

    ended: trio.Event = field(default_factory=trio.Event)
    error: Exception | None = None


class Batch:
    """Requests that one reader waits for; `wait` returns at the first error, or at the end."""

    def __init__(self) -> None:
        self.out = 0
        self.error: Exception | None = None
        self._event = trio.Event()
        self._all_issued = False

    def done(self, error: Exception | None) -> None:
        self.out -= 1
        if error is not None and self.error is None:
            self.error = error
        if self.error is not None or (self._all_issued and not self.out):
            self._event.set()

    async def wait(self) -> None:
        """Raises the first error."""
        self._all_issued = True
        if self.out:
            await self._event.wait()
        if isinstance(self.error, ImgfsError):
            # All that were in flight were given the same object.
            raise type(self.error)(str(self.error)) from self.error
        if self.error is not None:
            raise self.error


class NbdLink:
    """The way to one export; its tasks run in `nursery`.  All in one trio loop."""

    def __init__(self, name: str, dial: Dial, settings: NbdSettings, nursery: trio.Nursery) -> None:
        self.facts: Facts
        self._name = name
        self._dial = dial
        self._settings = settings
        self._nursery = nursery
        self._alive: list[Connection] = []
        self._attempt: Attempt | None = None
        self._changed: SourceChanged | None = None
        self._ever = False
        self._closed = False
        self._pause_s = 0.0
        #: how often there was a first connection; what an older one had answered may be gone
        self.epoch = 0
        self._slots = trio.Semaphore(settings.depth)

    async def open(self) -> None:
        """Connect for the first time, and set `facts`.

        Raises ImgfsError; SourceUnreachable and SourceTimeout at the first failed attempt.
        """
        await self.run(trio.lowlevel.checkpoint)

    async def check(self) -> None:
        """Raises SourceChanged when it is not certain that the export is the one that was opened.

        Raises SourceUnreachable when no connection is left and none can be made.
        """
        await self.run(trio.lowlevel.checkpoint)

    async def read(self, offset: int, length: int) -> memoryview:
        """Exactly `length` bytes.

        Raises SourceChanged; SourceUnreachable or SourceTimeout after the timeout; any other
        ImgfsError of the server's at once.  When cancelled it returns at once.
        """

        async def work() -> memoryview:
            return await self._read(offset, length)

        return await self.run(work)

    async def status(self, offset: int, length: int) -> list[int]:
        """A block status; raises as `read` does."""

        async def work() -> list[int]:
            batch = Batch()
            request = await self.issue(batch, partial(_status, offset, length))
            await batch.wait()
            return request.entries or []

        return await self.run(work)

    def end(self) -> None:
        """Give all connections up; whoever reads gets SourceUnreachable."""
        self._closed = True
        for connection in list(self._alive):
            connection.end(SourceUnreachable(f"{self._name}: was closed"))

    async def _read(self, offset: int, length: int) -> memoryview:
        block, most = self.facts.minimum, self.facts.most
        start = offset - offset % block
        end = min(offset + length + -(offset + length) % block, self.facts.size)
        # Preferred is a wish: many servers have no better one than their page size.
        step = min(most, max(PIECE, self.facts.preferred))
        step -= step % block
        # Each read has memory of its own: libnbd may write to it until the last request is
        # answered, which may be after the reader has gone, and the reader may keep what it got.
        # `wait` returns without an error only when the server has sent every byte.
        view, batch, at = memoryview(_heap.uninitialized(end - start)), Batch(), start
        while at < end and batch.error is None:
            stop = min(end, at + step - at % step)
            await self.issue(batch, partial(_read, view[at - start : stop - start], at))
            at = stop
        await batch.wait()
        return view[offset - start : offset - start + length]

    async def issue(self, batch: Batch, issue: Callable[[Connection, Done], Result]) -> Result:
        """Issue one more request of the batch, when there is a slot, on the least busy connection.

        Raises Broken when there is no connection.
        """
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            await self._slots.acquire()
        batch.out += 1

        def done(error: Exception | None) -> None:
            self._slots.release()
            batch.done(error)

        try:
            alive = self._usable()
            if not alive:
                raise Broken(SourceUnreachable(f"{self._name}: the connection was lost"))
            return issue(min(alive, key=lambda connection: connection.in_flight), done)
        except BaseException:
            self._slots.release()
            batch.out -= 1
            raise

    def _usable(self) -> list[Connection]:
        # One that is lost stays in the list until its task has its turn.
        return [connection for connection in self._alive if connection.lost is None]

    async def run(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """`await work()` with a connection; again when that broke, until the timeout."""
        deadline: float | None = None
        while True:
            try:
                await self._connected(deadline)
                result = await work()
                self._pause_s = 0.0
                return result
            except Broken as exc:
                failure = exc.error
                if not self._ever or isinstance(failure, SourceTimeout) or self._closed:
                    raise type(failure)(str(failure)) from exc
            now = trio.current_time()
            deadline = deadline or now + self._settings.timeout_s
            if now >= deadline:
                raise type(failure)(str(failure))
            log.info("%s; trying again", failure)
            await trio.lowlevel.checkpoint()

    async def _connected(self, deadline: float | None) -> None:
        """Return when there is a connection.  Raises Broken, and ImgfsError for good."""
        if self._changed is not None:
            raise SourceChanged(str(self._changed))
        if self._closed:
            raise SourceUnreachable(f"{self._name}: was closed")
        if self._usable():
            return
        if self._attempt is None:
            self._attempt = Attempt()
            self._nursery.start_soon(self._connect, self._attempt)
        attempt = self._attempt
        patience = self._settings.timeout_s
        with trio.move_on_at(deadline or trio.current_time() + patience):
            await attempt.ended.wait()
        if not attempt.ended.is_set():
            said = f"{self._name}: no connection in {patience:g} s"
            raise Broken(SourceUnreachable(said) if deadline else SourceTimeout(said))
        if attempt.error is not None:
            if isinstance(attempt.error, Broken):
                raise Broken(attempt.error.error)
            raise type(attempt.error)(str(attempt.error)) from attempt.error

    async def _connect(self, attempt: Attempt) -> None:
        """One attempt, not sooner than a pause after the last one that came to nothing."""
        try:
            await trio.sleep(self._pause_s)
            self._pause_s = min(LAST_PAUSE_S, max(FIRST_PAUSE_S, self._pause_s * 2))
            url = await self._dial()
            connection = await self._one(url)
            again, self._ever = self._ever, True
            if again:
                self._compare(connection)
            elif self._settings.write and connection.facts.is_read_only:
                connection.end(SourceUnreachable(f"{self._name}: is not needed"))
                said = "the server exports it read-only; it can be read without write=through"
                raise ReadOnlyView(f"{self._name}: {said}")
            self.facts = connection.facts
            self.epoch += 1
            self._add(connection)
        except (ImgfsError, Broken) as exc:
            attempt.error = exc
        except BaseException:
            attempt.error = Broken(SourceUnreachable(f"{self._name}: was closed"))
            raise
        finally:
            self._attempt = None
            attempt.ended.set()
        if attempt.error is None and connection.facts.multi_conn:
            await self._widen(url)

    async def _widen(self, url: NbdUrl) -> None:
        """Connect as often as that may be of use; what fails is done without."""
        for _ in range(1, self._settings.connections):
            try:
                connection = await self._one(url)
            except (ImgfsError, Broken) as exc:
                log.info("%s: no further connection: %s", self._name, exc)
                return
            if not self._usable() or connection.facts != self.facts:
                connection.end(SourceUnreachable(f"{self._name}: is not needed"))
                return
            self._add(connection)

    async def _one(self, url: NbdUrl) -> Connection:
        connection = Connection(url, self._name, self._settings.timeout_s)
        await connection.connect(extents=self._settings.extents)
        return connection

    def _add(self, connection: Connection) -> None:
        if self._closed:
            connection.end(SourceUnreachable(f"{self._name}: was closed"))
        else:
            self._alive.append(connection)
        self._nursery.start_soon(self._drive, connection)

    async def _drive(self, connection: Connection) -> None:
        try:
            await connection.drive()
        finally:
            if connection in self._alive:
                self._alive.remove(connection)
            if not self._closed:
                log.info("%s", connection.lost)

    def _compare(self, connection: Connection) -> None:
        """Raises SourceChanged, from now on always, when it may be another export."""
        why = ""
        if connection.facts.size != self.facts.size:
            why = f"has {connection.facts.size} bytes now, and had {self.facts.size}"
        elif connection.facts != self.facts:
            why = "has other properties than before"
        elif self._settings.pin is None:
            why = "was disconnected, and without -o identity= nothing tells whether it is the same"
        if why:
            self._changed = SourceChanged(f"{self._name}: {why}; open it again")
            connection.end(SourceUnreachable(str(self._changed)))
            raise SourceChanged(str(self._changed))


def _read(view: memoryview, offset: int, connection: Connection, done: Done) -> None:
    connection.read(view, offset, done)


def _status(offset: int, length: int, connection: Connection, done: Done) -> Status:
    return connection.status(offset, length, done)
