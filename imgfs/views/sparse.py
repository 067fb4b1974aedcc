"""A disk without the blocks that its filesystems no longer use: those read as zeroes."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence

from imgfs.guest.disk import Guest, look_at_disk
from imgfs.pieces import PieceList, PieceListBuilder
from imgfs.views.drive import drive
from imgfs.views.planned import PlannedView
from imgfs.views.view import View

STEP = 1 << 16  # free ranges that are planned at once


async def look(disk: View) -> Guest:
    """What is on the disk.  Raises what reading it raises."""
    return await drive(look_at_disk(disk.size), [disk])


class SparseView(PlannedView):
    """`free` are ranges of the disk: start, end, start, end, ascending and apart."""

    def __init__(self, name: str, disk: View, free: Sequence[int]) -> None:
        """Raises ValueError when the ranges are not such."""
        super().__init__(name, disk.size, disk, [disk])
        self._starts = array("Q", free[::2])
        self._ends = array("Q", free[1::2])
        reach = -1
        for start, end in zip(self._starts, self._ends, strict=True):
            if not reach < start < end <= disk.size:
                raise ValueError(f"[{start}, {end}) is not a free range after {reach}")
            reach = end

    async def _plan(self, offset: int, length: int) -> PieceList:
        builder = PieceListBuilder(offset)
        index = bisect_right(self._ends, offset)
        for each in range(index, min(index + STEP, len(self._starts))):
            start, end = self._starts[each], self._ends[each]
            if start >= offset + length:
                break
            if start > builder.end:
                builder.data(start, builder.end)
            builder.zero(end)
        else:
            if index + STEP < len(self._starts):
                return builder.finish(builder.end)
        if builder.end < offset + length:
            builder.data(offset + length, builder.end)
        return builder.finish(builder.end)

    async def _check(self) -> None:
        await self.files[0].check()
