"""The only wiring: sources to views to the tree, and the order of start and shutdown."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from imgfs import mapjson
from imgfs.cache.cached import CachedImage, open_cached
from imgfs.cache.directory import default_limit, make_root, sweep
from imgfs.cache.space import CacheSpace
from imgfs.config import Options
from imgfs.errors import CacheError, ImgfsError, SourceChanged, UsageError
from imgfs.sources.base import Source
from imgfs.sources.file import FileSource, open_file
from imgfs.stop import Stop
from imgfs.tree.nodes import Node, Tree, encode, image_name
from imgfs.url import parse
from imgfs.views.raw import RawView

if TYPE_CHECKING:
    from imgfs.sources.ssh import SshHosts

log = logging.getLogger(__name__)

CHECK_S = 5.0


class Sources:
    """Opens what a person names; one ssh connection a host for all of a process."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._hosts: SshHosts | None = None

    async def open(self, text: str) -> Source:
        """An open source.  Raises UsageError and what opening raises."""
        where = parse(text)
        if isinstance(where, str):
            return await open_file(where, extents=self._options.extents)
        if self._hosts is None:
            # A local file must not pay for asyncssh.
            from imgfs.sources.ssh import SshHosts

            self._hosts = SshHosts()
        return await self._hosts.open(where, self._options.ssh())

    async def aclose(self) -> None:
        if self._hosts is not None:
            await self._hosts.aclose()


@asynccontextmanager
async def open_source(text: str, options: Options) -> AsyncIterator[Source]:
    """The source that a person named, for as long as the block runs."""
    sources = Sources(options)
    try:
        source = await sources.open(text)
        yield source
        await source.aclose()
    finally:
        with trio.CancelScope(shield=True):
            await sources.aclose()


