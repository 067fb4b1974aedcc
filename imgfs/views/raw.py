"""The raw view: a source's own bytes, published to the fast path where they are local."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import trio

from imgfs._native import _map
from imgfs.cache.cached import CachedImage
from imgfs.errors import SourceChanged, SourceUnreachable
from imgfs.extents import ExtentList
from imgfs.image import Buffer, Image
from imgfs.sources.base import Source
from imgfs.sources.file import FileSource

PATIENCE_S = 2.0  # how long opening waits for the source to say that it is the same
SILENT_S = 5.0  # how long it is not asked again after it did not


class RawView(Image):
    """One state of a source.  When the source changes the view is stale for good.

    `map` is what the fast path answers from; `prepare` fills it from the source's extents.
    """

    def __init__(self, source: Source, cache: CachedImage | None = None) -> None:
        super().__init__(source.name, source.size)
        self.source = source
        self._cache = cache
        self.map = _map.SegmentMap(source.size) if cache is None else cache.map
        self.stale: SourceChanged | None = None
        #: called once, when the source turns out to be another
        self.on_stale: Callable[[], None] = lambda: None
        self.stored_bytes = source.size
        self._lock = trio.Lock()
        self._ready = False
        self._seen = 0
        self._silent_until = -1.0

    async def prepare(self) -> None:
        """Learn the extents, once.  Raises what the source raises."""
        async with self._lock:
            if self._ready:
                return
            if self._cache is not None:
                extents = await self._cache.extents(0, self.size)
            else:
                extents = await self.source.extents(0, self.size)
                if self.size and isinstance(self.source, FileSource):
                    self.map.load(extents.ends, extents.flags, self.source.store)
            self.stored_bytes = extents.stored_bytes()
            self._ready = True

    async def check(self) -> None:
        """Raises SourceChanged, from now on at every read, when the source is another."""
        if self.stale is None:
            try:
                await self.source.check_identity()
            except SourceChanged as exc:
                self._mark_stale(exc)
        if self.stale is not None:
            raise SourceChanged(str(self.stale))

    def _mark_stale(self, why: SourceChanged) -> None:
        if self.stale is None:
            self.stale = why
            self.map.set_ask(0, self.size)
            if self._cache is not None:
                self._cache.mark_stale(why)
            self.on_stale()

    async def check_for_open(self) -> None:
        """As `check`, but a source that does not answer soon is not a changed one.

        What is cached of it stays good; who reads the rest waits for it there.
        """
        if self.stale is None and trio.current_time() < self._silent_until:
            return
        with trio.move_on_after(PATIENCE_S), contextlib.suppress(SourceUnreachable):
            await self.check()
            return
        self._silent_until = trio.current_time() + SILENT_S

    def was_read(self) -> bool:
        """Has anything been read since this was asked last?"""
        seen = self.map.bytes_served + self.counters.bytes_read
        changed, self._seen = seen != self._seen, seen
        return changed

    async def _read(self, offset: int, length: int) -> Buffer:
        if self.stale is not None:
            raise SourceChanged(str(self.stale))
        try:
            await self.prepare()
            if self._cache is not None:
                return await self._cache.read(offset, length)
            return await self._read_uncached(offset, length)
        except SourceChanged as exc:
            self._mark_stale(exc)
            raise

    async def _read_uncached(self, offset: int, length: int) -> Buffer:
        local = await trio.to_thread.run_sync(self.map.read, offset, length, abandon_on_cancel=True)
        if local is not None:
            return local
        await self.check()
        return await self.source.read(offset, length)

    async def _extents(self, offset: int, length: int) -> ExtentList:
        return await self.source.extents(offset, length)
