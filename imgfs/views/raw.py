"""The raw view: a source's own bytes, published to the fast path where they are local."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from imgfs._native import _map
from imgfs.budget import shared
from imgfs.cache.cached import CachedImage
from imgfs.cache.readahead import Ahead
from imgfs.errors import SourceChanged
from imgfs.extents import ExtentList
from imgfs.image import Buffer
from imgfs.locks import Lock
from imgfs.sources.base import Source
from imgfs.sources.local.file import FileSource
from imgfs.views.view import View

CHECK_S = 5.0  # how often, while it is read uncached, the source is asked whether it is the same


class RawView(View):
    """One state of a source.  When the source changes the view is stale for good.

    `map` is what the fast path answers from; `prepare` fills it from the source's extents.
    """

    def __init__(self, source: Source, cache: CachedImage | None = None) -> None:
        super().__init__(source.name, source.size, source.stat.mtime_ns, source.stat.mode)
        self.source = source
        self.cache = cache
        self.map = _map.SegmentMap(source.size) if cache is None else cache.map
        self._lock = Lock()
        self._ready = False
        self._checked = trio.current_time() - CHECK_S

    @property
    def ahead(self) -> Ahead | None:
        return self.cache

    async def prepare(self) -> None:
        """Learn the extents, once.  Raises what the source raises."""
        if self._ready:
            return
        async with self._lock:
            if self._ready:
                return
            if self.cache is not None:
                extents = await self.cache.extents(0, self.size)
            else:
                extents = await self.source.extents(0, self.size)
                store = self.source.store if isinstance(self.source, FileSource) else None
                if self.size:
                    self.map.load(extents.ends, extents.flags, store)
            self.stored_bytes = extents.data_bytes()
            self._ready = True

    async def make_local(self) -> None:
        if self.cache is None:
            self.refuse_stale()
            await self.prepare()

    @property
    def is_only_looked_at(self) -> bool:
        return self.cache is not None and self.cache.is_only_looked_at

    async def peek(self, ranges: Sequence[tuple[int, int]]) -> list[Buffer] | None:
        if self.cache is None or not self.is_only_looked_at:
            return None
        self.refuse_stale()
        try:
            await self.prepare()
            return await self.cache.peek(ranges)
        except SourceChanged as exc:
            self.mark_stale(exc)
            raise

    async def _check(self) -> None:
        await self.source.check_identity()

    def mark_stale(self, why: SourceChanged) -> None:
        super().mark_stale(why)
        if self.cache is not None:
            self.cache.mark_stale(why)

    async def _read(self, offset: int, length: int) -> Buffer:
        self.refuse_stale()
        try:
            await self.prepare()
            if self.cache is not None:
                return await self.cache.read(offset, length)
            return await self._read_uncached(offset, length)
        except SourceChanged as exc:
            self.mark_stale(exc)
            raise

    async def _read_uncached(self, offset: int, length: int) -> Buffer:
        local = await self.from_map(offset, length)
        if local is not None:
            return local
        if trio.current_time() - self._checked >= CHECK_S:
            # Who else reads meanwhile need not ask, too.
            self._checked = trio.current_time()
            await self.check()
        async with shared().holding(length):
            data = await self.source.read(offset, length)
        self.missed()
        return data

    async def _extents(self, offset: int, length: int) -> ExtentList:
        layer = self.source if self.cache is None else self.cache
        return await layer.extents(offset, length)
