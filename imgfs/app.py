"""The only wiring: sources to views to the tree, and the order of start and shutdown."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from imgfs.cache.cached import CachedImage, open_cached
from imgfs.cache.directory import default_limit, make_root, sweep
from imgfs.cache.space import CacheSpace
from imgfs.config import Options
from imgfs.errors import CacheError, UsageError, sole
from imgfs.sources.base import Source
from imgfs.sources.file import open_file
from imgfs.sources.listing import Listed, Listing, LocalListing
from imgfs.stop import Stop
from imgfs.tree.image import ImageNodes
from imgfs.tree.images import ListedImages
from imgfs.tree.names import image_name
from imgfs.tree.nodes import Tree
from imgfs.url import ObjectUrl, parse
from imgfs.url_nbd import NbdCommand, NbdUrl

if TYPE_CHECKING:
    from imgfs.sources.bridge import Bridge
    from imgfs.sources.ssh import SshHosts

log = logging.getLogger(__name__)

CHECK_S = 5.0


class Sources:
    """Opens what a person names; one ssh connection a host for all of a process.

    `nursery` is for tasks that live as long as a source; it is cancelled before `aclose`, or after.
    """

    def __init__(self, options: Options, nursery: trio.Nursery) -> None:
        self._options = options
        self._nursery = nursery
        # A mount leaves it, but a command's words may be relative to it.
        self._directory = Path.cwd()
        self._bridge: Bridge | None = None
        self._hosts: SshHosts | None = None

    async def open(self, text: str) -> Source:
        """An open source.  Raises UsageError and what opening raises."""
        where = parse(text)
        if isinstance(where, str):
            return await open_file(where, extents=self._options.extents)
        if isinstance(where, ObjectUrl):
            from imgfs.sources.objects import open_object

            return await open_object(where, self._options.objects(), self._asyncio())
        if isinstance(where, NbdUrl | NbdCommand):
            from imgfs.sources.nbd import open_command, open_nbd

            settings = self._options.nbd()
            if isinstance(where, NbdUrl):
                return await open_nbd(where, settings, self._nursery)
            return await open_command(where, self._directory, settings, self._nursery)
        return await self._ssh().open(where, self._options.ssh())

    async def listing(self, text: str) -> Listing | None:
        """The directory that this names, or None when it names an image.  Raises UsageError."""
        where = parse(text)
        if isinstance(where, str):
            return LocalListing(where) if where.endswith("/") else None
        if isinstance(where, NbdUrl | NbdCommand) or not where.is_directory:
            return None
        if isinstance(where, ObjectUrl):
            from imgfs.sources.objects_listing import ObjectListing

            return ObjectListing(where, self._options.objects(), self._asyncio())
        return await self._ssh().list(where, self._options.ssh())

    async def aclose(self) -> None:
        if self._hosts is not None:
            await self._hosts.aclose()
        if self._bridge is not None:
            await self._bridge.aclose()

    # A local file must not pay for asyncio, asyncssh, libnbd or obstore.

    def _asyncio(self) -> Bridge:
        if self._bridge is None:
            from imgfs.sources.bridge import Bridge

            self._bridge = Bridge()
        return self._bridge

    def _ssh(self) -> SshHosts:
        if self._hosts is None:
            from imgfs.sources.ssh import SshHosts

            self._hosts = SshHosts(self._asyncio())
        return self._hosts


@asynccontextmanager
async def open_source(text: str, options: Options) -> AsyncIterator[Source]:
    """The source that a person named, for as long as the block runs."""
    try:
        async with trio.open_nursery() as nursery:
            sources = Sources(options, nursery)
            source: Source | None = None
            try:
                source = await sources.open(text)
                yield source
            finally:
                with trio.CancelScope(shield=True):
                    if source is not None:
                        await source.aclose()
                    await sources.aclose()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise sole(group) from None


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


class Mount:
    """The tree of a mount, and the images in it."""

    def __init__(self, text: str, sources: Sources, caches: Caches, nursery: trio.Nursery) -> None:
        self._sources = sources
        self._caches = caches
        self._nursery = nursery
        self.tree = Tree()
        self._root = self.tree.add(None, b"", children={})
        about = self.tree.add(self._root, b".imgfs", children={})
        self.tree.add(about, b"status.json", make=self._status)
        # Absolute, because the process leaves its directory.
        where = parse(text)
        self._text = _absolute(where) if isinstance(where, str) else text
        self.url = self._text if isinstance(where, str) else where.text  #: shown to people
        if isinstance(where, NbdCommand):
            self.url = where.name  # its arguments may hold secrets
        self._image: ImageNodes | None = None
        self._listed: ListedImages | None = None

    async def open(self, *, lazy: bool) -> None:
        """Show what there is.  Unless lazy, what a person named is open then, or listed.

        Raises UsageError and what opening raises.
        """
        listing = await self._sources.listing(self._text)
        if listing is not None:
            self.url = listing.url
            self._listed = ListedImages(self.tree, self._root, listing, self._make_image)
            if not lazy:
                await self._listed.refresh()
            return
        where = parse(self._text)
        file_name = Path(where).name if isinstance(where, str) else where.basename
        file = Listed(file_name, self._text, 0)
        self._image = self._make_image(image_name(file_name), file, self.url)
        self._image.add_to(self.tree, self._root)
        if not lazy:
            await self._image.opened()

    def _make_image(self, name: str, file: Listed, shown: str | None = None) -> ImageNodes:
        async def open_source() -> Source:
            return await self._sources.open(file.url)

        async def open_cache(source: Source) -> CachedImage:
            cached: CachedImage = await self._nursery.start(self._caches.hold, source)
            return cached

        url = shown or file.url
        return ImageNodes(name, file.name, url, open_source, open_cache, self._invalidate)

    def _invalidate(self, inode: int) -> None:
        import pyfuse3

        async def drop() -> None:
            with contextlib.suppress(OSError):  # the kernel has forgotten it already
                # It may block on the kernel's page lock: never on the loop's own thread.
                await trio.to_thread.run_sync(
                    pyfuse3.invalidate_inode, inode, abandon_on_cancel=True
                )

        self._nursery.start_soon(drop)

    def _images(self) -> Iterable[ImageNodes]:
        if self._listed is not None:
            return self._listed
        return [self._image] if self._image is not None else []

    async def watch(self) -> None:
        """While a view is being read, check every 5 s that its source is the same."""
        while True:
            await trio.sleep(CHECK_S)
            async with trio.open_nursery() as nursery:  # a dead source delays no other's check
                for image in self._images():
                    if image.is_read():
                        nursery.start_soon(image.check)

    async def aclose(self) -> None:
        for image in self._images():
            await image.aclose()

    async def _status(self) -> bytes:
        from imgfs.fuse.boundary import native

        images = {image.name: image.status() for image in self._images()}
        status = {"pid": os.getpid(), "source": self.url, "images": images}
        status |= {"cache": self._caches.status(), "fast_path": dict(native.status())}
        return (json.dumps(status, indent=2) + "\n").encode()


def _absolute(path: str) -> str:
    """With the / that says that a directory is meant."""
    return str(Path(path).absolute()) + ("/" if path.endswith("/") else "")


async def run_mount(
    text: str, mountpoint: str, options: Options, stop: Stop, ready: Callable[[], None]
) -> None:
    """Mount the source and serve it until the end; `ready` is called once INIT is answered.

    Raises what opening and mounting raise, and MountError when it ends before it was ready.
    """
    from imgfs.fuse import session
    from imgfs.fuse.operations import Operations

    _allow_many_files()
    was_ready = False
    async with trio.open_nursery() as nursery:
        sources = Sources(options, nursery)
        mount = Mount(text, sources, Caches(options), nursery)
        try:
            _refuse_inside(text, mountpoint)
            await stop.unless(partial(mount.open, lazy=options.lazy))
            answered = trio.Event()

            async def background() -> None:
                nonlocal was_ready
                await answered.wait()
                await trio.to_thread.run_sync(session.raise_read_ahead, mountpoint)
                if stop.asked.is_set():
                    return
                ready()
                was_ready = True
                await mount.watch()

            operations = Operations(mount.tree, options, answered.set)
            session.mount(operations, mountpoint, mount.url, options)
            await session.serve(operations, mountpoint, background, stop)
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await mount.aclose()
                await sources.aclose()
    if not was_ready:
        raise stop.error()


def _allow_many_files() -> None:
    """An open image takes five file descriptors, and the usual limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _refuse_inside(text: str, mountpoint: str) -> None:
    where = parse(text)
    if isinstance(where, str):
        real, top = os.path.realpath(where), os.path.realpath(mountpoint)
        if os.path.commonpath([real, top]) == top:
            raise UsageError(f"{where}: lies under the mount point {mountpoint}")
