"""The names under which a disk is shown in other formats."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

import trio

from imgfs.errors import SourceNotFound, UnsupportedFeature
from imgfs.tree.names import encode
from imgfs.tree.nodes import Node, Tree
from imgfs.views.showing import SHOWN, encoded
from imgfs.views.view import View


@dataclass(frozen=True, slots=True)
class Shown:
    """A disk that does not change any more, and what tells it from all others."""

    disk: View
    identity: str


#: Gives the file of a name.  Raises UnsupportedFeature where the format cannot hold the disk.
Maker = Callable[[Shown, str], Awaitable[View]]


def _maker(extension: str) -> Maker:
    async def make(shown: Shown, name: str) -> View:
        return await encoded(shown.disk, extension, name, shown.identity)

    return make


#: By what stands behind the disk's name.
FORMATS: Mapping[str, Maker] = {extension: _maker(extension) for extension in SHOWN}


class FormatNodes:
    """The files of a disk in a directory.

    `current` gives the disk as it is to be shown now.  When that is another one than a file was
    made of, the name gets a node of its own for the new one, and who has the old one open keeps it.
    `follow` hears of every view.  With `fleeting` the kernel must ask for the names each time.
    """

    def __init__(
        self,
        tree: Tree,
        directory: Node,
        name: str,
        makers: Mapping[str, Maker],
        current: Callable[[], Awaitable[Shown]],
        *,
        follow: Callable[[View], None] = lambda view: None,
        changed: Callable[[Node], Awaitable[None]] | None = None,
        fleeting: bool = False,
    ) -> None:
        self._tree = tree
        self._directory = directory
        self._current = current
        self._follow = follow
        self._changed = changed
        self._fleeting = fleeting
        self._making = trio.Lock()
        self._made_of: dict[int, View] = {}  # by the inodes of the names' nodes
        for extension, maker in makers.items():
            self._add(encode(name + extension), maker)

    def _add(self, name: bytes, maker: Maker) -> Node:
        node = self._tree.add(
            self._directory, name, changed=self._changed, is_fleeting=self._fleeting
        )
        node.renew = partial(self._renew, node, maker)
        return node

    async def _renew(self, node: Node, maker: Maker) -> Node:
        async with self._making:
            shown = await self._current()
            name = self._name_of(node)
            made_of = self._made_of.get(node.inode)
            if made_of is shown.disk:
                return node
            if made_of is not None:
                del self._made_of[node.inode]
                node = self._add(name, maker)
            try:
                node.view = await maker(shown, name.decode("utf-8", "surrogateescape"))
            except UnsupportedFeature as exc:
                self._tree.remove(self._directory, name)
                raise SourceNotFound(str(exc)) from exc
            self._made_of[node.inode] = shown.disk
            self._follow(node.view)
            return node

    def _name_of(self, node: Node) -> bytes:
        """The name that it has by now.  Raises SourceNotFound when another has taken it."""
        for name, each in (self._directory.children or {}).items():
            if each is node:
                return name
        raise SourceNotFound("the file is not there any more; look it up again")
