"""`originals/` of a directory that is mounted write=through: files come, go and are renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable

from imgfs.errors import ImgfsError, SourceChanged
from imgfs.sources.listing import Listing
from imgfs.tree.nodes import Folder, Node
from imgfs.views.writable import Writable

TRIES = 6  # to open it, to find that something else was open, and to open it again


class Originals(Folder):
    """Changes `listing`, and has the tree follow by `refresh`; `node` is the directory's.

    `forget_name` lets the kernel know that a name means something else now.
    """

    def __init__(
        self,
        listing: Listing,
        node: Node,
        refresh: Callable[[], Awaitable[None]],
        forget_name: Callable[[int, bytes], None],
    ) -> None:
        self._listing = listing
        self._node = node
        self._refresh = refresh
        self._forget_name = forget_name

    async def create(self, name: bytes) -> Node:
        await self._listing.create(os.fsdecode(name))
        await self._refresh()
        node = await self._current(name)
        if node is None:
            raise ImgfsError(f"{os.fsdecode(name)}: was created, and has gone again")
        return node

    async def unlink(self, name: bytes) -> None:
        await self._listing.unlink(os.fsdecode(name))
        await self._refresh()

    async def rename(self, name: bytes, new_name: bytes, *, replace: bool) -> None:
        node = self._children.get(name)
        if node is not None and isinstance(node.view, Writable):
            await node.view.settle()  # it cannot be written by this name afterwards
        old, new = os.fsdecode(name), os.fsdecode(new_name)
        await self._listing.rename(old, new, replace=replace)
        await self._refresh()
        # The kernel asks once more when what it has under a name is stale, not twice.
        with contextlib.suppress(ImgfsError):
            await self._current(new_name)
        for each in (name, new_name):
            self._forget_name(self._node.inode, each)

    async def _current(self, name: bytes) -> Node | None:
        """The node of what is under the name now, open; None where there is none."""
        for _ in range(TRIES):
            node = self._children.get(name)
            if node is None:
                break
            if node.prepare is not None:
                await node.prepare()
                continue  # another node may have taken the name
            assert node.view is not None
            try:
                await node.view.check()
                return node
            except SourceChanged:
                # What was there before, and has been removed, is what was open.
                if node.changed is not None:
                    await node.changed(node)
        return None

    @property
    def _children(self) -> dict[bytes, Node]:
        assert self._node.children is not None
        return self._node.children
