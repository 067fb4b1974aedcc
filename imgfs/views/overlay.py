"""A disk with layers of writes over it, as it was at some moment."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from weakref import ref

import trio

from imgfs._native import _map
from imgfs.errors import OutOfRange, SourceChanged
from imgfs.extents import ExtentList
from imgfs.image import Buffer
from imgfs.overlays.layer import Layer
from imgfs.views.layer_errors import translated
from imgfs.views.sharing import MOST_LAYERS
from imgfs.views.view import Origin, View


class _Views:
    """All views of the class below that somebody can still read.

    One that nobody can reach any more may be among them for a while, until Python has collected it:
    its layers are merged later then.  One that can be reached is, whatever the collector does.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()  # each thread may have its own loop, and views in it
        self._known: list[ref[OverlayView]] = []
        self._enough = 64

    def add(self, view: OverlayView) -> None:
        with self._guard:
            self._known.append(ref(view))
            if len(self._known) > self._enough:
                self._known = [each for each in self._known if each() is not None]
                self._enough = 64 + 2 * len(self._known)

    def all(self) -> list[OverlayView]:
        with self._guard:
            found = [each() for each in self._known]
        return [view for view in found if view is not None]


_views = _Views()


def layers_in_use() -> list[set[str]]:
    """The names of the layers of each disk that there is in this process."""
    return [{layer.path.name for layer in view.layers} for view in _views.all()]


class OverlayView(View):
    """`layers` from the top down over `below`, which may be shorter or longer than this disk.

    Its map says of every byte where it is once it is prepared; where `below` must be asked for it
    the map says ASK, or names a block of the cache that is absent.
    """

    def __init__(
        self, name: str, size: int, layers: Sequence[Layer], below: View, mode: int = 0o400
    ) -> None:
        super().__init__(name, size, below.mtime_ns, mode)
        if layers:
            self.mtime_ns, self.ctime_ns = layers[0].times()
        self.layers = list(layers)
        self.below = below
        self.map = _map.SegmentMap(size)
        self._preparing = trio.Lock()
        self._is_prepared = False
        below.when_stale(self.mark_stale)
        _views.add(self)

    async def prepare(self) -> None:
        async with self._preparing:
            if not self._is_prepared:
                self.refuse_stale()
                await self.below.prepare()
                await trio.to_thread.run_sync(self._publish)
                self.refuse_stale()
                self.stored_bytes = await trio.to_thread.run_sync(self.map.data_bytes)
                self._is_prepared = True

    def made_of(self) -> Sequence[View]:
        return [self.below]

    @property
    def is_nameless(self) -> bool:
        return self.below.is_nameless

    def layered(self) -> _map.SegmentMap:
        """What is in the layers: STORE or ZERO; the rest is ASK."""
        found = _map.SegmentMap(self.size)
        self._fill(found)
        return found

    def _fill(self, into: _map.SegmentMap) -> None:
        for layer in self.layers:
            into.fill(*layer.ranges(), layer.store)

    def _publish(self) -> None:
        self._fill(self.map)
        step, at = 1 << 30, 0
        while at < self.size:
            end = min(at + step, self.size)
            for start, to, kind, _ in self.map.segments(at, end - at):
                shared = min(to, self.below.size)
                if kind == _map.ASK and start < shared:
                    self.map.copy(start, self.below.map, start, shared - start)
                if kind == _map.ASK and shared < to:
                    self.map.set_zero(max(start, shared), to)
            at = end

    async def trace(self, offset: int, length: int) -> list[Origin]:
        await self.prepare()
        self.refuse_stale()
        return await trio.to_thread.run_sync(self._trace, offset, length)

    def _trace(self, offset: int, length: int) -> list[Origin]:
        if len(self.layers) > MOST_LAYERS:
            return [Origin(offset, offset + length, self, offset)]
        stores = [layer.store for layer in self.layers]
        origins: list[View | str | None] = [self._origin(layer) for layer in self.layers]
        origins += [None, self.below]  # ZEROES is -2, and OTHER -1
        return [
            Origin(start, end, origins[whose], start)
            for start, end, whose in self.map.origins(offset, length, stores)
        ]

    def _origin(self, layer: Layer) -> View | str:
        return layer.path.name

    async def _check(self) -> None:
        await self.below.check()

    async def _extents(self, offset: int, length: int) -> ExtentList:
        """As the layers and the base's own extents say, and not what was found out by reading."""
        shared = min(self.size, self.below.size)
        below = await self.below.extents(0, shared)
        marked = await trio.to_thread.run_sync(self._marked, below)
        ends, flags = marked.extents(offset, length)
        return ExtentList(offset, ends, flags)

    def _marked(self, below: ExtentList) -> _map.SegmentMap:
        """A map in which what is zero is ZERO."""
        marked = self.layered()
        for start, end in below.hole_ranges(0, below.end):
            marked.fill_zero(start, end)
        if below.end < self.size:
            marked.fill_zero(below.end, self.size)
        return marked

    async def _read(self, offset: int, length: int) -> Buffer:
        self.refuse_stale()
        await self.prepare()
        local = await self._local(offset, length)
        if local is not None:
            return local
        found = bytearray()
        for start, end, _, _ in self.map.segments(offset, length):
            part: Buffer | None = await self._local(start, end - start)
            if part is None:
                try:
                    part = await self.below.read(start, end - start)
                except SourceChanged as exc:
                    self.mark_stale(exc)
                    raise
            found += part
        return found

    async def _local(self, offset: int, length: int) -> Buffer | None:
        try:
            return await trio.to_thread.run_sync(
                self.map.read, offset, length, abandon_on_cancel=True
            )
        except OSError:
            stores = [layer.store for layer in self.layers]
            if any(whose < 0 for _, _, whose in self.map.origins(offset, length, stores)):
                return None  # not all of it is ours: what is below is asked, and says why
            with translated(self.name, self.layers[0].path.parent if self.layers else None):
                raise
        except ValueError:
            raise OutOfRange(f"{self.name}: was cut while it was read") from None

    async def aclose(self) -> None:
        for layer in self.layers:
            await trio.to_thread.run_sync(layer.close)
