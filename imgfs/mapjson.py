"""An extent map as the JSON that `qemu-img map --output=json` prints for a raw image."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from imgfs.extents import Extent, ExtentList, Flags

SECTOR = 512
#: what qemu-img says of an image without bytes
EMPTY = '{ "start": 0, "length": 0, "depth": 0, "present": false, "zero": false, "data": false}'


def lines(extents: ExtentList) -> Iterator[str]:
    """The text, an extent a piece.  Neighbours that read alike are one entry, as in qemu."""
    lead = "["
    for start, end, zero in _joined(extents):
        words = ("true", "false") if zero else ("false", "true")
        yield (
            f'{lead}{{ "start": {start}, "length": {end - start}, "depth": 0, "present": true, '
            f'"zero": {words[0]}, "data": {words[1]}, "offset": {start}}}'
        )
        lead = ",\n"
    if lead == "[":
        yield f"[{EMPTY}"
    yield "]\n"


def _joined(extents: ExtentList) -> Iterator[tuple[int, int, bool]]:
    current: tuple[int, int, bool] | None = None
    padding = -extents.end % SECTOR  # qemu's disks are whole sectors
    tail = [Extent(extents.end, extents.end + padding, Flags.ZERO)] if padding else []
    for extent in chain(extents, tail):
        if current is not None and current[2] == extent.is_zero:
            current = (current[0], extent.end, extent.is_zero)
            continue
        if current is not None:
            yield current
        current = (extent.start, extent.end, extent.is_zero)
    if current is not None:
        yield current
