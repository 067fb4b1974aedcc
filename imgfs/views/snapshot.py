"""A disk with layers of writes over it that is written on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path

import trio

from imgfs._native import _map
from imgfs.errors import ImgfsError, SourceChanged, StateGone
from imgfs.extents import ExtentList
from imgfs.image import Buffer
from imgfs.overlays.layer import Layer, Ranges, is_blank
from imgfs.overlays.log import BLOCK
from imgfs.overlays.trim import hidden
from imgfs.status.durable import Unsaved, when_lost
from imgfs.views.layer_errors import translated
from imgfs.views.overlay import OverlayView
from imgfs.views.sharing import shared
from imgfs.views.view import Origin, View
from imgfs.views.writable import PIECE, Writable

MOVED = 32 << 20  # bytes that are copied from file to file at once

#: Given the top layer, of which all is committed, and the size: a new one to write from now on.
Freeze = Callable[[Layer, int], Layer | None]


class SnapshotView(OverlayView, Writable):
    """Writes go to the first layer, which must have been opened for that.

    While the layers change nobody writes: who comes meanwhile waits for `_commits`.
    """

    def __init__(self, name: str, layers: Sequence[Layer], below: View) -> None:
        super().__init__(name, layers[0].size, layers, below, 0o600)
        self._dirty = _map.SegmentMap(self.size)
        self._commits = trio.Lock()
        self._counted = 0  # changes of the map, when `stored_bytes` was found out
        self._durable = -1  # as many of them were durable at the last commit here; -1: not open
        self._frozen: OverlayView | None = None
        #: the `written_layers` when it was found out last what the top hides
        self.trimmed: tuple[str, str, int] | None = None
        self._gone: StateGone | None = None  # nothing is written until its files are back

    @property
    def top(self) -> Layer:
        return self.layers[0]

    @property
    def place(self) -> Path:
        """Of all files of this base's snapshots."""
        return self.top.path.parent.parent

    async def check_place(self) -> None:
        """See that what is written does not vanish in files that were removed or moved away.

        Raises StateGone, as writing does from now on until they are back, and OSError.
        """
        if not self._is_prepared or self.stale is not None:
            return
        async with self._commits:
            try:
                await trio.to_thread.run_sync(self.top.check_place)
            except StateGone as exc:
                await self._note_gone(exc)
                raise
            if self._gone is not None:
                self._gone = None
                self._set_target()

    async def _note_gone(self, why: StateGone) -> None:
        if self._gone is None and self.stale is None:
            self._gone = why
            await trio.to_thread.run_sync(self.map.set_target, None)

    async def prepare(self) -> None:
        await self._begin()
        self.mtime_ns, self.ctime_ns = self.top.times()
        if self.map.changes != self._counted:
            counted = self.map.changes
            self.stored_bytes = await trio.to_thread.run_sync(self.map.data_bytes)
            self._counted = counted

    async def _begin(self) -> None:
        """What `prepare` does but for its account of time and space."""
        if not self._is_prepared:
            await super().prepare()
            async with self._commits:
                if self._durable < 0:
                    self._durable = self.map.changes
                if not self.map.writable and self.stale is None:
                    self._set_target()

    def _set_target(self) -> None:
        if self._gone is None:
            self.map.set_target(self.top.store, self._dirty, self.top.log)

    @contextlib.asynccontextmanager
    async def _committing(self) -> AsyncIterator[None]:
        """Nobody else commits, natively neither, nor changes the layers."""
        async with self._commits:
            log = self.top.log
            await trio.to_thread.run_sync(log.hold)
            try:
                yield
            finally:
                log.release()

    def mark_stale(self, why: SourceChanged) -> None:
        if self.stale is None:
            self.map.set_target(None)
        super().mark_stale(why)

    async def write(self, offset: int, data: Buffer) -> None:
        await self._begin()
        end = offset + len(data)
        if end > self.size:
            await self.resize(end)
        await self._put(offset, data)

    async def _put(self, offset: int, data: Buffer) -> None:
        """Write inside of the disk."""
        end = offset + len(data)
        while not await self._apply(self.map.write, offset, data):
            for start in {offset - offset % BLOCK, (end - 1) - (end - 1) % BLOCK}:
                length = min(BLOCK, self.size - start)
                if start < offset or start + length > end:
                    old = await self._read(start, length)
                    await self._apply(self.map.copy_up, start, old)

    async def zero(self, offset: int, length: int, *, punch: bool) -> None:
        await self._begin()
        end = offset + length
        first = min(end, -(-offset // BLOCK) * BLOCK)
        last = end if end == self.size else max(first, end - end % BLOCK)
        if offset < first:
            await self.write(offset, bytes(first - offset))
        if first < last:
            while not await self._apply(self.map.zero, first, last):
                pass
        if last < end:
            await self.write(last, bytes(end - last))

    async def _apply(self, change: Callable[..., bool], *args: object) -> bool:
        """Do it, as soon as there is a target; False: something must be done before."""
        while True:
            self.refuse_stale()
            with translated(self.name, self.place):
                if await trio.to_thread.run_sync(change, *args):
                    return True
            if self.map.writable:
                return False
            async with self._commits:
                pass  # the layers were being changed
            self._refuse_closed()

    def _refuse_closed(self) -> None:
        self.refuse_stale()
        if self._gone is not None:
            raise StateGone(str(self._gone))
        if not self.map.writable:
            raise ImgfsError(f"{self.name}: is not open for writing any more")

    @property
    def stands_on(self) -> View | None:
        return self.below

    async def trace(self, offset: int, length: int) -> list[Origin]:
        await self._begin()
        async with self._commits:  # the layers and what the map says of them fit together
            return await super().trace(offset, length)

    def _origin(self, layer: Layer) -> View | str:
        return self if layer is self.top else layer.path.name

    async def share(
        self, offset: int, length: int, of: View | str | None, of_offset: int
    ) -> tuple[bool, int]:
        await self._begin()
        end = offset + length
        if isinstance(of, View) and of is not self.below:
            return False, length
        if of is not None and of_offset != offset:
            return False, length
        if offset % BLOCK:
            return False, min(length, BLOCK - offset % BLOCK)
        while True:
            async with self._commits:
                self._refuse_closed()
                with translated(self.name, self.place):
                    is_shared, upto = await trio.to_thread.run_sync(self._share, offset, end, of)
                self.refuse_stale()
            if not is_shared or upto <= self.size:
                return is_shared, upto - offset
            await self.resize(upto)

    def _share(self, offset: int, end: int, of: View | str | None) -> tuple[bool, int]:
        """As `shared`; if all of it lies inside of the disk it is seen from now on."""
        size = max(end, self.size)
        upto, below = shared(self.layers[1:], self.below, size, offset, end, of)
        if below is not None and upto <= self.size and not self.map.below(offset, upto, below):
            raise ImgfsError(f"{self.name}: is not open for writing any more")
        return below is not None, upto

    async def take(self, offset: int, source: View, source_offset: int, length: int) -> int:
        await self._begin()
        if offset % BLOCK:
            length = min(length, BLOCK - offset % BLOCK)
        elif length >= BLOCK:
            length = min(length, MOVED)
            local = await trio.to_thread.run_sync(source.map.stored, source_offset, length)
            moved = await self._move(offset, source, source_offset, local - local % BLOCK)
            if moved:
                source.answered.reads += 1
                source.answered.bytes_read += moved
                return moved
            length = min(length - length % BLOCK, PIECE)
        return await super().take(offset, source, source_offset, length)

    async def _move(self, offset: int, source: View, source_offset: int, length: int) -> int:
        """Copy whole blocks from file to file; returns how many bytes."""
        old, end = self.size, offset + length
        moved = 0

        def move() -> bool:
            nonlocal moved
            found = self.map.move(offset, source.map, source_offset, length)
            moved = found or 0
            return found is not None

        if not length:
            return 0
        if end > old:
            await self.resize(end)
        try:
            while not await self._apply(move):
                pass
        finally:
            if end > old and moved < length and self.size == end:
                with trio.CancelScope(shield=True):
                    await self.resize(max(old, offset + moved))
        return moved

    async def resize(self, size: int) -> None:
        await self._begin()
        async with self._committing():
            self._refuse_closed()
            await trio.to_thread.run_sync(self.top.check_place)
            old = self.size
            try:
                with translated(self.name, self.place):
                    if size > old:
                        await trio.to_thread.run_sync(self.top.resize, size)
                        await trio.to_thread.run_sync(self.map.resize, size)
                    else:
                        self.size = size  # no new reader goes beyond it
                        await trio.to_thread.run_sync(self.map.resize, size)
                        await trio.to_thread.run_sync(self.top.store.quiesce)
                        await trio.to_thread.run_sync(self.top.resize, size)
            finally:
                self.size = self.map.size
            cut = min(old, size) % BLOCK
            if size > old and cut:
                # The block in which the disk ended is to be the layer's as a whole.
                start = old - cut
                await self._put(start, await self._read(start, min(BLOCK, size - start)))

    async def _extents(self, offset: int, length: int) -> ExtentList:
        await self.prepare()
        ends, flags = await trio.to_thread.run_sync(self.map.extents, offset, length)
        return ExtentList(offset, ends, flags)

    async def set_mtime(self, mtime_ns: int | None) -> None:
        await self._begin()
        async with self._committing():  # which may set back what it changes of the file
            self._refuse_closed()
            with translated(self.name):
                await trio.to_thread.run_sync(self.top.set_mtime, mtime_ns)

    async def settle(self) -> None:
        pass  # what was accepted is in the layer's file

    async def sync(self) -> None:
        await self._begin()
        async with self._committing():
            await self._commit()

    async def unsaved(self) -> Unsaved | None:
        """Make all durable; what is not, and why."""
        if not self._is_prepared:
            return None
        try:
            await self.sync()
        except ImgfsError as exc:
            return self._unsaved(exc)
        return None

    def _unsaved(self, exc: ImgfsError) -> Unsaved | None:
        if self.map.changes == self._durable and self.size == self.top.size:
            return None  # nothing was written since
        starts, ends, _ = self._dirty.ranges()
        can_retry = not self.top.log.is_lost and (self._gone is None or not self.top.is_removed)
        why = exc.__cause__.strerror if isinstance(exc.__cause__, OSError) else None
        return {
            "name": self.name,
            "bytes": sum(ends) - sum(starts),
            "why": why or str(exc).removeprefix(f"{self.name}: "),
            "place": str(self.place),
            "can_retry": can_retry,
        }

    async def _commit(self) -> None:
        changes = self.map.changes
        taken = self._dirty.take()
        try:
            with translated(self.name, self.place):
                await trio.to_thread.run_sync(self.top.check_place)
                await trio.to_thread.run_sync(self.top.commit, taken, self.size)
        except BaseException as exc:
            self._dirty.fill(*taken, self.top.store)
            if isinstance(exc, StateGone):
                await self._note_gone(exc)
            raise
        self._durable = changes
        # From now on an fsync is answered natively.
        self._dirty.settle()
        if _map.BELOW in taken[2]:
            await trio.to_thread.run_sync(self._reclaim, taken)

    def _reclaim(self, committed: Ranges) -> None:
        """Give back the space of what is not the top's any more."""
        for start, end, kind in zip(*committed, strict=True):
            if kind == _map.BELOW:
                with contextlib.suppress(OSError):  # it only takes space
                    self.map.reclaim(start, end, self.top.store, self._dirty)

    async def frozen(self, freeze: Freeze) -> OverlayView:
        """The disk as it is now, which stays so; while nothing is written it is the same one.

        `freeze` must give a new layer unless the one it gets is empty.  Raises as `freeze` does.
        """
        await self.prepare()
        known, now = self._frozen, (self.size, self.mtime_ns)
        if known is None or (known.size, known.mtime_ns) != now or not self._is_clean():
            size, layers = await self.freeze(freeze)
            # The top's time, which may have been set since the layer below was written.
            self._frozen = OverlayView(self.name, size, layers, self.below)
            self._frozen.mtime_ns = self.top.times()[0]
            known = self._frozen
        return known

    def _is_clean(self) -> bool:
        """Has nothing been written since the layers below the top were frozen?"""
        return self.top.is_empty and self.top.size == self.size and is_blank(self._dirty)

    async def freeze(self, freeze: Freeze) -> tuple[int, list[Layer]]:
        """Commit all, and go on in the layer that `freeze` gives; None: in the same.

        Returns the size and the layers below that.  Raises what `freeze` raises; then nothing has
        changed.
        """
        await self._begin()
        async with self._committing():
            self.refuse_stale()
            await trio.to_thread.run_sync(self.map.set_target, None)
            try:
                await self._commit()
                with translated(self.name, self.place):
                    fresh = await trio.to_thread.run_sync(freeze, self.top, self.size)
                if fresh is not None:
                    self.layers.insert(0, fresh)
                    self._dirty = _map.SegmentMap(self.size)
                    self._frozen = None  # which may be older than what was frozen now
                return self.size, self.layers[1:]
            finally:
                if self.stale is None:
                    self._set_target()

    @property
    def written_layers(self) -> tuple[str, str, int] | None:
        """The names of the top and of the layer below it, and how often the top was committed."""
        if not self._is_prepared or self.stale is not None or len(self.layers) < 2:
            return None
        if self._frozen is not None and not self._is_clean():
            self._frozen = None  # who looks at it still has it
        return self.top.path.name, self.layers[1].path.name, self.top.commits

    async def hidden(self, name: str) -> Ranges | None:
        """What of this layer, the one below the top, the top hides also after a crash; see trim.py.

        None: it is not below the top any more.  Nobody reads any of that when this returns.
        """
        async with self._commits:
            top, lower = self.layers[:2]
            if lower.path.name != name:
                return None
            taken, dirty = top.ranges(), self._dirty.ranges()
            size = top.size
        # What is hidden stays so, and of many ranges this takes long.
        found = await trio.to_thread.run_sync(hidden, taken, dirty, lower, size)
        await trio.to_thread.run_sync(lower.store.quiesce)
        return found

    async def join(self, upper: str, lower: str, open_merged: Callable[[], Layer]) -> None:
        """In the place of these two of its layers it stands on the one that has all of both.

        The one that is gone is let go of.  Raises OSError and CorruptSnapshot; then nothing has
        changed.
        """
        if not self._is_prepared:
            async with self._preparing:
                if not self._is_prepared:
                    return await self._join(upper, lower, open_merged)
        async with self._commits:
            await self._join(upper, lower, open_merged)

    async def _join(self, upper: str, lower: str, open_merged: Callable[[], Layer]) -> None:
        names = [layer.path.name for layer in self.layers]
        if upper not in names or lower not in names:
            return
        # There may be others between, which were merged while this view was being opened.
        gone = slice(names.index(upper), names.index(lower) + 1)
        merged = await trio.to_thread.run_sync(open_merged)
        for layer in self.layers[gone]:
            if layer is not merged:  # as it is when nothing had to be added to it
                await trio.to_thread.run_sync(self.map.replace_store, layer.store, merged.store)
        old, self.layers[gone] = self.layers[gone], [merged]
        for layer in old:
            await trio.to_thread.run_sync(layer.close)

    async def aclose(self) -> None:
        """Raises what the last commit raises."""
        if (lost := await self.close()) is not None:
            raise ImgfsError(when_lost([lost]))

    async def close(self) -> Unsaved | None:
        """Make all durable, and let go of the files; what is lost by that."""
        lost = None
        if self._is_prepared:
            await self._write_no_more()
            async with self._committing():
                try:
                    await self._commit()
                except ImgfsError as exc:
                    lost = self._unsaved(exc)
        await self._let_go(is_whole=lost is None)
        return lost

    async def discard(self) -> None:
        """Let go of the files, which were deleted; the top's space is given back now."""
        if self._is_prepared:
            await self._write_no_more()
        if self.top.is_removed:
            # The kernel has not forgotten the names yet, and what they refer to has the file open.
            with contextlib.suppress(OSError):
                await trio.to_thread.run_sync(os.ftruncate, self.top.data, 0)
        await self._let_go(is_whole=False)

    async def _write_no_more(self) -> None:
        if self.stale is None:
            async with self._committing():
                await trio.to_thread.run_sync(self.map.set_target, None)

    async def _let_go(self, *, is_whole: bool) -> None:
        await trio.to_thread.run_sync(partial(self.top.close, is_whole=is_whole))
        for layer in self.layers[1:]:
            await trio.to_thread.run_sync(layer.close)
