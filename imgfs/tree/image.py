"""One image of a mount: its names, and its views through every generation of its source."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from imgfs import mapjson
from imgfs.errors import (
    Busy,
    CorruptImage,
    ImgfsError,
    SourceChanged,
    SourceUnreachable,
    UnsupportedFeature,
    again,
)
from imgfs.locks import Lock
from imgfs.overlays.store import Base
from imgfs.sources.patience import patiently
from imgfs.status.fields import ImageStatus, State
from imgfs.tree.formats import FORMATS, FormatNodes, Showing, Shown
from imgfs.tree.guest import GuestNodes
from imgfs.tree.names import encode
from imgfs.tree.nodes import Node, Tree, Trouble
from imgfs.tree.snapshots import BaseDisk, Snapshots
from imgfs.views.opening import Chain
from imgfs.views.through import StoredView, ThroughView
from imgfs.views.view import View
from imgfs.views.work import work
from imgfs.views.writable import Writable

OpenStored = Callable[[], Awaitable[StoredView]]
OpenDisk = Callable[[StoredView], Awaitable[Chain]]
OpenView = Callable[[], Awaitable[View]]
Invalidate = Callable[[int], None]
Result = TypeVar("Result")

REFUSED_S = 5.0  # how long an image that cannot be understood is not looked at again


@dataclass(frozen=True, slots=True)
class Place:
    """A name of one of the image's views."""

    directory: Node
    name: bytes
    open: OpenView


