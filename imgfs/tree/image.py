"""One image of a mount: its names, and its views through every generation of its source."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import trio

from imgfs import mapjson
from imgfs.cache.cached import CachedImage
from imgfs.errors import ImgfsError, SourceUnreachable
from imgfs.sources.base import Source
from imgfs.sources.file import FileSource
from imgfs.status import ImageStatus, State
from imgfs.tree.names import encode
from imgfs.tree.nodes import Node, Tree
from imgfs.views.raw import RawView

OpenSource = Callable[[], Awaitable[Source]]
OpenCache = Callable[[Source], Awaitable[CachedImage]]
Invalidate = Callable[[int], None]


class ImageNodes:
    """What stands in an image's directory.

    `url` is shown, and holds no secret.  `invalidate` sees to it that what the kernel has cached of
    an inode is dropped, and does not wait for that.
    """

    def __init__(
        self,
        name: str,
        file_name: str,
        url: str,
        open_source: OpenSource,
        open_cache: OpenCache,
        invalidate: Invalidate,
    ) -> None:
        self.name = name
        self.file_name = file_name
        self.url = url
        self._open_source = open_source
        self._open_cache = open_cache
        self._invalidate = invalidate
        self._view: RawView | None = None
        self._cache: CachedImage | None = None
        self._source: Source | None = None
        self._stale: list[Source] = []
        self._nodes: list[tuple[Tree, Node, bytes]] = []
        self._opening = trio.Lock()
        self._failed = ""

    def add_to(self, tree: Tree, directory: Node) -> None:
        """Put the names there; nothing is opened before one of them is looked at."""
        original = tree.add(directory, b"original", children={})
        self._place(tree, directory, encode(self.name + ".raw"))
        self._place(tree, original, encode(self.file_name))
        tree.add(directory, b"extents.json", make=self._extents)

    def add_original(self, tree: Tree, directory: Node) -> None:
        """Put the source's bytes as stored there, under the file's own name."""
        self._place(tree, directory, encode(self.file_name))

    def _place(self, tree: Tree, directory: Node, name: bytes) -> None:
        self._nodes.append((tree, directory, name))
        self._show(tree, directory, name)

    def _show(self, tree: Tree, directory: Node, name: bytes) -> None:
        """A node for the view, or for one that is to come; one that waits for it gets it."""
        there = (directory.children or {}).get(name)
        if self._view is None:
            tree.add(directory, name, prepare=self.opened, changed=self._changed)
        elif there is not None and there.view is None and there.prepare is not None:
            there.view, there.prepare = self._view, None
        else:
            tree.add(directory, name, view=self._view, changed=self._changed)

    async def opened(self) -> RawView:
        """The view; opens the source if that is still to do.  Raises what opening raises."""
        async with self._opening:
            if self._view is None:
                await self._open()
        assert self._view is not None
        return self._view

    async def _open(self) -> None:
        try:
            source = await self._open_source()
        except ImgfsError as exc:
            self._failed = str(exc)
            raise
        self._failed = ""
        if self._source is not None:
            self._stale.append(self._source)
        self._source = source
        if self._cache is not None:
            await self._cache.closed.wait()  # it was stale, and has the directory still
            self._cache = None
        if not isinstance(source, FileSource):
            self._cache = await self._open_cache(source)
        view = self._view = RawView(source, self._cache)
        view.when_stale(lambda _: self._drop_kernel_cache(view))
        for place in self._nodes:
            self._show(*place)

    async def _changed(self, node: Node) -> None:
        """The node's view is stale: put the source as it is now under the names."""
        async with self._opening:
            if node.view is self._view:
                await self._open()

    def is_read(self) -> bool:
        """Has anything been read since this was asked last?"""
        view = self._view
        return view is not None and view.stale is None and view.was_read()

    async def check(self) -> None:
        """Find out whether the source is still the same, and let the kernel know if it is not."""
        view = self._view
        assert view is not None
        with contextlib.suppress(ImgfsError):  # one that cannot be reached is not a changed one
            await view.check()

    def _drop_kernel_cache(self, view: RawView) -> None:
        for tree, _, _ in self._nodes[:1]:
            for node in tree.nodes.values():
                if node.view is view:
                    self._invalidate(node.inode)

    async def aclose(self) -> None:
        for source in (*self._stale, *([self._source] if self._source else ())):
            await source.aclose()

    async def _extents(self) -> bytes:
        view = await self.opened()
        extents = await view.extents(0, view.size)
        return "".join(mapjson.lines(extents)).encode()

    def status(self) -> ImageStatus:
        """For status.json; sizes are bytes."""
        view = self._view
        if view is None:
            unopened: State = "failed" if self._failed else "not opened yet"
            return {"source": self.url, "state": unopened, "last_error": self._failed}
        source, identity = view.source, view.source.stat.identity
        unreachable = isinstance(source.counters.failure, SourceUnreachable)
        misses = view.misses  # before `reads`: none may be missing there
        reads = view.reads
        return {
            "source": self.url,
            "state": "stale" if view.stale else "unreachable" if unreachable else "open",
            "identity": None if identity is None else identity.token,
            "size": view.size,
            "stored": view.stored_bytes,
            "bytes_native": view.map.bytes_served,
            "bytes_python": view.counters.bytes_read,
            "bytes_fetched": source.counters.bytes_read,
            "reads": reads,
            "hits": reads - misses,
            "misses": misses,
            "in_flight": view.counters.in_flight,
            "fetching": source.counters.in_flight,
            "window": self._cache.window if self._cache is not None else 0,
            "cached": self._cache.cached_bytes if self._cache is not None else 0,
            "errors": view.counters.errors,
            "last_error": view.counters.last_error or source.counters.last_error,
        }
