"""`sparse/` and `partitions/`: what is known of a disk's filesystems, as files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from imgfs.guest.disk import Guest
from imgfs.locks import Lock
from imgfs.tree.formats import FormatNodes, Showing, Shown
from imgfs.tree.names import encode, shown
from imgfs.tree.nodes import Node
from imgfs.views.slice import SliceView, parts_of
from imgfs.views.sparse import SparseView, look
from imgfs.views.view import View

log = logging.getLogger(__name__)


class GuestNodes:
    """The two directories of one disk.  Nothing is read before somebody looks at a name in them."""

    def __init__(self, showing: Showing, directory: Node, name: Callable[[], str]) -> None:
        """`name` is the disk's, and that of the files in sparse/ when somebody looks first."""
        self._showing = showing
        self._looking = Lock()
        self._known: tuple[View, Guest] | None = None
        self._sparse: tuple[View, Shown] | None = None
        sparse = showing.tree.add(directory, b"sparse", children={})

        async def look_into() -> None:
            if not sparse.children:
                makers = {".raw": _as_it_is, **showing.makers}
                sparsified = replace(showing, makers=makers, current=self._sparsified)
                FormatNodes(sparsified, sparse, name())

        sparse.refresh = look_into
        self._partitions = showing.tree.add(directory, b"partitions", children={})
        self._partitions.refresh = self._refresh
        self._ranges: dict[bytes, list[tuple[int, int]]] = {}

    @property
    def guest(self) -> Guest | None:
        """What was found on the disk as it is now, if somebody has looked."""
        return None if self._known is None or self._known[0].stale else self._known[1]

    async def _look(self) -> tuple[Shown, Guest]:
        current = await self._showing.current()
        async with self._looking:
            if self._known is None or self._known[0] is not current.disk:
                guest = await look(current.disk)
                for what, why in guest.reasons():
                    log.info("%s: %s is left whole: %s", current.disk.name, what, why)
                self._known = current.disk, guest
            return current, self._known[1]

    async def _sparsified(self) -> Shown:
        current, guest = await self._look()
        if self._sparse is None or self._sparse[0] is not current.disk:
            disk = SparseView(current.disk.name, current.disk, guest.free)
            self._sparse = current.disk, Shown(disk, "sparse " + current.identity)
        return self._sparse[1]

    async def _refresh(self) -> None:
        """Show the partitions and volumes that there are now."""
        _, guest = await self._look()
        found = {encode(shown(name) + ".raw"): ranges for name, ranges in parts_of(guest).items()}
        children = self._partitions.children
        assert children is not None
        for name in [name for name in children if found.get(name) != self._ranges.get(name)]:
            self._showing.tree.remove(self._partitions, name)
        self._ranges = found
        for name, ranges in found.items():
            if name not in children:
                self._add(name, ranges)

    def _add(self, name: bytes, ranges: list[tuple[int, int]]) -> None:
        async def make(current: Shown, text: str) -> View:
            return SliceView(text, current.disk, ranges)

        showing = replace(self._showing, makers={"": make})
        FormatNodes(showing, self._partitions, name.decode("utf-8", "surrogateescape"))


async def _as_it_is(current: Shown, name: str) -> View:
    return current.disk
