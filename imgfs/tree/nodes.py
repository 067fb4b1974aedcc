"""Names to views.  Knows nothing of FUSE."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import trio

from imgfs.errors import ReadOnlyView
from imgfs.views.showing import Shape
from imgfs.views.view import View

ROOT = 1
CLOSING_S = 5.0  # how long the kernel may take to tell that a file is not open any more
CLOSING_POLL_S = 0.005


@dataclass(slots=True)
class Trouble:
    """The errors that programs got."""

    errors: int = 0
    last_error: str = ""

    def note(self, error: str) -> None:
        self.errors += 1
        self.last_error = error


class Folder:
    """What can be changed in a directory, besides its files' bytes: nothing, if not said otherwise.

    Names are such as the kernel has: without a slash, not `.` or `..`.  A method returns when the
    tree shows the change.  All raise ImgfsErrors: ReadOnlyView, NotPermitted, AlreadyThere,
    NotEmpty, Busy, SourceNotFound, and what the source raises.
    """

    async def create(self, name: bytes) -> Node:
        """A new empty file, which has a view that is Writable."""
        raise ReadOnlyView(f"{_text(name)}: nothing can be created there")

    async def unlink(self, name: bytes) -> None:
        raise ReadOnlyView(f"{_text(name)}: cannot be removed")

    async def mkdir(self, name: bytes) -> Node:
        raise ReadOnlyView(f"{_text(name)}: no directory can be made there")

    async def rmdir(self, name: bytes) -> None:
        raise ReadOnlyView(f"{_text(name)}: cannot be removed")

    async def rename(self, name: bytes, new_name: bytes, *, replace: bool) -> None:
        """Within this directory.  Without `replace` a name that is there is AlreadyThere."""
        raise ReadOnlyView(f"{_text(name)}: cannot be renamed")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


class Siblings(Protocol):
    """Files of a directory that are made of one disk; each has a `renew`."""

    async def complete(self) -> bool:
        """Get all of them ready to be looked at, where that costs little; else False."""

    def is_current(self, node: Node) -> bool:
        """Is it of the disk as it is now, and does that not change?"""


@dataclass(slots=True, eq=False)
class Node:
    """A directory (`children`), an image's view, or a file made anew at each open (`make`).

    A view's file without the view is of a source that is not open yet: `prepare` opens it, and
    puts the view here; where the `shape` is known only who opens the file needs that.  `refresh`
    brings a directory's children up to date; it is called before a directory is listed, and before
    a name in it is said not to be there.
    """

    inode: int
    children: dict[bytes, Node] | None = None
    view: View | None = None
    shape: Shape | None = None  #: of a view that is not made yet; `prepare` makes it
    make: Callable[[], Awaitable[bytes]] | None = None
    made_size: Callable[[], Awaitable[int]] | None = None  #: of what `make` would make now
    prepare: Callable[[], Awaitable[object]] | None = None
    refresh: Callable[[], Awaitable[None]] | None = None
    changed: Callable[[Node], Awaitable[None]] | None = None  #: the view turned out to be stale
    #: the node that has this one's name by now, which may be another, with its view
    renew: Callable[[], Awaitable[Node]] | None = None
    is_fleeting: bool = False  #: the name may mean something else at any time
    folder: Folder | None = None  #: of a directory that can be changed
    mtime_ns: int | None = None  #: of a directory, where it is known
    open_files: int = 0  #: of its view, those that are open now
    closing: int = 0  #: how often one of them was closed by a program and not by the kernel yet
    trouble: Trouble | None = None  #: where its errors are counted; if not said as of the parent
    lookups: int = 0  #: how often the kernel was given the inode and has not forgotten it
    #: (directory's inode, name) whose look-ups are answered elsewhere, and counted there
    published: tuple[int, bytes] | None = None
    siblings: Siblings | None = None  #: of a directory
    requests: int = 0  #: of a directory, those for its names that are under way
    links: int = 1  #: how many names it has

    def below(self) -> Iterator[Node]:
        """All nodes in a directory, and in those in it."""
        for child in (self.children or {}).values():
            yield child
            yield from child.below()

    def note_release(self) -> None:
        """The kernel says that one of the files is not open any more."""
        self.open_files -= 1
        self.closing = max(0, self.closing - 1)

    async def until_closed(self) -> bool:
        """Wait for files here and below that programs have closed: the kernel tells of the last
        close only when that has returned.  False: one is open.
        """
        with trio.move_on_after(CLOSING_S):
            while True:
                found = [node for node in (self, *self.below()) if node.open_files]
                if not found:
                    return True
                if any(node.open_files > node.closing for node in found):
                    return False
                await trio.sleep(CLOSING_POLL_S)
        return False

    def let_go(self) -> None:
        """Nobody can come to it any more.

        What it refers to refers to it, too; the files of a deleted snapshot's layers are not to
        stay open, and take their space, until the collector comes by.
        """
        self.children = self.view = self.shape = self.folder = None
        self.make = self.made_size = self.prepare = self.refresh = self.changed = self.renew = None
        self.siblings = None


@dataclass(slots=True)
class Tree:
    """Every node by inode.  An inode's number is never used again for other content."""

    nodes: dict[int, Node] = field(default_factory=dict)
    _next: int = ROOT
    #: ends that a name's look-ups are answered elsewhere; how many were
    withdraw_name: Callable[[int, bytes], int] = lambda parent, name: 0
    _shown: dict[View, list[Node]] = field(default_factory=dict)

    def views(self) -> Iterator[View]:
        """Those that somebody may have open, or open."""
        for node in self.nodes.values():
            if node.view is not None:
                yield node.view

    def add(self, parent: Node | None, name: bytes, **what: object) -> Node:
        """Make a node, and let it take the name in its parent."""
        node = Node(self._next, **what)  # type: ignore[arg-type]
        self._next += 1
        self.nodes[node.inode] = node
        if parent is not None:
            assert parent.children is not None
            node.trouble = node.trouble or parent.trouble
            self.remove(parent, name)
            parent.children[name] = node
        return node

    def withdraw(self, node: Node) -> None:
        """Have look-ups of the node come here again, and its `lookups` be all of them."""
        if node.published is not None:
            node.lookups += self.withdraw_name(*node.published)
            node.published = None

    def give(self, node: Node, view: View) -> None:
        """The node shows this view from now on."""
        node.view = view
        self._shown.setdefault(view, []).append(node)

    def inodes_of(self, view: View) -> list[int]:
        """Of all nodes that show it."""
        return [node.inode for node in self._shown.get(view, ())]

    def share(self, parent: Node, name: bytes, node: Node) -> None:
        """Of two nodes with one view only one may be shown: the kernel has one cache of an inode,
        and what is written under one name is to be read under the other.

        If there is another one than `node` it takes the name.
        """
        assert node.view is not None
        for other in self._shown[node.view]:
            if other is not node and other.links:
                other.links += 1
                self.remove(parent, name)
                assert parent.children is not None
                parent.children[name] = other
                return

    def remove(self, parent: Node, name: bytes) -> None:
        """Take a name away, and all below it; who has them open keeps them."""
        assert parent.children is not None
        node = parent.children.pop(name, None)
        if node is not None:
            for child in list(node.children or ()):
                self.remove(node, child)
            self.withdraw(node)
            node.links -= 1
            self._drop_unused(node)

    def forget(self, inode: int, count: int) -> bool:
        """The kernel gives look-ups back.  True when the node is gone with that."""
        node = self.nodes.get(inode)
        if node is None:
            return False
        node.lookups -= count
        if node.published is None:
            node.lookups = max(0, node.lookups)
        return self._drop_unused(node)

    def _drop_unused(self, node: Node) -> bool:
        if node.links or node.lookups:
            return False
        del self.nodes[node.inode]
        if node.view is not None and (nodes := self._shown.get(node.view)) is not None:
            nodes.remove(node)
            if not nodes:
                del self._shown[node.view]
        node.let_go()
        return True
