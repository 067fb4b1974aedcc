"""`snapshots/` of an image: `mkdir` takes one, `rmdir` deletes it, `mv` renames it."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from imgfs.errors import (
    AlreadyThere,
    Busy,
    ImgfsError,
    NameTooLong,
    NotPermitted,
    ReadOnlyView,
    SnapshotNotFound,
)
from imgfs.locks import Lock
from imgfs.overlays.layer import Layer, Ranges
from imgfs.overlays.merge import Pair, begin_merge
from imgfs.overlays.reading import open_to_read
from imgfs.overlays.records import SnapshotPath
from imgfs.overlays.store import Base, SnapshotStore
from imgfs.overlays.trim import WORTH, Trim, begin_trim
from imgfs.status.durable import Unsaved
from imgfs.tree.formats import FORMATS, FormatNodes, Showing, Shown
from imgfs.tree.guest import GuestNodes
from imgfs.tree.names import encode, is_reserved
from imgfs.tree.names import shown as shown_name
from imgfs.tree.nodes import Folder, Node, Tree
from imgfs.views.delta import delta
from imgfs.views.encoded import EncodedView
from imgfs.views.layer_errors import translated
from imgfs.views.overlay import OverlayView, layers_in_use
from imgfs.views.snapshot import SnapshotView
from imgfs.views.view import View

log = logging.getLogger(__name__)

PATIENCE_S = 60.0  # how long nothing is merged after that went wrong


@dataclass(frozen=True, slots=True)
class BaseDisk:
    """What snapshots are taken of, and stand on; `may_snapshot` raises Busy while it is written."""

    name: str
    url: str
    open: Callable[[], Awaitable[tuple[View, Base]]]
    may_snapshot: Callable[[], Awaitable[None]]
    read_only: bool = False
    #: the file that the disk is in, as qemu names it, and its format; known once the disk is open
    backing: Callable[[], tuple[str, str]] = lambda: ("", "raw")


class Snapshots:
    """All snapshots of one image that are open in this mount."""

    def __init__(self, disk: BaseDisk, state: Path | None = None) -> None:
        self.disk = disk
        self._state = state
        self._store: SnapshotStore | None = None
        self._views: dict[SnapshotPath, SnapshotView] = {}
        self._changing = Lock()
        self._damage: str | None = None
        self._merged: tuple[int, int] | None = None
        self._merge_after = 0.0
        self._had_none = False  # when somebody looked last
        self._is_merging = self._is_resting = False
        self._gone: set[str] = set()  # the names of the views whose files are not there

    @property
    def store(self) -> SnapshotStore:
        if self._store is None:
            self._store = SnapshotStore(self.disk.url, self._state)
        return self._store

    def has_any(self) -> bool:
        """Waits for the disk.  Raises CorruptSnapshot and OSError."""
        return self.store.has_any()

    async def listed(self) -> list[SnapshotPath]:
        """Their paths, without those whose records are damaged."""
        store = self.store
        await trio.to_thread.run_sync(store.check_version)
        damage, found = await trio.to_thread.run_sync(lambda: (store.damage(), store.snapshots()))
        if damage != self._damage and damage is not None:
            log.error("%s", damage)
        self._damage = damage
        self._had_none = not found and damage is None
        return [each.path for each in found]

    def views(self) -> list[SnapshotView]:
        """Those that are open."""
        return list(self._views.values())

    def add_to(self, tree: Tree, directory: Node) -> None:
        """Put `snapshots/` there."""
        SnapshotsFolder(self, tree, directory, None)

    async def view(self, path: SnapshotPath) -> SnapshotView:
        """Its disk, which this process alone may write from now on.

        Raises SnapshotNotFound, CorruptSnapshot, SourceChanged and Busy.
        """
        async with self._changing:
            return await self._view(path)

    async def _view(self, path: SnapshotPath) -> SnapshotView:
        if path not in self._views:
            below, base = await self.disk.open()
            with translated(self.disk.name, self.store.directory):
                await trio.to_thread.run_sync(self.store.check_base, base)
                layers = await trio.to_thread.run_sync(
                    partial(self.store.open_layers, path, writable=True)
                )
            self._views[path] = SnapshotView("/".join((self.disk.name, *path)), layers, below)
        return self._views[path]

    async def create(self, path: SnapshotPath) -> None:
        """Take one: of the base, or of the snapshot above, as it is at this moment."""
        if self.disk.read_only:
            raise ReadOnlyView(f"{self.disk.name}: was mounted with ro, which takes no snapshots")
        self._had_none = False
        async with self._changing:
            below, base = await self.disk.open()
            await below.check()
            await self.disk.may_snapshot()
            if path[:-1]:
                parent = await self._view(path[:-1])
                await parent.freeze(lambda top, size: self.store.create(path, base, size, top))
            else:
                with translated(self.disk.name, self.store.directory):
                    create = partial(self.store.create, mtime_ns=below.mtime_ns)
                    await trio.to_thread.run_sync(create, path, base, below.size)

    async def frozen(self, path: SnapshotPath) -> Shown:
        """The snapshot's disk as it is now, which stays so."""
        async with self._changing:
            view = await self._view(path)

            def freeze(top: Layer, size: int) -> Layer | None:
                return None if top.is_empty else self.store.freeze(path, size, top)

            disk = await view.frozen(freeze)
        names = [layer.path.name for layer in disk.layers]
        return Shown(disk, " ".join((self.disk.url, *names)))

    async def delete(self, path: SnapshotPath) -> None:
        async with self._changing:
            with translated(self.disk.name, self.store.directory):
                # It holds the lock that says that somebody writes it, and what it has not made
                # durable yet is lost only if the snapshot is.
                view = self._views.pop(path, None)
                top = None if view is None else view.top
                try:
                    await trio.to_thread.run_sync(self.store.delete, path, top)
                except BaseException:
                    if view is not None:
                        self._views[path] = view
                    raise
                if view is not None:
                    await view.discard()

    async def rename(self, path: SnapshotPath, name: str) -> None:
        async with self._changing:
            with translated(self.disk.name, self.store.directory):
                await trio.to_thread.run_sync(self.store.rename, path, name)
            fresh = (*path[:-1], name)
            self._views = {
                (*fresh, *key[len(path) :]) if key[: len(path)] == path else key: view
                for key, view in self._views.items()
            }

    async def merge(self) -> None:
        """Make one of each two layers of which nobody needs the lower one by itself.

        Raises nothing: without it all takes more space, and is as good.
        """
        if self._store is None or self.disk.read_only or self._had_none:
            return
        if self._is_resting or trio.current_time() < self._merge_after:
            return
        self._is_merging = True
        try:
            while await self._merge_two():
                pass
            for view in list(self._views.values()):
                await self._trim(view)
        except (ImgfsError, OSError) as exc:
            log.warning("%s: layers of its snapshots were not merged: %s", self.disk.name, exc)
            self._merge_after = trio.current_time() + PATIENCE_S
        except Exception:
            # What the layers are together has not changed: no reason to end the mount.
            log.exception("%s: a merge of layers failed: this is a bug in imgfs", self.disk.name)
            self._merge_after = math.inf
        finally:
            self._is_merging = False

    async def seal(self) -> None:
        """Give checksums to what was written, and not for a while, so that closing is quick.

        Raises nothing: closing does what is left, and says what is wrong.
        """
        for view in list(self._views.values()):
            try:
                while await trio.to_thread.run_sync(view.top.seal_some):
                    pass
            except OSError as exc:
                log.debug("%s: no checksums were written: %s", self.disk.name, exc)
            except Exception:
                log.exception("%s: sealing failed: this is a bug in imgfs", self.disk.name)

    async def _merge_two(self) -> bool:
        state = await trio.to_thread.run_sync(self.store.state)
        if state is None or state == self._merged:
            return False
        merge, may_be = await trio.to_thread.run_sync(begin_merge, self.store, layers_in_use())
        if merge is None:
            self._merged = None if may_be else state
            return False
        try:
            while not await trio.to_thread.run_sync(merge.step):
                pass
            with trio.CancelScope(shield=True):
                async with self._changing:
                    if await trio.to_thread.run_sync(merge.finish):
                        await self._join_in_views(merge.pair)
        finally:
            merge.close()
        return True

    async def _trim(self, view: SnapshotView) -> None:
        """Take out of the layer below its top what that hides."""
        names, used = view.written_layers, layers_in_use()
        if names is None or view.trimmed == names:
            return
        top, lower, _ = names
        if any(lower in each and top not in each for each in used):
            return
        if _bytes_in(await view.hidden(lower)) >= WORTH:
            trim = await trio.to_thread.run_sync(begin_trim, self.store, top, lower, used)
            if trim is None:
                return
            try:
                await self._trim_by(trim, view, lower)
            finally:
                trim.close()
        view.trimmed = names

    async def _trim_by(self, trim: Trim, view: SnapshotView, lower: str) -> None:
        try:
            # Asked again: now nobody can let any of it be seen any more.
            ranges = await view.hidden(lower)
            if ranges is not None:
                trim.start(ranges)
                while not await trio.to_thread.run_sync(trim.step):
                    pass
        finally:
            with trio.CancelScope(shield=True):
                async with self._changing:
                    if view in self._views.values():
                        path = self.store.layer_path(lower)
                        await view.join(lower, lower, partial(open_to_read, path))

    async def _join_in_views(self, pair: Pair) -> None:
        path = self.store.layer_path(pair.kept)
        for view in self._views.values():
            await view.join(pair.upper, pair.lower, partial(open_to_read, path))

    async def rest(self) -> bool:
        """Close those that are open and nobody uses; False where that cannot be done now."""
        if not self._views:
            return True
        if self._is_merging or self._changing.is_held:
            return False
        self._is_resting = True
        try:
            async with self._changing:
                for view in self._views.values():
                    if view.writers:
                        return False
                    await view.sync()
                for path, view in list(self._views.items()):
                    await view.aclose()
                    del self._views[path]
        except ImgfsError:
            return False  # whoever wrote it is told at fsync, and all at the end of the mount
        finally:
            self._is_resting = False
        return True

    async def check_place(self) -> None:
        """See that nothing more is written to what was removed or moved away.  Raises nothing."""
        for view in list(self._views.values()):
            try:
                await view.check_place()
                self._gone.discard(view.name)
            except (ImgfsError, OSError) as exc:
                if view.name not in self._gone:
                    log.error("%s: %s", view.name, exc)
                self._gone.add(view.name)

    async def make_durable(self) -> list[Unsaved]:
        """Make all that was written durable; returns what is not."""
        found = [await view.unsaved() for view in list(self._views.values())]
        return [each for each in found if each is not None]

    async def aclose(self) -> list[Unsaved]:
        """Make all that was written durable, and let go of it; returns what is lost by that."""
        async with self._changing:
            found = [await view.close() for view in self._views.values()]
            self._views.clear()
        return [each for each in found if each is not None]