class ImageNodes:
    """What stands in an image's directory.

    `url` is shown, and holds no secret.  `open_stored` gives the source's bytes as stored, and
    opens it anew when it has changed; `open_disk` finds the disk in them; `waits` says whether to
    try both again and again while the source is away.  `invalidate` sees to it that what the kernel
    has cached of an inode is dropped, and does not wait for that.
    """

    def __init__(
        self,
        tree: Tree,
        name: str,
        file_name: str,
        url: str,
        open_stored: OpenStored,
        open_disk: OpenDisk,
        waits: Callable[[], bool],
        invalidate: Invalidate,
        *,
        read_only: bool = False,
    ) -> None:
        self._tree = tree
        self.name = name
        self.file_name = file_name
        self.url = url
        self._open_stored = open_stored
        self._open_disk = open_disk
        self._waits = waits
        self._invalidate = invalidate
        self._stored: StoredView | None = None
        self._chain: Chain | None = None
        self._views: list[View] = []  # of this generation
        self._places: list[Place] = []
        self._extents_size: tuple[View, int] | None = None
        self._shown_disk: Shown | None = None
        self._guest: GuestNodes | None = None
        self._read_only = read_only
        self.used_snapshots: Snapshots | None = None  #: from when somebody has looked at the image
        self.directory: Node | None = None  #: of its own, if it has one
        #: told when somebody looks at it
        self.used: Callable[[], None] = lambda: None
        #: the name is no more, or means another image; who has a file open may read on
        self.is_gone = False
        self._left: list[Node] = []  # what was in its directory then
        self._opening = Lock()
        self._failed = ""
        self.trouble = Trouble()
        self._refused: tuple[StoredView, ImgfsError, float] | None = None

    def add_to(self, directory: Node) -> None:
        """Put the names there; nothing is opened before one of them is looked at."""
        self.used()
        self.directory = directory
        directory.trouble = self.trouble
        tree = self._tree
        original = tree.add(directory, b"original", children={})
        self._place(directory, self.name + ".raw", self.opened_disk)
        self._place(original, self.file_name, self.opened)
        tree.add(
            directory, b"extents.json", make=self._fresh_extents, made_size=self._size_of_extents
        )

        self.snapshots.add_to(tree, directory)
        showing = Showing(tree, FORMATS, self._shown, self._follow, self._changed)
        FormatNodes(showing, directory, self.name)
        self._guest = GuestNodes(showing, directory, lambda: self.name)

    @property
    def snapshots(self) -> Snapshots:
        if self.used_snapshots is None:
            disk = (self._base, self._may_snapshot, self._read_only, self._backing)
            self.used_snapshots = Snapshots(BaseDisk(self.name, self.url, *disk))
        return self.used_snapshots

    def add_original(self, directory: Node) -> None:
        """Put the source's bytes as stored there, under the file's own name."""
        self._place(directory, self.file_name, self.opened)

    @property
    def written(self) -> ThroughView | None:
        """The bytes as stored, if they are open for writing through."""
        return self._stored if isinstance(self._stored, ThroughView) else None

    async def adopt(self, directory: Node, node: Node) -> None:
        """As `add_original`, with a node that another image had there under another name."""
        place = Place(directory, encode(self.file_name), self.opened)
        self._places.append(place)
        node.changed = self._changed
        if node.view is None:
            node.prepare = partial(self._fill, node, place)
        else:
            with contextlib.suppress(ImgfsError):  # who opens it is told
                await self.opened()

    def leave(self, directory: Node) -> None:
        """It has no name there any more."""
        self._places = [each for each in self._places if each.directory is not directory]

    def _place(self, directory: Node, name: str, open_view: OpenView) -> None:
        place = Place(directory, encode(name), open_view)
        self._places.append(place)
        self._show(place)

    def _show(self, place: Place) -> None:
        """A node for a view that is to come."""
        node = self._tree.add(
            place.directory, place.name, changed=self._changed, trouble=self.trouble
        )
        node.prepare = partial(self._fill, node, place)

    async def _fill(self, node: Node, place: Place) -> None:
        view = await place.open()
        if node.view is None:
            self._tree.give(node, view)
            node.prepare = None
            if isinstance(view, Writable):
                self._tree.share(place.directory, place.name, node)

    async def _may_write(self) -> None:
        try:
            has_any = await trio.to_thread.run_sync(self.snapshots.has_any)
        except OSError as exc:
            said = f"nobody can tell whether it has snapshots: {exc.strerror}"
            raise Busy(f"{self.name}: {said}") from exc
        if has_any:
            raise Busy(
                f"{self.name}: has snapshots, and they need it as it is: write to one of them"
            )

    async def _may_snapshot(self) -> None:
        stored = self._stored
        if not isinstance(stored, ThroughView):
            return
        for node in self._nodes_of(stored):
            await node.until_closed()
        if stored.writers or stored.dirty_bytes:
            raise Busy(f"{self.name}: is open for writing; close it first")

    async def opened(self) -> StoredView:
        """The bytes as stored; opens the source if it is not open.  Raises what that raises."""
        self.used()
        if self._stored is not None:
            return self._stored
        async with self._opening:
            return await self._get_stored()

    async def opened_disk(self) -> View:
        """The disk.  Raises what opening the source, and finding a disk in it, raises."""
        self.used()
        if self._chain is not None:
            return self._chain.disk
        async with self._opening:
            stored = await self._get_stored()
            if self._chain is None:
                self._refuse_again(stored)
                try:
                    self._chain = await self._patiently(partial(self._open_disk, stored))
                except (CorruptImage, UnsupportedFeature) as exc:
                    self._refused = stored, exc, trio.current_time() + REFUSED_S
                    raise
                if self._chain.disk is not stored:
                    self._follow(self._chain.disk)
                    if isinstance(stored, ThroughView):
                        stored.when_written(partial(self._outdate, self._chain.disk))
            return self._chain.disk

    def _refuse_again(self, stored: StoredView) -> None:
        """Raises what was wrong a moment ago: all names in a directory ask for the same disk."""
        if self._refused is not None:
            of, why, until = self._refused
            if of is stored and stored.stale is None and trio.current_time() < until:
                raise again(why) from why

    async def _shown(self) -> Shown:
        disk = await self.opened_disk()
        assert self._chain is not None
        if self._shown_disk is None or self._shown_disk.disk is not disk:
            self._shown_disk = Shown(disk, self._chain.token(self.url))
        return self._shown_disk

    async def _base(self) -> tuple[View, Base]:
        """The disk that snapshots are of, and what tells it from others."""
        disk = await self.opened_disk()
        assert self._chain is not None
        return disk, self._chain.base(self.url)

    def _backing(self) -> tuple[str, str]:
        assert self._chain is not None
        return self._chain.backing(self.url)

    async def _get_stored(self) -> StoredView:
        if self._stored is None:
            self._stored = await self._patiently(self._open_stored)
            self._follow(self._stored)
            if isinstance(self._stored, Writable):
                self._stored.may_write = self._may_write
        return self._stored

    def _outdate(self, disk: View) -> None:
        disk.mark_stale(SourceChanged(f"{self.name}: its file is being written; open it again"))

    async def _patiently(self, action: Callable[[], Awaitable[Result]]) -> Result:
        async def once() -> Result:
            try:
                return await action()
            except ImgfsError as exc:
                self._failed = str(exc)
                raise

        result = await patiently(once, self._waits)
        self._failed = ""
        return result

    def _follow(self, view: View) -> None:
        self._views.append(view)
        view.when_stale(lambda _: self._drop_kernel_cache(view))

    async def _changed(self, node: Node) -> None:
        """The node's view is stale: put the source as it is now under the names."""
        stale = node.view
        if stale is None and self._chain is not None and self._chain.disk.stale is not None:
            stale = self._chain.disk  # of which the view was to be made
        await self._renew(stale)

    async def _renew(self, stale: View | None) -> None:
        async with self._opening:
            if stale in self._views:
                self._stored = self._chain = None
                self._views = []
                for place in self._places:
                    self._show(place)

    def nodes(self) -> Iterator[Node]:
        """All that it has, in its directory and elsewhere."""
        if self.directory is not None:
            yield from self.directory.below()
        for place in self._elsewhere():
            node = (place.directory.children or {}).get(place.name)
            if node is not None:
                yield node

    def _elsewhere(self) -> list[Place]:
        here: list[Node] = []
        if self.directory is not None:
            here = [self.directory, *(self.directory.children or {}).values()]
        return [place for place in self._places if place.directory not in here]

    def names(self) -> Iterator[tuple[int, bytes]]:
        """Those by which the kernel finds it: (directory's inode, name)."""
        for place in self._elsewhere():
            yield place.directory.inode, place.name

    def is_used(self) -> bool:
        """Does the kernel know one of its files, or is it being opened?"""
        if self.is_gone:
            return any(node.inode in self._tree.nodes for node in self._left)
        if self._opening.is_held or (self.directory is not None and self.directory.requests):
            return True
        return any(
            node.lookups or node.published or node.open_files or node.requests
            for node in self.nodes()
        )

    def needs(self) -> Iterator[View]:
        """The views that are to stay open for it."""
        if self._stored is not None:
            yield self._stored
        if self._chain is not None:
            yield from self._chain.files
            for layer in self._chain.layers:
                yield from layer.files

    async def rest(self) -> bool:
        """Be again what it was before anybody looked at it; False where it is used.

        What only it needed is to be closed then.
        """
        stored = self._stored
        if isinstance(stored, ThroughView) and (stored.writers or stored.dirty_bytes):
            return False
        if self.is_used() or not await self.snapshots.rest() or self.is_used():
            return False
        elsewhere = self._elsewhere()
        if self.directory is not None:
            for name in list(self.directory.children or {}):
                self._tree.remove(self.directory, name)
            self.directory.siblings = None
        self._stored = self._chain = self._extents_size = self._shown_disk = None
        self._guest = self._refused = self.used_snapshots = None
        self._places, self._views = elsewhere, []
        if not self.is_gone:
            for place in elsewhere:
                self._show(place)
        return True

    def go(self) -> None:
        """Its directory is about to be removed."""
        self._left = list(self.nodes())
        self.is_gone = True

    def is_still_open(self) -> bool:
        """Has somebody a file open that was in the directory?"""
        return any(node.open_files for node in self._left)

    def is_read(self) -> bool:
        """Has anything been read since this was asked last?"""
        read = [view.was_read() for view in self._views if view.stale is None]
        return any(read)

    async def check(self) -> None:
        """Find out whether the source is still the same, and let the kernel know if it is not."""
        for view in self._views[-1:]:  # the disk's, which is over all others
            with contextlib.suppress(ImgfsError):  # one that cannot be reached has not changed
                await view.check()

    def _nodes_of(self, view: View) -> list[Node]:
        return [self._tree.nodes[inode] for inode in self._tree.inodes_of(view)]

    def _drop_kernel_cache(self, view: View) -> None:
        self.withdraw()
        for inode in self._tree.inodes_of(view):
            self._invalidate(inode)

    def withdraw(self) -> None:
        """Have all look-ups of its names come here again."""
        for node in self.nodes():
            self._tree.withdraw(node)

    async def _fresh_extents(self) -> bytes:
        """extents.json, of the source as it is now."""
        view = await self.opened_disk()
        try:
            await view.check_for_open()
        except SourceChanged:
            await self._renew(view)
            view = await self.opened_disk()
        return await self._extents(view)

    async def _extents(self, view: View) -> bytes:
        extents = await view.extents(0, view.size)
        # A map of a million extents takes seconds.
        text = await work(len(extents), lambda: "".join(mapjson.lines(extents)).encode())
        self._extents_size = view, len(text)
        return text

    async def _size_of_extents(self) -> int:
        view = await self.opened_disk()
        if self._extents_size is None or self._extents_size[0] is not view:
            return len(await self._extents(view))
        return self._extents_size[1]

    def status(self) -> ImageStatus:
        """For status.json; sizes are bytes."""
        stored = self._stored
        if stored is None:
            unopened: State = "failed" if self._failed else "not opened yet"
            said = self._failed or self.trouble.last_error
            return {"source": self.url, "state": unopened, "last_error": said}
        disk = stored if self._chain is None else self._chain.disk
        views = list(dict.fromkeys([disk, stored, *self._views]))
        source, identity, cache = stored.source, stored.source.stat.identity, stored.cache
        unreachable = isinstance(source.counters.failure, SourceUnreachable)
        misses = sum(view.misses for view in views)
        reads = sum(view.map.reads + view.answered.reads for view in views)
        failed = [view.counters.last_error for view in (*views, source) if view.counters.last_error]
        told: ImageStatus = {
            "source": self.url,
            "state": "stale" if disk.stale else "unreachable" if unreachable else "open",
            "identity": None if identity is None else identity.token,
            "size": disk.size,
            "stored": disk.stored_bytes,
            "bytes_native": sum(view.map.bytes_served for view in views),
            "bytes_python": sum(view.answered.bytes_read for view in views),
            "bytes_fetched": source.counters.bytes_read,
            "reads": reads,
            "hits": max(0, reads - misses),
            "misses": min(reads, misses),
            "in_flight": sum(view.answered.in_flight for view in views),
            "fetching": source.counters.in_flight,
            "window": cache.window if cache is not None else 0,
            "cached": cache.cached_bytes if cache is not None else 0,
            "bytes_written": source.counters.bytes_written,
            "dirty": stored.dirty_bytes if isinstance(stored, ThroughView) else 0,
            "errors": self.trouble.errors,
            "last_error": self._failed or self.trouble.last_error or "".join(failed[:1]),
        }
        guest = self._guest.guest if self._guest is not None else None
        if guest is not None:
            told["left_whole"] = dict(guest.reasons())
        return told
