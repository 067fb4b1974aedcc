"""A raw view whose writes go to its source, with write-behind.

What is read is made of three parts: what was written and is not at the source yet (dirty.py), the
source's bytes through `base`, a raw view with the cache, and beyond base's end, when the image
grew, the source itself, which has nothing but zeroes beyond its own end.

    a range:   clean ----> written: in `dirty`, ASK in the maps ----> landed: its cached blocks are
                 ^                                                    dropped, STORE in the maps
                 +----------------------------------------------------------+

`map` is base's until the image grows; then a longer one that says ASK beyond base's end.  A new
size that is asked for, and growth as soon as nobody writes any more, give a new base.

Invariants.  A range leaves `dirty` only after what was cached of it has been dropped, and without
an await between leaving and the maps' saying so.  `_shape` is held while base, map and size change.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias

import trio

from imgfs._native import _map
from imgfs.cache.cached import CachedImage
from imgfs.cache.readahead import Ahead
from imgfs.errors import (
    ImgfsError,
    NeverDurable,
    NotDurable,
    SourceChanged,
    TooLarge,
    UnsupportedFeature,
)
from imgfs.extents import ExtentList
from imgfs.image import Buffer
from imgfs.sources.base import Source, WritableSource
from imgfs.sources.local.file import FileSource
from imgfs.views.behind import WriteBehind
from imgfs.views.raw import RawView
from imgfs.views.times import Times
from imgfs.views.writable import Writable
from imgfs.views.zeroes import BLOCK, is_zero

log = logging.getLogger(__name__)

LEAST_ROOM = 64 << 20  # bytes that a map is longer than a growing image

OpenCache = Callable[[Source], Awaitable[CachedImage]]


class ThroughView(Writable):
    """A writable source's own bytes.  `open_cache` is None for a local file."""

    def __init__(
        self,
        source: WritableSource,
        cache: CachedImage | None,
        open_cache: OpenCache | None,
        nursery: trio.Nursery,
        *,
        hard: bool,
    ) -> None:
        super().__init__(source.name, source.size, source.stat.mtime_ns, source.stat.mode)
        self.source = source
        source.outlive_name()
        self.cache = cache
        self.is_resizable = source.is_resizable
        self._open_cache = open_cache
        self._nursery = nursery
        self._behind = WriteBehind(
            source, nursery, self._written, self._left, self._note_failure, hard=hard
        )
        self._shape = trio.Lock()
        self._times = Times(source.stat)
        self._show_times()
        self._write_hooks: list[Callable[[], None]] = []
        self._changes = self._durable_changes = 0
        self._set_base(RawView(source, cache))

    @property
    def dirty_bytes(self) -> int:
        """What is held in memory and is not at the source yet."""
        return self._behind.dirty.held

    @property
    def ahead(self) -> Ahead | None:
        return self._base.ahead

    @property
    def is_nameless(self) -> bool:
        return self.source.is_nameless

    async def change_name(self, change: Callable[[], Awaitable[None]]) -> None:
        """Do what gives the source another name, or takes it away, while nobody writes.

        Raises what that raises.
        """

        async def kept() -> None:
            await self.source.keep()
            await change()

        async def work() -> None:
            async with self._shape:
                await self._behind.drain()
                await self._behind.around(kept)
                self.name = self.source.name

        await self._for_sure(work)

    def _show_times(self) -> None:
        self.mtime_ns, self.ctime_ns = self._times.mtime_ns, self._times.ctime_ns

    @property
    def is_durable(self) -> bool:
        """Is all that was accepted so far durable at the source?"""
        return self._durable_changes == self._changes

    def _follow_times(self) -> None:
        if not self._behind.dirty and not self._behind.is_in_burst:
            self._times.follow(self.source.stat)
            self._show_times()

    def _note_change(self) -> None:
        """Something is about to be changed."""
        self._changes += 1
        self._times.changed()
        self._show_times()
        hooks, self._write_hooks = self._write_hooks, []
        for hook in hooks:
            hook()

    def when_written(self, hook: Callable[[], None]) -> None:
        """`hook` is called once, when something is written."""
        self._write_hooks.append(hook)

    async def prepare(self) -> None:
        if self._base.size != self.size and not self.writers:
            async with self._shape:
                if self._base.size != self.size and not self.writers and not self._behind.dirty:
                    await self._make_base()
        await self._base.prepare()
        self._follow_times()
        if not self._was_written:
            self.stored_bytes = self._base.stored_bytes
        elif self.map.size == self.size:
            self.stored_bytes = self.map.data_bytes()
        else:
            ends, flags = self.map.extents(0, self.size)
            self.stored_bytes = ExtentList(0, ends, flags).data_bytes()

    async def _check(self) -> None:
        await self.source.check_identity()

    def mark_stale(self, why: SourceChanged) -> None:
        if self.stale is None:
            super().mark_stale(why)
            self._base.mark_stale(why)
            if self._behind.dirty:
                self._note_failure(why)
            self._behind.drop()

    # Reading

    async def _read(self, offset: int, length: int) -> Buffer:
        self.refuse_stale()
        if not self._was_written:
            return await self._read_clean(offset, length)
        end = offset + length
        found = bytearray(length)
        at = offset
        newer = [(a, b, d) for a, b, d in self._behind.dirty.between(offset, end)]
        for start, stop, data in [*newer, (end, end, None)]:
            if start > at:
                found[at - offset : start - offset] = await self._read_clean(at, start - at)
            if data is not None:
                found[start - offset : stop - offset] = data
            at = stop
        return found

    async def _read_clean(self, offset: int, length: int) -> Buffer:
        """What is not in `dirty` now."""
        while True:
            base = self._base
            inside = max(0, min(length, base.size - offset))
            try:
                head = await base.read(offset, inside) if inside else b""
                if inside == length:
                    return head
                there = max(0, min(length, self.source.size - offset) - inside)
                tail = await self.source.read(offset + inside, there) if there else b""
                return b"".join((head, tail, bytes(length - inside - there)))
            except SourceChanged as exc:
                async with self._shape:  # another base may be taking its place
                    if self._base is base:
                        self.mark_stale(exc)
                        raise

    async def seek(self, offset: int, whence: int) -> int | None:
        if self.map.size == self.size:
            return self.map.seek(offset, whence)
        # The map is longer than the image, and what it does not know of is data.
        return self.map.seek(offset, whence, self.size)

    async def _extents(self, offset: int, length: int) -> ExtentList:
        await self.prepare()
        ends, flags = self.map.extents(offset, length)
        return ExtentList(offset, ends, flags)

    # Writing

    async def _begin_writing(self) -> None:
        await self.check()
        await self.prepare()

    async def write(self, offset: int, data: Buffer) -> None:
        end = offset + len(data)
        if offset == end:
            return
        await self._behind.wait_for_room(len(data))
        async with self._shape:
            self.refuse_stale()
            if end > self.size:
                self._grow(end)
            self._was_written = True
            self._note_change()
            for a, b, is_zero in self._split(offset, end, data):
                if is_zero:
                    self._say_zero(a, b)
                else:
                    view = memoryview(data)[a - offset : b - offset]
                    self._for_maps(a, b, lambda m, a, b: m.set_ask(a, b, _map.DATA))
                    self._spoil(a, b)
                    self._behind.put(a, b, view)

    async def zero(self, offset: int, length: int, *, punch: bool) -> None:
        if punch and not self.source.can_punch:
            raise UnsupportedFeature(f"{self.name}: nobody at its server can make a hole")
        await self.write_zeroes(offset, length)

    async def write_zeroes(self, offset: int, length: int) -> None:
        async with self._shape:
            self.refuse_stale()
            if offset + length > self.size:
                self._grow(offset + length)
            self._was_written = True
            self._note_change()
            end = min(offset + length, max(self.source.size, self._dirty_end()))
            ranges = self._not_zero(offset, end) if offset < end else []
            self._times.owes_touch |= not ranges
            for a, b in ranges:
                self._spoil(a, b)
                self._say_zero(a, b)
                self._behind.put(a, b, None)

    async def resize(self, size: int) -> None:
        if size == self.size == self.source.size:
            await self.set_mtime(None)
            return
        if not self.is_resizable:
            raise UnsupportedFeature(f"{self.name}: its size cannot be changed")

        async def work() -> None:
            async with self._shape:
                self.refuse_stale()
                await self._behind.drain()
                self._note_change()
                await self._resize_source(size)
                self.size = size
                await self._make_base()

        await self._for_sure(work)

    async def settle(self) -> None:
        async with self._shape:
            await self._behind.drain()
        if self.source.size < self.size:
            await self._for_sure(self._lengthen)
        if self._times.owes_touch and self.stale is None:
            with contextlib.suppress(ImgfsError):  # no byte is lost with it
                await self._for_sure(self._touch_source)
        self._follow_times()

    async def set_mtime(self, mtime_ns: int | None) -> None:
        if mtime_ns is None:
            self.refuse_stale()
            self._times.owes_touch = True
            self._note_change()
        else:
            await self._for_sure(partial(self._set_mtime, mtime_ns))

    async def _set_mtime(self, mtime_ns: int) -> None:
        async with self._shape:
            self.refuse_stale()
            await self._behind.drain()
            if self.source.keeps_mtime:
                await self._behind.alone(partial(self.source.set_mtime, mtime_ns))
            self._times.was_set(self.source.stat, mtime_ns, self.source.keeps_mtime)
            self._show_times()

    async def _touch_source(self) -> None:
        async with self._shape:
            self.refuse_stale()
            await self._behind.drain()
            self._times.owes_touch = False
            mtime_ns = self.source.stat.mtime_ns
            if self.source.keeps_mtime and mtime_ns < self._times.mtime_ns:
                change = partial(self.source.set_mtime, self._times.mtime_ns)
                await self._behind.alone(change)
                self._times.was_touched(self.source.stat)

    async def _lengthen(self) -> None:
        """What was not sent because it is zeroes, at the end."""
        async with self._shape:
            await self._behind.drain()
            if self.source.size < self.size and self.stale is None:
                try:
                    await self._resize_source(self.size)
                except ImgfsError as exc:
                    self._note_failure(exc)

    async def _for_sure(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do all of it, even when who waits for it goes away; raises what it raises."""
        done = trio.Event()
        failure: Exception | None = None

        async def run() -> None:
            nonlocal failure
            try:
                await work()
            except Exception as exc:
                failure = exc
            finally:
                done.set()

        self._nursery.start_soon(run)
        await done.wait()
        if failure is not None:
            raise failure

    async def sync(self) -> None:
        changes = self._changes
        await self.settle()
        self.refuse_stale()
        try:
            await self.source.flush()
        except NeverDurable:
            raise
        except NotDurable as exc:
            self._note_failure(exc)  # the source says so once, and all writers must hear of it
            raise
        await self._behind.pin()
        self._durable_changes = max(self._durable_changes, changes)

    async def finish(self) -> None:
        """At the end: all is durable.  Raises what failed only now, and as `sync`."""
        told = self.failures
        self._behind.is_hard = False
        if not self.is_durable and self.stale is None:
            await self.sync()
        if self.failures != told and self.failure is not None:
            raise self.failure

    def _end_writing(self) -> None:
        if self._behind.dirty:
            log.info("%s: was closed with bytes that are on their way", self.name)

    # What keeps the parts in agreement.  No await in it where there is no async.

    def _set_base(self, base: RawView) -> None:
        self._base = base
        self.map = base.map
        self._was_written = False
        if base.cache is not None:
            self._store = base.cache.store
        else:
            assert isinstance(self.source, FileSource)
            self._store = self.source.store
        if base.cache is not None:
            base.cache.is_being_written = self._behind.dirty.overlaps

    async def _make_base(self) -> None:
        """Under `_shape`, with nothing dirty: for the source as it is now."""
        old = self._base
        self.map.set_ask(0, self.map.size)
        if self._open_cache is not None:
            assert old.cache is not None
            old.cache.mark_stale(SourceChanged(f"{self.name}: has another size"))
            await old.cache.closed.wait()  # it has the directory still
            self.cache = await self._open_cache(self.source)
        self._set_base(RawView(self.source, self.cache))
        self.size = self.source.size
        await self._base.prepare()

    async def _resize_source(self, size: int) -> None:
        try:
            await self._behind.alone(partial(self.source.resize, size))
        except SourceChanged as exc:
            self.mark_stale(exc)
            raise

    def _grow(self, size: int) -> None:
        if not self.is_resizable:
            raise TooLarge(f"{self.name}: ends at {self.size}, and cannot be made longer")
        if size > self.map.size:
            longer = _map.SegmentMap(max(2 * size, size + LEAST_ROOM))
            known = min(self.size, self.map.size)
            longer.copy(0, self.map, 0, known)
            if self.map is not self._base.map:
                self.map.set_ask(0, self.map.size)
            self.map = longer
        if size > self.size:
            self._say_zero(self.size, size)
            self.size = size

    def _split(self, start: int, end: int, data: Buffer) -> list[tuple[int, int, bool]]:
        """Ranges to be sent, and, beyond the source's end, such as need not be: zeroes."""
        fresh = max(start, self.source.size, self._dirty_end())
        parts: list[tuple[int, int, bool]] = []
        at = start
        view = memoryview(data)
        block = fresh
        while block < end:
            # What of an aligned block is in this write: a program's writes are aligned anyhow.
            stop = min(end, block + BLOCK - block % BLOCK)
            if is_zero(view[block - start : stop - start]):
                if at < block:
                    parts.append((at, block, False))
                parts.append((block, stop, True))
                at = stop
            block = stop
        if at < end:
            parts.append((at, end, False))
        return parts

    def _dirty_end(self) -> int:
        """Up to where something may be on its way."""
        return self._behind.dirty.end

    def _not_zero(self, start: int, end: int) -> list[tuple[int, int]]:
        """The ranges that may hold something else, now or when what is on its way has landed."""
        found: list[tuple[int, int]] = []
        for a, b, kind, _ in self.map.segments(start, end - start):
            if kind == _map.ZERO and not self._behind.dirty.overlaps(a, b):
                continue
            if found and found[-1][1] == a:
                a = found.pop()[0]
            found.append((a, b))
        return found

    def _for_maps(
        self, start: int, end: int, change: Callable[[_map.SegmentMap, int, int], None]
    ) -> None:
        change(self.map, start, end)
        stop = min(end, self._base.size)
        if self.map is not self._base.map and start < stop:
            change(self._base.map, start, stop)

    def _say_zero(self, start: int, end: int) -> None:
        self._for_maps(start, end, lambda m, a, b: m.set_zero(a, b))

    def _spoil(self, start: int, end: int) -> None:
        if self.cache is not None and start < self.cache.size:
            self.cache.spoil(start, min(end, self.cache.size))

    async def _written(self, start: int, end: int) -> None:
        if self.cache is not None and start < self.cache.size:
            await self.cache.forget(start, end)

    def _left(self, start: int, end: int, is_there: bool) -> None:
        """The range is the source's: zeroes that are said in the maps stay, the rest is data."""
        if self.stale is not None:
            return
        for a, b, kind, _ in self.map.segments(start, end - start):
            stop = min(b, self._base.size)
            if a < stop and (kind != _map.ZERO or not is_there):
                self._for_maps(a, stop, self._say_stored)

    def _say_stored(self, map_: _map.SegmentMap, start: int, end: int) -> None:
        map_.set_store(start, end, self._store, start)

    def _note_failure(self, exc: ImgfsError) -> None:
        if isinstance(exc, SourceChanged) and self.stale is None:
            self.mark_stale(exc)
        self.failures += 1
        self.failure = exc
        self.counters.errors += 1
        self.counters.last_error = str(exc)
        how = "may be" if isinstance(exc, NotDurable) else "is"
        log.error("%s: what was written %s lost: %s", self.name, how, exc)


#: A source's own bytes, as they are shown.
StoredView: TypeAlias = RawView | ThroughView
