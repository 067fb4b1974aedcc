"""How one fill is fetched, and where its bytes go: into the cache's file, into memory, or nowhere.

Room is reserved before bytes are fetched to be kept; readers have them as soon as they have come,
before they are written.  What was written at the source meanwhile is not kept.
"""

from __future__ import annotations

import errno
import logging
from functools import partial
from typing import Protocol

import trio

from imgfs._native import _map
from imgfs.cache.directory import BLOCK
from imgfs.cache.fills import Fill, Fills
from imgfs.cache.home import Home
from imgfs.cache.kept import Run
from imgfs.cache.memory import Memory
from imgfs.cache.space import Account
from imgfs.cache.window import Window
from imgfs.cache.written import Part, Written, write_parts
from imgfs.errors import ImgfsError, OutOfMemory, SourceChanged
from imgfs.sources.base import Source
from imgfs.sources.patience import patiently

log = logging.getLogger(__name__)

RECORD_S = 5.0  # what was cached so long before a crash is not lost
FAST = 250e6  # bytes a second: what comes faster is not worth a disk's time


class Filled(Protocol):
    """The image whose blocks these are."""

    source: Source
    store: _map.Store
    map: _map.SegmentMap
    stale: SourceChanged | None

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    async def opened_home(self) -> Account | None:
        """Where blocks are kept, if there is any such place."""

    def absent(self, start: int, end: int) -> list[Run]:
        """The runs (first, count) of absent blocks that hold data of `[start, end)`."""

    def is_being_written(self, start: int, end: int, /) -> bool:
        """Is any of the range being written to the source just now?"""

    def mark_stale(self, why: SourceChanged) -> None: ...

    def waits(self) -> bool:
        """Is a source that is away waited for?"""


class Filling:
    """Runs `fills`; what must not be interleaved has no await in it."""

    def __init__(
        self,
        image: Filled,
        home: Home,
        memory: Memory,
        nursery: trio.Nursery,
        most_blocks: int,
        is_prefetched: bool,
    ) -> None:
        budget = memory.budget
        window = Window(most=budget.limit * 3 // 4)
        self.fills = Fills(nursery, most_blocks, self._run, window, budget)
        self._image = image
        self._home = home
        self._memory = memory
        self._nursery = nursery
        self._is_prefetched = is_prefetched  #: all of it is to be kept, however fast it comes
        self._unrecorded = trio.Event()
        self._is_recording = False

    async def _run(self, fill: Fill) -> None:
        """Fetch a fill, let its readers have it, and keep it where there is room."""
        start, end = fill.first * BLOCK, min((fill.first + fill.count) * BLOCK, self._image.size)
        account = await self._image.opened_home()
        if account is not None:
            await account.verify(fill.first, fill.count)
        runs = self._image.absent(start, end)
        count = sum(run[1] for run in runs)
        if not runs:
            fill.kept = True
            self.fills.came(fill)
        elif self._passes(fill, end - start):
            self._image.store.set_coming(fill.first, fill.count)
            try:
                await self._get(fill, runs)
                fill.kept = self._hold(fill)
            finally:
                self._memory.release(end - start)
                self._image.store.settle(fill.first, fill.count)
        elif account is None or not await account.reserve(count):
            if fill.is_awaited:
                await self._get(fill, runs)
        else:
            # From now on native readers wait for these blocks, and need not ask.
            self._image.store.set_coming(fill.first, fill.count)
            try:
                await self._get(fill, runs)
                if fill.parts is not None:
                    fill.kept = await self._keep(fill, runs, fill.parts, account)
            finally:
                if fill.parts is None:
                    account.release(count)
                self._image.store.settle(fill.first, fill.count)

    async def _get(self, fill: Fill, runs: list[Run]) -> None:
        """Sets the fill's parts, or its error."""
        try:
            fill.parts = [
                part
                for run in runs
                for part in await patiently(partial(self._fetch, *run), self._image.waits)
            ]
            fill.got = True
        except ImgfsError as exc:
            fill.error = exc
            if isinstance(exc, SourceChanged):
                self._image.mark_stale(exc)
        except MemoryError:
            fill.error = OutOfMemory(f"{self._image.name}: there is no memory to fetch it")
        except Exception as exc:
            log.exception("%s: a fetch failed: this is a bug in imgfs", self._image.name)
            fill.error = ImgfsError(f"{self._image.name}: {exc!r}")
        finally:
            self.fills.came(fill)

    async def _fetch(self, first: int, count: int) -> list[Part]:
        start, end = first * BLOCK, min((first + count) * BLOCK, self._image.size)
        wanted: list[tuple[int, int]] = []
        for a, b, kind, _ in self._image.map.segments(start, end - start):
            if kind == _map.ZERO:
                continue
            if wanted and wanted[-1][1] == a:
                a = wanted.pop()[0]
            wanted.append((a, b))
        return [(a, await self._image.source.read(a, b - a)) for a, b in wanted]

    def _passes(self, fill: Fill, length: int) -> bool:
        """Is it fetched ahead, and not worth a disk's time?"""
        account = self._home.account
        is_kept = account is None or account.kept or self._is_prefetched
        return (
            fill.ahead
            and not is_kept
            and self.fills.window.rate >= FAST
            and self._memory.reserve(length)
        )

    def _hold(self, fill: Fill) -> bool:
        """Publish what has come, in memory; False: it was not."""
        if fill.parts is None:
            return False
        if self._image.stale is not None or self._is_old(fill):
            return False
        if not self._memory.hold(self._image.store, fill.parts, fill.lease):
            return False
        for part in fill.parts:
            # Not in a thread: of what is not zero it looks at a few bytes.
            _, zeroes = self._image.store.find_nonzero(*part)
            for start, end in zeroes:
                self._image.map.set_zero(start, end)
        return True

    def _is_old(self, fill: Fill) -> bool:
        start, end = fill.first * BLOCK, (fill.first + fill.count) * BLOCK
        return not self.fills.may_keep(fill) or self._image.is_being_written(start, end)

    async def _keep(self, fill: Fill, runs: list[Run], parts: list[Part], account: Account) -> bool:
        """Write what is not zero into blocks that are reserved, and publish it.

        False: nothing was kept, and the blocks were given back.
        """
        if self._is_old(fill):
            account.release(sum(run[1] for run in runs))
            return False
        written: Written | None = None
        codec = None if account.kept is None else account.kept.codec
        try:
            written = await trio.to_thread.run_sync(
                write_parts, self._image.store, runs, parts, codec
            )
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                account.space.disk_is_full()
            else:
                log.warning("%s: the cache cannot be written: %s", self._image.name, exc.strerror)
        finally:
            if written is None or self._image.stale is not None or self._is_old(fill):
                written = None
                for run in runs:
                    await account.give_back(*run)
        if written is None:
            return False
        account.keep(written.blocks, sum(run[1] for run in runs))
        account.checks |= written.checks
        self._unrecorded.set()
        if not self._is_recording:
            self._is_recording = True
            self._nursery.start_soon(self._record_now_and_then)
        for a, b in written.zeroes:
            self._image.map.set_zero(a, b)
        return True

    async def _record_now_and_then(self) -> None:
        while True:
            await self._unrecorded.wait()
            self._unrecorded = trio.Event()
            await trio.sleep(RECORD_S)
            await self.record()

    async def record(self) -> None:
        """Make sure that what is cached by now is there for a later mount."""
        account = self._home.account
        if account is not None and self._image.stale is None:
            try:
                await account.record()
            except OSError as exc:
                log.warning("%s: the cache cannot be recorded: %s", self._image.name, exc.strerror)
