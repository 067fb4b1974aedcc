"""A disk as the file of a format: generated as it is read, its data passed through."""

from __future__ import annotations

from imgfs.formats.layout import Layout
from imgfs.pieces import PieceList
from imgfs.views.planned import PlannedView
from imgfs.views.view import View

LEAST_STEP = 4 << 20  # bytes of the file that are planned at once; its tables are made for that
MOST_STEP = 256 << 20
FEW_PIECES = 4096
FEW_LITERALS = 1 << 20  # bytes


class EncodedView(PlannedView):
    """The layout's file of the disk."""

    def __init__(
        self, name: str, disk: View, layout: Layout, stored_bytes: int | None = None
    ) -> None:
        """`stored_bytes`, where they are known, need not be measured."""
        super().__init__(name, layout.size, disk, [disk])
        if stored_bytes is not None:
            self.stored_bytes = stored_bytes
            self._is_measured = True
        self._layout = layout
        self._step = LEAST_STEP

    async def _plan(self, offset: int, length: int) -> PieceList:
        pieces = self._layout.map(offset, min(length, self._step))
        if len(pieces) < FEW_PIECES and pieces.literal_bytes < FEW_LITERALS:
            self._step = min(2 * self._step, MOST_STEP)
        else:
            self._step = LEAST_STEP
        return pieces

    async def _planned(self, offset: int, end: int) -> PieceList:
        # Made again sooner than kept: the tables of a thousand files would fill the memory.
        return await self._plan(offset, end - offset)

    def _known(self, offset: int) -> PieceList | None:
        return self._layout.map(offset, min(self.size - offset, LEAST_STEP))

    async def _check(self) -> None:
        await self.files[0].check()
