"""`originals/` of a directory that is mounted write=through: files come, go and are renamed."""

from __future__ import annotations

import os
from typing import Protocol

from imgfs.errors import ImgfsError, SourceChanged
from imgfs.tree.nodes import Folder, Node

TRIES = 6  # to open it, to find that something else was open, and to open it again


class Files(Protocol):
    """The files of the directory, which the tree follows.  Names are as the listing has them."""

    async def create(self, name: str) -> None:
        """A new empty file."""

    async def unlink(self, name: str) -> None:
        """Who has the file open keeps it."""

    async def rename(self, name: str, new_name: str, *, replace: bool) -> None:
        """Who has the file open has it by its new name; and who has that of before keeps it."""


class Originals(Folder):
    """Changes the `files`; `node` is the directory's."""

    def __init__(self, files: Files, node: Node) -> None:
        self._files = files
        self._node = node

    async def create(self, name: bytes) -> Node:
        await self._files.create(os.fsdecode(name))
        node = await self._current(name)
        if node is None:
            raise ImgfsError(f"{os.fsdecode(name)}: was created, and has gone again")
        return node

    async def unlink(self, name: bytes) -> None:
        await self._files.unlink(os.fsdecode(name))

    async def rename(self, name: bytes, new_name: bytes, *, replace: bool) -> None:
        await self._files.rename(os.fsdecode(name), os.fsdecode(new_name), replace=replace)

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
                if not node.view.is_nameless:
                    return node
            except SourceChanged:
                pass
            # What was there before, and has been removed, is what was open.
            if node.changed is not None:
                await node.changed(node)
        return None

    @property
    def _children(self) -> dict[bytes, Node]:
        assert self._node.children is not None
        return self._node.children
