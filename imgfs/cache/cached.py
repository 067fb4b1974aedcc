"""A bounded cache on disk in front of a source, shaped for the fast path.

The store is a sparse file addressed by the source's own offsets, so no slot is ever another
block's.  The segment map says STORE for the source's data and ZERO for its holes, and for what
turned out to hold nothing else; the fast path reads both without Python.  Only blocks that are
absent come here.

Invariants: room is reserved before bytes are fetched to be kept (space.py); a block has at most
one fill (fills.py); it becomes present only after its bytes are in the file, and is punched only
after it is present no more and nobody reads it.  Readers get their bytes as soon as they have come,
before they are written.  Where there is no room, or no directory, they get them all the same.

A fill is fetched, and kept, in filling.py; what no later mount may use, and comes faster than a
disk takes it, stays in memory (memory.py).

What is present is recorded every few seconds, and at the end (kept.py); what an earlier mount
recorded is verified when it is first wanted, and fetched again where it is not good.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from imgfs._native import _map
from imgfs.cache.directory import BLOCK
from imgfs.cache.filling import Filling
from imgfs.cache.fills import Fill, joined, looked_at
from imgfs.cache.home import Home, Left
from imgfs.cache.kept import Found, Run
from imgfs.cache.memory import Memory
from imgfs.cache.prefetch import prefetch
from imgfs.cache.readahead import Readahead, is_followed
from imgfs.cache.space import Account, CacheSpace
from imgfs.cache.watches import Watches
from imgfs.cache.window import Window
from imgfs.errors import SourceChanged, again
from imgfs.extents import ExtentList, all_data
from imgfs.image import Buffer, Image
from imgfs.locks import Lock
from imgfs.sources.base import Source
from imgfs.sources.patience import patiently

log = logging.getLogger(__name__)

FILL_BLOCKS = 31  # just under 2 MiB: eight of OpenSSH's reads of 255 KiB
SHARE = 8  # a window, or the blocks of one fill, are at most this part of the limit
TRIES = 4
MANY_EXTENTS = 1000  # so long a map is kept at once, and a shorter one with the first block,
LONG_S = 0.1  # unless it took so long to get
MOST_PEEK, MOST_PEEKS = 128 << 10, 64  # bytes, and ranges


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be said of the cache of one image; sizes in bytes."""

    limit: int | None = None  #: within the limit of all
    readahead: int | None = None  #: most bytes ahead of a stream; 0: none; None: as it pays
    hard: bool = False  #: wait for a source that is away for ever
    prefetch: int | None = None  #: fetch all of it, so many bytes a second (0: any); None: do not