class SnapshotsFolder(Folder):
    """One `snapshots/`: the image's, or a snapshot's."""

    def __init__(
        self, snapshots: Snapshots, tree: Tree, directory: Node, above: SnapshotFolder | None
    ) -> None:
        self.snapshots = snapshots
        self.tree = tree
        self.above = above
        self.node = tree.add(directory, b"snapshots", children={}, folder=self)
        self.node.refresh = self.refresh

    @property
    def path(self) -> SnapshotPath:
        return () if self.above is None else self.above.path

    async def refresh(self) -> None:
        """Show those that there are by now: another process may have made some."""
        with translated(self.snapshots.disk.name, self.snapshots.store.directory):
            found = await self.snapshots.listed()
        # Of one whose record is damaged those that were taken of it tell the name.
        above = self.path
        depth = len(above)
        below = [path for path in found if path[:depth] == above and len(path) > depth]
        names = {encode(path[depth]) for path in below}
        children = self.node.children
        assert children is not None
        for name in [name for name in children if name not in names]:
            self.tree.remove(self.node, name)
        for name in names - set(children):
            SnapshotFolder(self, name)

    async def mkdir(self, name: bytes) -> Node:
        text = _checked(name)
        await self.snapshots.create((*self.path, text))
        await self.refresh()
        return self._child(name)

    async def rmdir(self, name: bytes) -> None:
        node = self._child(name)
        if not await node.until_closed():
            raise Busy(f"{_text(name)}: a file of it is open")
        await self.snapshots.delete((*self.path, _text(name)))
        self.tree.remove(self.node, name)

    async def rename(self, name: bytes, new_name: bytes, *, replace: bool) -> None:
        node = self._child(name)
        assert self.node.children is not None
        if new_name in self.node.children:
            if new_name == name:
                return
            raise AlreadyThere(f"{_text(new_name)}: is another snapshot; delete that first")
        await self.snapshots.rename((*self.path, _text(name)), _checked(new_name))
        # The nodes stay: who has a file open, and the kernel's pages of it, are not disturbed.
        assert isinstance(node.folder, SnapshotFolder)
        del self.node.children[name]
        self.node.children[new_name] = node
        node.folder.renamed(new_name)

    async def unlink(self, name: bytes) -> None:
        raise NotPermitted(f"{_text(name)}: is a snapshot; rmdir deletes it")

    async def create(self, name: bytes) -> Node:
        raise NotPermitted(f"{_text(name)}: mkdir takes a snapshot; there are no files beside them")

    def _child(self, name: bytes) -> Node:
        children = self.node.children or {}
        if name not in children:
            raise SnapshotNotFound(f"{_text(name)}: no such snapshot")
        return children[name]


