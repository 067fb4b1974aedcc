"""The names under which a disk is shown in other formats."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

from imgfs.errors import SourceNotFound, UnsupportedFeature
from imgfs.extents import ExtentList
from imgfs.locks import Lock
from imgfs.tree.names import encode
from imgfs.tree.nodes import Node, Tree
from imgfs.views.showing import SHOWN, Shape, encoded, shape
from imgfs.views.view import View
from imgfs.views.writable import Writable

FEW_EXTENTS = 4096  # of so many the list is kept


@dataclass(slots=True)
class Shown:
    """A disk that does not change any more, and what tells it from all others."""

    disk: View
    identity: str
    _extents: ExtentList | None = None

    async def extents(self) -> ExtentList:
        """All of the disk's.  Raises what reading its map raises."""
        if self._extents is not None:
            return self._extents
        found = await self.disk.extents(0, self.disk.size)
        if len(found) <= FEW_EXTENTS:
            self._extents = found
        return found


#: Gives the file of a name.  Raises UnsupportedFeature where the format cannot hold the disk.
Maker = Callable[[Shown, str], Awaitable[View]]


class Format:
    """A Maker of one of the formats that a disk is shown in."""

    def __init__(self, extension: str) -> None:
        self._extension = extension

    async def __call__(self, shown: Shown, name: str) -> View:
        return await encoded(shown.disk, self._extension, name, shown.identity)

    async def shape(self, shown: Shown, name: str) -> Shape | None:
        """What can be told of the file before there is one."""
        if isinstance(shown.disk, Writable):
            return None
        extents = await shown.extents()
        return await shape(shown.disk, extents, self._extension, name, shown.identity)


#: By what stands behind the disk's name.
FORMATS: Mapping[str, Maker] = {extension: Format(extension) for extension in SHOWN}


@dataclass(frozen=True, slots=True)
class Showing:
    """How a disk is shown in a tree."""

    tree: Tree
    makers: Mapping[str, Maker]  #: by what stands behind the disk's name
    current: Callable[[], Awaitable[Shown]]  #: the disk as it is to be shown now
    follow: Callable[[View], None] = lambda view: None  #: hears of every view
    changed: Callable[[Node], Awaitable[None]] | None = None
    fleeting: bool = False  #: the kernel must ask for the names each time


class FormatNodes:
    """The files of a disk in a directory.

    When the current disk is another one than a file was made of, the name gets a node of its own
    for the new one, and who has the old one open keeps it.
    """

    def __init__(self, showing: Showing, directory: Node, name: str) -> None:
        self._showing = showing
        self._directory = directory
        self._making = Lock()
        self._made_of: dict[int, View] = {}  # by the inodes of the names' nodes
        for extension, maker in showing.makers.items():
            self._add(encode(name + extension), maker)
        if not showing.fleeting and len(showing.makers) > 1:
            directory.siblings = self

    def is_current(self, node: Node) -> bool:
        disk = self._made_of.get(node.inode)
        return disk is not None and disk.stale is None and not isinstance(disk, Writable)

    async def complete(self) -> bool:
        shown = await self._showing.current()
        if len(await shown.extents()) > FEW_EXTENTS:
            return False
        for node in list((self._directory.children or {}).values()):
            if node.renew is not None and node.shape is None and node.view is None:
                with contextlib.suppress(SourceNotFound):
                    await node.renew()
        return True

    def _add(self, name: bytes, maker: Maker) -> Node:
        how = self._showing
        node = how.tree.add(self._directory, name, changed=how.changed, is_fleeting=how.fleeting)
        node.renew = partial(self._renew, node, maker)
        return node

    async def _renew(self, node: Node, maker: Maker) -> Node:
        async with self._making:
            shown = await self._showing.current()
            name = self._name_of(node)
            made_of = self._made_of.get(node.inode)
            if made_of is shown.disk:
                return node
            if made_of is not None:
                del self._made_of[node.inode]
                node = self._add(name, maker)
            text = name.decode("utf-8", "surrogateescape")
            make = partial(self._make, node, maker, shown, text)
            try:
                if isinstance(maker, Format):
                    node.shape = await maker.shape(shown, text)
                if node.shape is None:
                    await make()
                else:
                    node.prepare = make
            except UnsupportedFeature as exc:
                self._showing.tree.remove(self._directory, name)
                raise SourceNotFound(str(exc)) from exc
            self._made_of[node.inode] = shown.disk
            return node

    async def _make(self, node: Node, maker: Maker, shown: Shown, text: str) -> None:
        view = await maker(shown, text)
        if node.view is None:
            if shown.disk.stale is not None:
                view.mark_stale(shown.disk.stale)
            self._showing.tree.give(node, view)
            node.shape = node.prepare = None
            self._showing.follow(view)

    def _name_of(self, node: Node) -> bytes:
        """The name that it has by now.  Raises SourceNotFound when another has taken it."""
        for name, each in (self._directory.children or {}).items():
            if each is node:
                return name
        raise SourceNotFound("the file is not there any more; look it up again")
