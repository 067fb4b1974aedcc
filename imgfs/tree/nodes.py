"""Names to views.  Knows nothing of FUSE."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import PurePath

from imgfs.views.raw import RawView

ROOT = 1
IMAGE_EXTENSIONS = (".raw", ".img", ".dd", ".iso", ".bin")


@dataclass(slots=True)
class Node:
    """A directory (`children`), an image's view, or a file made anew at each open (`make`).

    A view's file without the view is of a source that is not open yet: `prepare` opens it, and
    puts the view here.
    """

    inode: int
    children: dict[bytes, Node] | None = None
    view: RawView | None = None
    make: Callable[[], Awaitable[bytes]] | None = None
    prepare: Callable[[], Awaitable[object]] | None = None


@dataclass(slots=True)
class Tree:
    """Every node by inode.  An inode's number is never used again for other content."""

    nodes: dict[int, Node] = field(default_factory=dict)
    _next: int = ROOT

    def add(self, parent: Node | None, name: bytes, **what: object) -> Node:
        """Make a node, and let it take the name in its parent."""
        node = Node(self._next, **what)  # type: ignore[arg-type]
        self._next += 1
        self.nodes[node.inode] = node
        if parent is not None:
            assert parent.children is not None
            parent.children[name] = node
        return node


def image_name(file_name: str) -> str:
    """The image's name: the file's without its known image extension."""
    stem, extension = PurePath(file_name).stem, PurePath(file_name).suffix
    return stem if extension.lower() in IMAGE_EXTENSIONS and stem else file_name


def encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
