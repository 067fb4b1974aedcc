"""A disk as the file of a format: generated as it is read, its data passed through."""

from __future__ import annotations

from imgfs.formats.layout import Layout
from imgfs.pieces import PieceList
from imgfs.views.planned import PlannedView
from imgfs.views.view import View

STEP = 256 << 20  # of the file that is planned at once; its tables are made for that


class EncodedView(PlannedView):
    """The layout's file of the disk."""

    def __init__(self, name: str, disk: View, layout: Layout) -> None:
        super().__init__(name, layout.size, disk, [disk])
        self._layout = layout

    async def _plan(self, offset: int, length: int) -> PieceList:
        return self._layout.map(offset, min(length, STEP))

    async def _planned(self, offset: int, end: int) -> PieceList:
        # Made again sooner than kept: the tables of a thousand files would fill the memory.
        return await self._plan(offset, end - offset)

    async def _check(self) -> None:
        await self.files[0].check()
