"""A part of a disk, or several parts one behind the other: a partition, a logical volume."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from imgfs.guest.disk import Guest
from imgfs.pieces import PieceList, PieceListBuilder
from imgfs.views.planned import PlannedView
from imgfs.views.view import View

MOST_PARTS = 1 << 18  # of a striped volume


def parts_of(guest: Guest) -> dict[str, list[tuple[int, int]]]:
    """The ranges of the disk's partitions, by number, and of its volumes, by name."""
    found = {
        str(each.number): [(each.start, each.start + each.size)]
        for each in guest.partitions
        if each.is_there
    }
    for volume in guest.volumes:
        pieces = sum(-(-each.size // each.stripe_size) for each in volume.segments)
        if 0 < pieces <= MOST_PARTS:
            found[volume.name] = [part for each in volume.segments for part in each.ranges()]
    return found


class SliceView(PlannedView):
    """The ranges [start, end) of the disk, in this order."""

    def __init__(self, name: str, disk: View, ranges: Sequence[tuple[int, int]]) -> None:
        """Raises ValueError when a range is empty, or not inside of the disk."""
        for start, end in ranges:
            if not 0 <= start < end <= disk.size:
                raise ValueError(f"[{start}, {end}) is not a part of {disk.size} bytes")
        lengths = [end - start for start, end in ranges]
        super().__init__(name, sum(lengths), disk, [disk])
        self._parts = list(zip(accumulate(lengths), ranges, strict=True))

    async def _plan(self, offset: int, length: int) -> PieceList:
        builder = PieceListBuilder(0)
        for end, (start, _) in self._parts:
            builder.data(end, start)
        return builder.finish(builder.end)

    async def _check(self) -> None:
        await self.files[0].check()