class Caches:
    """What the images of a mount share: the cache's place on disk, and its limit."""

    def __init__(self, options: Options) -> None:
        self._limit = options.cache_size
        self._root: Path | None = None
        self._space: CacheSpace | None = None
        self._making = trio.Lock()

    async def hold(
        self, source: Source, task_status: trio.TaskStatus[CachedImage] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep a cache for the source until that is another.  Raises nothing."""
        space = await self._made()
        async with open_cached(source, space, self._root) as image:
            task_status.started(image)
            await image.became_stale.wait()

    async def _made(self) -> CacheSpace:
        async with self._making:
            if self._space is None:
                limit = self._limit
                try:
                    self._root = make_root()
                    await trio.to_thread.run_sync(sweep, self._root)
                    if limit is None:
                        limit = default_limit(self._root)
                except CacheError as exc:
                    log.warning("%s; reading without it", exc)
                self._space = CacheSpace(limit or 0, self._root)
                await self._space.count_idle()
            return self._space

    def status(self) -> dict[str, int]:
        """Bytes."""
        space = self._space or CacheSpace(0)
        return {"limit": space.limit, "used": space.used}


class Mounted:
    """One image and the tree that shows it, through every generation of its source."""

    def __init__(self, text: str, sources: Sources, caches: Caches, nursery: trio.Nursery) -> None:
        where = parse(text)
        # Absolute, because the process leaves its directory.
        self.url = str(Path(where).absolute()) if isinstance(where, str) else where.text
        self._name = Path(where).name if isinstance(where, str) else where.basename
        self._view: RawView | None = None
        self._cache: CachedImage | None = None
        self._sources = sources
        self._caches = caches
        self._nursery = nursery
        self._opened: list[Source] = []
        self._reopening = trio.Lock()
        self.tree = Tree()
        self._root = self.tree.add(None, b"", children={})
        self._original = self.tree.add(self._root, b"original", children={})
        about = self.tree.add(self._root, b".imgfs", children={})
        self.tree.add(about, b"status.json", make=self._status)
        self.tree.add(self._root, b"extents.json", make=self._extents)

    async def open(self) -> Source:
        """Open the source and show it.  Raises what opening raises."""
        source = await self._sources.open(self.url)
        self._opened.append(source)
        if self._cache is not None:
            await self._cache.closed.wait()  # it was stale, and has the directory still
        cache = None
        if not isinstance(source, FileSource):
            cache = await self._nursery.start(self._caches.hold, source)
        self._cache = cache
        self._view = self._show(source, cache)
        return source

    def _show(self, source: Source, cache: CachedImage | None) -> RawView:
        view = RawView(source, cache)
        for parent, name in self._names():
            node = (parent.children or {}).get(name)
            if node is not None and node.prepare is not None:
                node.view, node.prepare = view, None
            else:
                self.tree.add(parent, name, view=view)
        return view

    def _names(self) -> list[tuple[Node, bytes]]:
        raw = encode(image_name(self._name) + ".raw")
        return [(self._root, raw), (self._original, encode(self._name))]

    def show_unopened(self) -> None:
        """Show the names; the source is opened when one of them is first looked at."""
        for parent, name in self._names():
            self.tree.add(parent, name, prepare=self._ready_view)

    async def _ready_view(self) -> RawView:
        """The view; opens the source if that is still to do.  Raises what opening raises."""
        async with self._reopening:
            if self._view is None:
                await self.open()
        assert self._view is not None
        return self._view

    async def changed(self, node: Node) -> None:
        """The node's view is stale: put the source as it is now under the names."""
        async with self._reopening:
            if node.view is self._view:
                await self.open()

    async def watch(self) -> None:
        """While a view is being read, check every 5 s that its source is the same."""
        while True:
            await trio.sleep(CHECK_S)
            view = self._view
            if view is not None and view.was_read() and view.stale is None:
                await self._check(view)

    async def _check(self, view: RawView) -> None:
        import pyfuse3

        try:
            await view.check()
        except SourceChanged:
            inodes = [n.inode for n in self.tree.nodes.values() if n.view is view]
            for inode in inodes:
                # It may block on the kernel's page lock: never on the loop's own thread.
                await trio.to_thread.run_sync(pyfuse3.invalidate_inode, inode)
        except ImgfsError:
            return  # not found out; a source that cannot be reached is not a changed one

    async def aclose(self) -> None:
        for source in self._opened:
            await source.aclose()

    async def _extents(self) -> bytes:
        view = await self._ready_view()
        extents = await view.extents(0, view.size)
        return "".join(mapjson.lines(extents)).encode()

    async def _status(self) -> bytes:
        from imgfs.fuse.boundary import native

        image: dict[str, object] = {"source": self.url, "state": "not opened yet"}
        if self._view is not None:
            image |= self._figures(self._view)
        status = {"pid": os.getpid(), "images": {self._name: image}}
        status |= {"cache": self._caches.status(), "fast_path": dict(native.status())}
        return (json.dumps(status, indent=2) + "\n").encode()

    @staticmethod
    def _figures(view: RawView) -> dict[str, object]:
        return {
            "state": "stale" if view.stale else "open",
            "identity": view.source.stat.identity and view.source.stat.identity.token,
            "size": view.size,
            "stored": view.stored_bytes,
            "bytes_native": view.map.bytes_served,
            "bytes_python": view.counters.bytes_read,
            "bytes_fetched": view.source.counters.bytes_read,
            "in_flight": view.counters.in_flight,
            "errors": view.counters.errors,
            "last_error": view.counters.last_error,
        }


async def run_mount(
    text: str, mountpoint: str, options: Options, stop: Stop, ready: Callable[[], None]
) -> None:
    """Mount the source and serve it until the end; `ready` is called once INIT is answered.

    Raises what opening and mounting raise, and MountError when it ends before it was ready.
    """
    from imgfs.fuse import session
    from imgfs.fuse.operations import Operations

    sources = Sources(options)
    was_ready = False
    async with trio.open_nursery() as nursery:
        image = Mounted(text, sources, Caches(options), nursery)
        try:
            _refuse_inside(text, mountpoint)
            if options.lazy:
                image.show_unopened()
            else:
                await stop.unless(image.open)
            answered = trio.Event()

            async def background() -> None:
                nonlocal was_ready
                await answered.wait()
                await trio.to_thread.run_sync(session.raise_read_ahead, mountpoint)
                if stop.asked.is_set():
                    return
                ready()
                was_ready = True
                await image.watch()

            operations = Operations(image.tree, options, image.changed, answered.set)
            session.mount(operations, mountpoint, image.url, options)
            await session.serve(operations, mountpoint, background, stop)
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await image.aclose()
                await sources.aclose()
    if not was_ready:
        raise stop.error()


def _refuse_inside(text: str, mountpoint: str) -> None:
    where = parse(text)
    if isinstance(where, str):
        real, top = os.path.realpath(where), os.path.realpath(mountpoint)
        if os.path.commonpath([real, top]) == top:
            raise UsageError(f"{where}: lies under the mount point {mountpoint}")
