"""The only wiring: sources to views to the tree, and the order of start and shutdown."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import trio

from imgfs import threads
from imgfs._native import _heap
from imgfs.budget import shared
from imgfs.cache.cached import CachedImage, Policy
from imgfs.config.options import Options
from imgfs.daemon.holding import Holding
from imgfs.daemon.outcome import Outcome
from imgfs.daemon.stop import Stop
from imgfs.errors import CorruptImage, MountError, UnsupportedFeature, UsageError
from imgfs.opener.caches import Caches
from imgfs.opener.sources import Sources
from imgfs.opener.stored import StoredViews, Wanted
from imgfs.sources.base import Source, WritableSource
from imgfs.sources.listing import Listed
from imgfs.sources.local.file import FileSource
from imgfs.status.durable import SyncStatus, Unsaved, when_lost
from imgfs.status.fields import FastPathStatus, ImageStatus, MountStatus
from imgfs.tree.idle import LookedAt
from imgfs.tree.image import ImageNodes
from imgfs.tree.images import ImagesNodes, ListedImages
from imgfs.tree.names import image_name
from imgfs.tree.nodes import Tree
from imgfs.tree.snapshots import Snapshots
from imgfs.url.shown import absolute, shown_url
from imgfs.url.source import parse
from imgfs.views.opening import Chain
from imgfs.views.raw import RawView
from imgfs.views.through import StoredView, ThroughView
from imgfs.views.view import View

if TYPE_CHECKING:
    from imgfs.config import file as configfile

log = logging.getLogger(__name__)

CHECK_S = 5.0
CLOSE_S = 2.0  # how often it is asked whether a file without a name is still open
MERGE_S = 2.0  # how often it is asked whether there are layers to merge
TRIM_S = 30.0  # how often memory that nobody needs is given back
ARENAS = 2  # of the C library's memory, for a dozen threads that mostly wait


class Mount:
    """The tree of a mount, and the images in it."""

    def __init__(
        self,
        text: str,
        options: Options,
        sources: Sources,
        nursery: trio.Nursery,
        outcome: Outcome,
        holding: Holding,
    ) -> None:
        self._options = options
        self._outcome = outcome
        self._holding = holding
        self._sources = sources
        self._caches = Caches(options)
        self._nursery = nursery
        self._stored = StoredViews(
            self._open_source,
            sources.open_by_qemu,
            self._open_cache,
            self._make_view,
            nursery.start_soon,
        )
        self._looked_at = LookedAt(self._stored.close_unused)
        self._is_open = False
        self.tree = Tree()
        self._root = self.tree.add(None, b"", children={})
        about = self.tree.add(self._root, b".imgfs", children={})
        self.tree.add(about, b"status.json", make=self._status)
        self.tree.add(about, b"metrics", make=self._metrics)
        self.tree.add(about, b"sync.json", make=self._sync)
        # Absolute, because the process leaves its directory.
        where = parse(text)
        self._text = absolute(where) if isinstance(where, str) else text
        self.url = self._text if isinstance(where, str) else shown_url(where)  #: to people
        self._images: Iterable[ImageNodes] = ()
        #: reads a TOML file again; None where there is none
        self.reload: Callable[[], Awaitable[None]] | None = None
        self._not_reloaded = ""  # why, as long as the file has a mistake

    async def open(self, *, lazy: bool) -> None:
        """Show what there is.  Unless lazy, what a person named is open then, or listed.

        Raises UsageError and what opening raises.
        """
        await self._show(lazy=lazy)
        self._is_open = True

    async def _show(self, *, lazy: bool) -> None:
        where = parse(self._text)
        if isinstance(where, str) and where.endswith(".toml"):
            await self._open_file()
            return
        listing = await self._sources.listing(self._text)
        if listing is not None:
            self.url = listing.url
            listed = ListedImages(
                self.tree,
                self._root,
                listing,
                self._listed_image,
                _forget_name,
                self._looked_at,
                self._stored,
                write=self._options.write_through,
            )
            self._images = listed
            if not lazy:
                await listed.refresh()
            return
        name = Path(where).name if isinstance(where, str) else where.basename
        image = self._make_image(image_name(name), name, self.url, self._text, self._options)
        self._images = [image]
        image.add_to(self._root)
        if not lazy:
            await image.opened()
            try:
                await image.opened_disk()
            except (CorruptImage, UnsupportedFeature) as exc:
                if self._options.tells_of_disk:
                    raise  # what is wrong was said here and now
                log.warning("%s; only original/ can be read", exc)

    async def _open_file(self) -> None:
        # msgspec is for whom there is such a file.
        from imgfs.config import file as configfile

        async def reload() -> None:
            config = await trio.to_thread.run_sync(configfile.load, self._text)
            for line in config.warnings:
                log.warning("%s", line)
            images.set(config.images)

        def make(name: str, image: configfile.ImageSettings) -> ImageNodes:
            return self._configured_image(name, image, Path(self._text).parent)

        images = ImagesNodes(self.tree, self._root, make, _forget_name, self._looked_at)
        self._images = images
        await reload()
        self.reload = reload

    def _configured_image(
        self, name: str, image: configfile.ImageSettings, directory: Path
    ) -> ImageNodes:
        options, text = image.options(self._options), image.text
        where = parse(text)
        ahead = image.readahead if (image.readahead or 0) >= 0 else None
        file_name = Path(where).name if isinstance(where, str) else where.basename
        shown = where if isinstance(where, str) else shown_url(where)
        policy = Policy(image.cache_size, ahead, options.hard, options.prefetch)
        return self._make_image(name, file_name, shown, text, options, policy, directory)

    def _listed_image(self, name: str, file: Listed) -> ImageNodes:
        return self._make_image(name, file.name, file.url, file.url, self._options)

    def _make_image(
        self,
        name: str,
        file_name: str,
        shown: str,
        text: str,
        options: Options,
        policy: Policy | None = None,
        directory: Path | None = None,
    ) -> ImageNodes:
        policy = policy or Policy(hard=options.hard, prefetch=options.prefetch)

        wanted = Wanted(text, options, policy, directory)
        pinned = options.format

        async def open_stored() -> StoredView:
            return await self._stored.get(wanted)

        async def open_disk(stored: StoredView) -> Chain:
            # Once probed it stays: or else a raw guest could write itself another format's header.
            nonlocal pinned
            chain = await self._stored.chain(name, stored, pinned)
            pinned = chain.formats[0]
            return chain

        def waits() -> bool:
            # A mistake must show at once in the command that mounts.
            return options.hard and self._is_open

        return ImageNodes(
            self.tree,
            name,
            file_name,
            shown,
            open_stored,
            open_disk,
            waits,
            self._invalidate,
            read_only=options.read_only,
        )

    async def _open_source(self, wanted: Wanted) -> Source:
        return await self._sources.open(wanted.text, wanted.options, wanted.directory)

    async def _open_cache(self, source: Source, policy: Policy) -> CachedImage:
        cached: CachedImage = await self._nursery.start(self._caches.hold, source, policy)
        return cached

    def _make_view(self, source: Source, cache: CachedImage | None, policy: Policy) -> StoredView:
        if not isinstance(source, WritableSource) or not source.is_writable:
            return RawView(source, cache)
        again = None if cache is None else partial(self._open_cache, policy=policy)
        view = ThroughView(source, cache, again, self._nursery, hard=policy.hard)
        if isinstance(source, FileSource):
            # Its name may lead elsewhere by the time that it is written again.
            source.is_needed = lambda: view.writers > 0
        return view

    def _invalidate(self, inode: int) -> None:
        import pyfuse3

        async def drop() -> None:
            with contextlib.suppress(OSError):  # the kernel has forgotten it already
                # It may block on the kernel's page lock: never on the loop's own thread.
                await trio.to_thread.run_sync(
                    pyfuse3.invalidate_inode, inode, abandon_on_cancel=True
                )

        self._nursery.start_soon(drop)

    async def watch(self) -> None:
        """While a view is being read, check every 5 s that its source is the same."""
        while True:
            await trio.sleep(CHECK_S)
            async with trio.open_nursery() as nursery:  # a dead source delays no other's check
                for image in self._images:
                    if image.is_read():
                        nursery.start_soon(image.check)

    async def close_nameless(self) -> None:
        """Close files that were removed while they were open, and are open no more."""
        while True:
            await trio.sleep(CLOSE_S)
            if not self._stored.has_nameless:
                continue
            snapshots = [view for image in self._images for view in image.snapshots.views()]
            used: set[View] = set()
            left: list[View] = [*self.tree.views(), *snapshots]
            while left:
                view = left.pop()
                if view not in used:
                    used.add(view)
                    left += view.made_of()
            await self._stored.close_nameless(used)

    async def close_idle(self) -> None:
        """Of many images, close those that were not used for longest."""
        await self._looked_at.run()

    async def merge_layers(self) -> None:
        """Keep what snapshots stand on short, and without what nobody needs."""
        while True:
            await trio.sleep(MERGE_S)
            for snapshots in self._snapshots():
                await snapshots.check_place()
                await snapshots.merge()
                await snapshots.seal()

    def _snapshots(self) -> list[Snapshots]:
        """Of all images that somebody has looked at."""
        used = [image.used_snapshots for image in self._images]
        return [each for each in used if each is not None]

    async def trim_memory(self) -> None:
        while True:
            await trio.sleep(TRIM_S)
            await trio.to_thread.run_sync(_heap.trim)

    async def reload_when(self, asked: trio.MemoryReceiveChannel[None]) -> None:
        """Read the TOML file again each time; one with a mistake changes nothing."""
        async for _ in asked:
            assert self.reload is not None
            try:
                await self.reload()
                self._not_reloaded = ""
                log.info("%s: was read again", self.url)
            except UsageError as exc:
                # Who has no syslog finds it in the status.
                self._not_reloaded = f"{exc}; not reloaded"
                log.error("%s; the mount stays as it is", exc)

    async def make_durable(self) -> list[Unsaved]:
        """Make durable what was written to snapshots; returns what is not."""
        unsaved: list[Unsaved] = []
        for snapshots in self._snapshots():
            unsaved += await snapshots.make_durable()
        return unsaved

    async def finish(self) -> None:
        """See that all that was written to the sources is durable; raises the first error, and logs
        each."""
        await self._stored.finish()

    async def aclose(self) -> None:
        """Make durable what was written, and close all.  Before this the sources must be there.

        Raises MountError that says what is lost.
        """
        lost: list[Unsaved] = []
        for snapshots in self._snapshots():
            lost += await snapshots.aclose()
        await self._stored.aclose()
        if lost:
            raise MountError(when_lost(lost))

    def _told(self) -> MountStatus:
        from imgfs.fuse.boundary import native

        budget = shared()
        images: dict[str, ImageStatus] = {}
        for image in self._images:
            # One that is gone comes last, and its name may be another's by now.
            if image.name not in images and (not image.is_gone or image.is_still_open()):
                images[image.name] = image.status()
        told: MountStatus = {
            "pid": os.getpid(),
            "source": self.url,
            "images": images,
            "cache": self._caches.status(),
            "fast_path": cast(FastPathStatus, native.status()),
            "memory": {
                "limit": budget.limit,
                "used": budget.used,
                "peak": budget.peak,
                "waiting": budget.waiting,
            },
        }
        if said := "; ".join(filter(None, (self._holding.line, self._not_reloaded))):
            told["last_error"] = said
        return told

    async def _sync(self) -> bytes:
        told: SyncStatus = {
            "pid": os.getpid(),
            "outcome": self._outcome.path,
            "unsaved": [*await self.make_durable(), *await self._stored.sync()],
        }
        return (json.dumps(told) + "\n").encode()

    async def _status(self) -> bytes:
        return (json.dumps(self._told(), indent=2) + "\n").encode()

    async def _metrics(self) -> bytes:
        from imgfs.status.metrics import render

        return render(self._told()).encode()


def _forget_name(parent: int, name: bytes) -> None:
    import pyfuse3

    # In a thread of its own; before the mount there is nobody to tell.
    with contextlib.suppress(OSError, RuntimeError):
        pyfuse3.invalidate_entry_async(parent, name, ignore_enoent=True)


async def run_mount(
    text: str,
    mountpoint: str,
    options: Options,
    stop: Stop,
    ready: Callable[[], None],
    outcome: Outcome,
) -> None:
    """Mount the source and serve it until the end; `ready` is called once INIT is answered.

    Raises what opening and mounting raise, MountError when it ends before it was ready, and what
    says that something that was written is lost.
    """
    from imgfs.fuse import session
    from imgfs.fuse.operations import Operations

    _allow_many_files()
    _heap.limit_arenas(ARENAS)
    _heap.keep_large(shared().limit * 3 // 2)
    threads.take_over()
    was_ready = False
    holding = Holding(stop, outcome)
    async with trio.open_nursery() as nursery:
        sources = Sources(options, nursery)
        mount = Mount(text, options, sources, nursery, outcome, holding)
        try:
            _refuse_inside(text, mountpoint)
            await stop.unless(partial(mount.open, lazy=options.lazy))
            if mount.reload is not None:
                asking, asked = trio.open_memory_channel[None](1)
                stop.on_hangup = partial(_ask, asking)
                nursery.start_soon(mount.reload_when, asked)
            answered = trio.Event()

            async def background() -> None:
                nonlocal was_ready
                await answered.wait()
                await trio.to_thread.run_sync(session.raise_read_ahead, mountpoint)
                if stop.asked.is_set():
                    return
                ready()
                was_ready = True
                nursery.start_soon(mount.close_idle)
                nursery.start_soon(mount.merge_layers)
                nursery.start_soon(mount.close_nameless)
                nursery.start_soon(mount.trim_memory)
                await mount.watch()

            async def may_detach() -> None:
                await holding.until_durable(mount.make_durable)

            operations = Operations(mount.tree, options, answered.set)
            device = session.mount(operations, mountpoint, mount.url, options)
            await session.serve(operations, mountpoint, device, background, stop, may_detach)
        finally:
            with trio.CancelScope(shield=True):
                try:
                    await holding.until_durable(mount.make_durable)
                    await mount.finish()
                finally:
                    nursery.cancel_scope.cancel()
                    try:
                        await mount.aclose()
                    finally:
                        await sources.aclose()
    if not was_ready:
        raise stop.error()


def _ask(channel: trio.MemorySendChannel[None]) -> None:
    with contextlib.suppress(trio.WouldBlock):  # it has been asked for already
        channel.send_nowait(None)


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