class SnapshotFolder(Folder):
    """One snapshot's directory."""

    def __init__(self, parent: SnapshotsFolder, name: bytes) -> None:
        self.parent = parent
        self.name = name
        self.node = parent.tree.add(parent.node, name, children={}, folder=self)
        raw = parent.tree.add(self.node, name + b".raw")
        raw.prepare = partial(self._open_raw, raw)
        SnapshotsFolder(parent.snapshots, parent.tree, self.node, self)
        showing = Showing(parent.tree, FORMATS, self._frozen, fleeting=True)
        with_delta = replace(showing, makers={**FORMATS, ".delta.qcow2": self._delta})
        FormatNodes(with_delta, self.node, _text(name))
        GuestNodes(showing, self.node, lambda: _text(self.name))

    @property
    def path(self) -> SnapshotPath:
        return (*self.parent.path, _text(self.name))

    async def _open_raw(self, node: Node) -> None:
        view = await self.parent.snapshots.view(self.path)
        if node.view is None:
            self.parent.tree.give(node, view)
            node.prepare = None

    async def _frozen(self) -> Shown:
        return await self.parent.snapshots.frozen(self.path)

    async def _delta(self, shown: Shown, name: str) -> EncodedView:
        assert isinstance(shown.disk, OverlayView)
        backing = self.parent.snapshots.disk.backing()
        return await delta(shown.disk, name, shown.identity, *backing)

    def renamed(self, name: bytes) -> None:
        """Its files are called after it."""
        old, self.name = self.name, name
        assert self.node.children is not None
        for files in (self.node.children, self.node.children[b"sparse"].children):
            assert files is not None
            for each in [each for each in files if each.startswith(old + b".")]:
                files[name + each[len(old) :]] = files.pop(each)

    async def unlink(self, name: bytes) -> None:
        raise NotPermitted(f"{_text(name)}: is a view of the snapshot; rmdir deletes that")

    async def create(self, name: bytes) -> Node:
        raise NotPermitted(f"{_text(name)}: a snapshot's directory holds its views only")

    async def mkdir(self, name: bytes) -> Node:
        raise NotPermitted(f"{_text(name)}: snapshots are taken in snapshots/")


def _bytes_in(ranges: Ranges | None) -> int:
    return 0 if ranges is None else sum(ranges[1]) - sum(ranges[0])


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _checked(name: bytes) -> str:
    """Raises NotPermitted and NameTooLong for what the views' names could not be made of."""
    text = _text(name)
    if is_reserved(text):
        raise NotPermitted(f"{text}: a snapshot cannot have that name")
    if shown_name(text) != text:
        raise NameTooLong(f"{text}: is too long for a snapshot")
    return text
