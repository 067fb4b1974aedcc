"""A bounded cache on disk in front of a source, shaped for the fast path.

The store is a sparse file addressed by the source's own offsets, so no slot is ever another
block's.  The segment map says STORE for the source's data and ZERO for its holes, and for what
turned out to hold nothing else; the fast path reads both without Python.  Only blocks that are
absent come here.

Invariants: room is reserved before bytes are fetched to be kept (space.py); a block has at most
one fill (fills.py); it becomes present only after its bytes are in the file, and is punched only
after it is present no more and nobody reads it.  Readers get their bytes as soon as they have come,
before they are written.  Where there is no room, or no directory, they get them all the same.

Not done here: survival of a restart.  Its place is `CacheDirectory`.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from imgfs._native import _map
from imgfs.cache.directory import CacheDirectory, open_directory
from imgfs.cache.fills import Fill, Fills, joined
from imgfs.cache.readahead import Readahead
from imgfs.cache.space import Account, CacheSpace
from imgfs.errors import CacheError, ImgfsError, SourceChanged
from imgfs.extents import ExtentList, all_data
from imgfs.image import Buffer, Image
from imgfs.sources.base import Source

log = logging.getLogger(__name__)

BLOCK = 64 << 10
FILL_BLOCKS = 31  # just under 2 MiB: eight of OpenSSH's reads of 255 KiB
SHARE = 8  # a window, or the blocks of one fill, are at most this part of the limit
TRIES = 4


class CachedImage(Image):
    """A source through the cache.  What must not be interleaved has no await in it."""

    def __init__(
        self,
        source: Source,
        store: _map.Store,
        account: Account | None,
        limit: int,
        nursery: trio.Nursery,
    ) -> None:
        """For `open_cached` only."""
        super().__init__(source.name, source.size)
        self.source = source
        self.map = _map.SegmentMap(source.size)
        self.store = store
        self.stale: SourceChanged | None = None
        self.became_stale = trio.Event()
        self.source_extents: ExtentList = all_data(0, source.size)
        self._account = account
        self._nursery = nursery
        self._window = limit // SHARE
        self._fills = Fills(nursery, max(1, min(FILL_BLOCKS, self._window // BLOCK)), self._run)
        self._ahead: Readahead | None = None
        self._preparing = trio.Lock()

    async def prepare(self) -> None:
        """Learn the source's extents, once.  Raises what the source raises."""
        async with self._preparing:
            if self._ahead is not None:
                return
            extents = await self.source.extents(0, self.size)
            if self.size and self.stale is None:
                self.map.load(extents.ends, extents.flags, self.store)
            self.source_extents = extents
            self._ahead = Readahead(
                self.map, extents, self._window, self._fetch_ahead, self._fills.drop
            )
            self._nursery.start_soon(self._watch, self._ahead)

    def mark_stale(self, why: SourceChanged) -> None:
        """The source is not what it was: forget every byte, and read none any more."""
        if self.stale is None:
            self.stale = why
            self.map.set_ask(0, self.size)
            if self._ahead is not None:
                self._ahead.stop()
            self.became_stale.set()

    async def _extents(self, offset: int, length: int) -> ExtentList:
        await self.prepare()
        return self.source_extents.clip(offset, offset + length)

    async def _read(self, offset: int, length: int) -> Buffer:
        if self._ahead is None:
            await self.prepare()
            assert self._ahead is not None
        end = offset + length
        self._ahead.missed(offset, end)
        for _ in range(TRIES):
            if self.stale is not None:
                raise SourceChanged(str(self.stale))
            fills = [fill for run in self._absent(offset, end) for fill in self._fills.wanted(*run)]
            if not fills:
                local = await self._local(offset, length)
                if local is not None:
                    return local
                continue  # evicted meanwhile
            for fill in fills:
                await fill.fetched.wait()
                if fill.error is not None and fill.error_is_for_all:
                    raise type(fill.error)(str(fill.error)) from fill.error
            found = joined(fills, offset, end)
            if found is not None:
                return found
            for fill in fills:
                await fill.ended.wait()
            if any(fill.parts is not None and not fill.kept for fill in fills):
                break
        # The cache cannot hold it for as long as it takes to read it.
        return await self.source.read(offset, length)

    async def _local(self, offset: int, length: int) -> Buffer | None:
        try:
            return await trio.to_thread.run_sync(
                self.map.read, offset, length, abandon_on_cancel=True
            )
        except OSError as exc:
            log.warning("%s: the cache failed at %d: %s", self.name, offset, exc.strerror)
            return await self.source.read(offset, length)

    def _absent(self, start: int, end: int) -> list[tuple[int, int]]:
        """Runs (first, count) of absent blocks that hold data of `[start, end)`."""
        runs: list[tuple[int, int]] = []
        for a, b, kind, _ in self.map.segments(start, end - start):
            if kind != _map.STORE:
                continue
            for first, count in self.store.missing(a, b - a):
                if runs and first <= runs[-1][0] + runs[-1][1]:
                    runs[-1] = (runs[-1][0], first + count - runs[-1][0])
                else:
                    runs.append((first, count))
        return runs

    def _fetch_ahead(self, start: int, end: int) -> list[Fill]:
        return [fill for run in self._absent(start, end) for fill in self._fills.ahead(*run)]

    async def _watch(self, ahead: Readahead) -> None:
        """The map tells where the readers are that the fast path serves."""
        while self.stale is None:
            await trio.lowlevel.wait_readable(self.map.watch_fd())
            ahead.seen(self.map.take_seen())

    async def _run(self, fill: Fill) -> None:
        """Fetch a fill, let its readers have it, and keep it where there is room."""
        account = self._account
        if account is None or not await account.reserve(fill.count):
            if fill.is_awaited:
                await self._get(fill)
            return
        # From now on native readers wait for these blocks, and need not ask.
        self.store.set_coming(fill.first, fill.count)
        try:
            await self._get(fill)
            if fill.parts is not None:
                fill.kept = await self._keep(fill, fill.parts, account)
        finally:
            if fill.parts is None:
                account.release(fill.count)
            self.store.settle(fill.first, fill.count)

    async def _get(self, fill: Fill) -> None:
        """Sets the fill's parts, or its error."""
        try:
            fill.parts = await self._fetch(fill)
        except ImgfsError as exc:
            fill.error = exc
            if isinstance(exc, SourceChanged):
                self.mark_stale(exc)
        except Exception as exc:
            log.exception("%s: a fetch failed: this is a bug in imgfs", self.name)
            fill.error = ImgfsError(f"{self.name}: {exc!r}")
        finally:
            fill.fetched.set()

    async def _fetch(self, fill: Fill) -> list[tuple[int, Buffer]]:
        start = fill.first * BLOCK
        end = min(start + fill.count * BLOCK, self.size)
        return [
            (a, await self.source.read(a, b - a))
            for a, b in self.source_extents.clip(start, end).data_ranges()
        ]

    async def _keep(self, fill: Fill, parts: list[tuple[int, Buffer]], account: Account) -> bool:
        """Write what is not zero, and publish it.  False: nothing was kept."""
        written: list[tuple[int, int]] = []
        zeroes: list[tuple[int, int]] = []
        done = False
        try:
            for offset, data in parts:
                runs, zero = await trio.to_thread.run_sync(self.store.write_nonzero, offset, data)
                written += runs
                zeroes += zero
            done = self.stale is None
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                account.disk_is_full()
            else:
                log.warning("%s: the cache cannot be written: %s", self.name, exc.strerror)
        finally:
            if not done:
                await account.give_back(fill.first, fill.count)
        if done:
            account.keep(written, fill.count)
            for a, b in zeroes:
                self.map.set_zero(a, b)
        return done


@asynccontextmanager
async def open_cached(
    source: Source, space: CacheSpace, root: Path | None
) -> AsyncIterator[CachedImage]:
    """The source through a cache in a directory of its own below `root`.

    Where none can be had, which is logged, or root is None, every miss goes to the source.  At the
    end of the block the fetches are cancelled and the space is given back.
    """
    directory: CacheDirectory | None = None
    if root is not None:
        try:
            directory = await trio.to_thread.run_sync(open_directory, root, source)
        except CacheError as exc:
            log.warning("%s; reading without it", exc)
    # Of a store without a file no block is ever present.
    fd = os.open(os.devnull, os.O_RDWR) if directory is None else directory.blocks
    try:
        store = _map.Store(fd, source.size, BLOCK)
    finally:
        if directory is None:
            os.close(fd)
    account = None if directory is None else space.attach(store)
    try:
        async with trio.open_nursery() as nursery:
            yield CachedImage(source, store, account, space.limit, nursery)
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            if account is not None:
                await account.drop()
            if directory is not None:
                await trio.to_thread.run_sync(directory.close)