class CachedImage(Image):
    """A source through the cache.  What must not be interleaved has no await in it."""

    def __init__(
        self,
        source: Source,
        home: Home,
        left: Left | None,
        memory: Memory,
        most_fill: int,
        window: int,
        nursery: trio.Nursery,
        policy: Policy,
    ) -> None:
        """For `open_cached` only."""
        super().__init__(source.name, source.size)
        self.source = source
        self.map = _map.SegmentMap(source.size)
        self.store = home.store
        self.stale: SourceChanged | None = None
        self.became_stale = trio.Event()
        self.is_over = trio.Event()  # it became stale, or nobody needs it
        self.closed = trio.Event()
        self.source_extents: ExtentList = all_data(0, source.size)
        self._home = home
        self._left = left
        self._memory = memory
        self._nursery = nursery
        self.most_ahead = window
        self._watches = Watches(self.store)
        self._policy = policy
        most_blocks = max(1, min(FILL_BLOCKS, most_fill // BLOCK))
        self._filling = Filling(
            self, home, memory, nursery, most_blocks, policy.prefetch is not None
        )
        self._fills = self._filling.fills
        self._ahead: Readahead | None = None
        self._is_watching = False
        #: is any of the range being written to the source just now?
        self.is_being_written: Callable[[int, int], bool] = lambda start, end: False
        self._preparing = Lock()

    async def prepare(self) -> None:
        """Learn the source's extents, once.  Raises what the source raises."""
        if self._ahead is not None:
            return
        async with self._preparing:
            if self._ahead is not None:
                return
            left = self._left
            extents = left.extents if left is not None else None
            if extents is None:
                extents = await self._learn_extents()
            if self.size and self.stale is None:
                self.map.load(extents.ends, extents.flags, self.store)
                if left is not None:
                    self._note_zeroes(left.blocks)
            self.source_extents = extents
            self._left = None
            self._ahead = Readahead(self)
            if self._policy.prefetch is not None:
                self._nursery.start_soon(
                    prefetch, extents, self.fetch_ahead, self._has_room, self._policy.prefetch
                )

    async def _learn_extents(self) -> ExtentList:
        begun = trio.current_time()
        extents = await patiently(partial(self.source.extents, 0, self.size), self.waits)
        took_long = len(extents) >= MANY_EXTENTS or trio.current_time() - begun >= LONG_S
        if self.stale is None and (took_long or self._home.account is not None):
            await self._home.save_extents(extents)
        return extents

    def _note_zeroes(self, found: Found) -> None:
        for first, count in found.zeroes:
            start = first * BLOCK
            self.map.set_zero(start, min(start + count * BLOCK, self.size))

    async def opened_home(self) -> Account | None:
        """Where blocks are kept, if there is any such place."""
        if self.stale is None:
            left = await self._home.open(self.source_extents)
            if left is not None and self.stale is None:
                self._note_zeroes(left.blocks)
        return self._home.account

    @property
    def cached_bytes(self) -> int:
        """What is present, and what an earlier mount left that was not verified yet."""
        account = self._home.account
        unverified = account.unverified if account is not None else 0
        return (self.store.present + unverified) * BLOCK

    @property
    def window(self) -> int:
        """How many bytes readahead is ahead of the fastest stream; 0: nothing is read ahead."""
        return 0 if self._ahead is None else self._ahead.window

    @property
    def is_only_looked_at(self) -> bool:
        """Has nothing been kept yet, and might be?"""
        return not self._home.is_open

    async def peek(self, ranges: Sequence[tuple[int, int]]) -> list[Buffer] | None:
        """Some short ranges (offset, length), without keeping them; None: read them."""
        if self.stale is not None:
            raise SourceChanged(str(self.stale))
        await self.prepare()
        wanted: list[tuple[int, int]] = []
        found = [bytearray(length) for _, length in ranges]
        places: list[tuple[bytearray, int]] = []
        for part, (offset, length) in zip(found, ranges, strict=True):
            for start, end in self.source_extents.clip(offset, offset + length).data_ranges():
                wanted.append((start, end - start))
                places.append((part, start - offset))
        if sum(length for _, length in wanted) > MOST_PEEK or len(wanted) > MOST_PEEKS:
            return None
        ask = partial(patiently, partial(self.source.peek, wanted), self.waits)
        parts = await ask() if wanted else []
        for (part, at), data in zip(places, parts or (), strict=parts is not None):
            part[at : at + len(data)] = data
        return None if parts is None else list(found)

    def mark_stale(self, why: SourceChanged) -> None:
        """The source is not what it was: forget every byte, and read none any more."""
        if self.stale is None:
            self.stale = why
            self.map.set_ask(0, self.size)
            self._memory.forget(self.store, 0, self.size)
            if self._ahead is not None:
                self._ahead.stop()
            self.became_stale.set()
            self.is_over.set()

    def retire(self) -> None:
        """Nobody needs it any more: it is closed, and what is in it is kept for a later one."""
        self.is_over.set()

    def spoil(self, start: int, end: int) -> None:
        """The range is being written: what is being fetched of it is old."""
        first = start // BLOCK
        self._fills.spoil(first, -(-end // BLOCK) - first)
        self._memory.forget(self.store, start, end)

    async def forget(self, start: int, end: int) -> None:
        """The range was written at the source: drop what is cached of its blocks."""
        end = min(end, self.size)
        if start >= end:
            return
        first = start // BLOCK
        count = -(-end // BLOCK) - first
        self.spoil(start, end)
        account = self._home.account
        if account is not None and self.store.missing(start, end - start) != [(first, count)]:
            await account.drop(first, count)
            self.spoil(start, end)  # what wrote there meanwhile was dropped, too

    async def _extents(self, offset: int, length: int) -> ExtentList:
        await self.prepare()
        return self.source_extents.clip(offset, offset + length)

    async def _read(self, offset: int, length: int) -> Buffer:
        await self.prepare()
        assert self._ahead is not None
        end = offset + length
        if not is_followed():
            self._ahead.missed(offset, end)
        waited = False
        for _ in range(TRIES):
            if self.stale is not None:
                raise SourceChanged(str(self.stale))
            fills = [fill for run in self.absent(offset, end) for fill in self._fills.wanted(*run)]
            if not fills:
                local = await self._local(offset, length)
                if local is not None:
                    if waited:
                        self.missed()
                    return local
                continue  # evicted meanwhile
            with looked_at(fills):
                for fill in fills:
                    was_here = fill.fetched.is_set()
                    await fill.fetched.wait()
                    # What an earlier mount has left is only verified.
                    waited = waited or not (was_here or not fill.got)
                    if fill.error is not None and fill.error_is_for_all:
                        raise again(fill.error) from fill.error
                found = joined(fills, offset, end)
                if found is not None:
                    if waited:
                        self.missed()
                    return found
                for fill in fills:
                    await fill.ended.wait()
            if any(fill.got and not fill.kept for fill in fills):
                break
        # The cache cannot hold it for as long as it takes to read it.
        async with self._memory.budget.holding(length):
            data = await patiently(partial(self.source.read, offset, length), self.waits)
        self.missed()
        return data

    async def _local(self, offset: int, length: int) -> Buffer | None:
        try:
            return await trio.to_thread.run_sync(
                self.map.read, offset, length, abandon_on_cancel=True
            )
        except OSError as exc:
            log.warning("%s: the cache failed at %d: %s", self.name, offset, exc.strerror)
            return None

    def absent(self, start: int, end: int) -> list[Run]:
        """Runs (first, count) of absent blocks that hold data of `[start, end)`."""
        runs: list[Run] = []
        for a, b, kind, _ in self.map.segments(start, end - start):
            if kind != _map.STORE:
                continue
            for first, count in self.store.missing(a, b - a):
                if runs and first <= runs[-1][0] + runs[-1][1]:
                    runs[-1] = (runs[-1][0], first + count - runs[-1][0])
                else:
                    runs.append((first, count))
        return runs

    @property
    def line(self) -> Window:
        return self._fills.window

    @property
    def round_trip_s(self) -> float:
        return self.source.round_trip_s

    def ahead_ranges(self, start: int) -> Iterator[tuple[int, int]]:
        return self.source_extents.data_ranges(start)

    def drop_ahead(self, fills: list[Fill]) -> None:
        self._fills.drop(fills)

    def watch(self, start: int, end: int, then: Callable[[], None]) -> list[Callable[[], None]]:
        if not self._is_watching:
            self._is_watching = True
            self._nursery.start_soon(self._watches.run)
        return [partial(self._watches.cancel, self._watches.set(start, end, then))]

    def fetch_ahead(self, start: int, end: int, *, at_once: bool = False) -> list[Fill]:
        if self.stale is not None:
            return []
        # What cannot be kept would be fetched again by who waits for it.
        start_fills = self._fills.ahead
        if at_once and self._has_room(end - start):
            start_fills = self._fills.wanted
        return [fill for run in self.absent(start, end) for fill in start_fills(*run)]

    def _has_room(self, length: int) -> bool:
        return self.stale is None and self._home.has_room(length)

    def waits(self) -> bool:
        """Is a source that is away waited for?"""
        return self._policy.hard and self.stale is None

    async def record(self) -> None:
        """Make sure that what is cached by now is there for a later mount."""
        await self._filling.record()


@asynccontextmanager
async def open_cached(
    source: Source, space: CacheSpace, root: Path | None, policy: Policy | None = None
) -> AsyncIterator[CachedImage]:
    """The source through a cache in a directory of its own below `root`.

    Where none can be had, which is logged, or root is None, every miss goes to the source.  At the
    end of the block the fetches are cancelled, and what is cached is recorded for a later mount or,
    if it is of no use to one, given back.
    """
    policy = policy or Policy()
    share = min(space.limit, space.limit if policy.limit is None else policy.limit) // SHARE
    home = Home(source, space, root, policy.limit)
    image = None
    try:
        left = await home.open() if home.may_be_kept else None
        async with trio.open_nursery() as nursery:
            image = CachedImage(
                source,
                home,
                left,
                space.memory,
                share,
                share if policy.readahead is None else min(share, policy.readahead),
                nursery,
                policy,
            )
            yield image
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            space.memory.forget(home.store, 0, source.size)
            if image is not None:
                await image.record()
            await home.close(is_stale=image is not None and image.stale is not None)
            if image is not None:
                image.closed.set()
