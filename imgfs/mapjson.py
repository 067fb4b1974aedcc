"""An extent map as the JSON that `qemu-img map --output=json` prints for a raw image."""

from __future__ import annotations

from collections.abc import Iterator

from imgfs.extents import ExtentList


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
    yield "]\n" if lead != "[" else "[]\n"


def _joined(extents: ExtentList) -> Iterator[tuple[int, int, bool]]:
    current: tuple[int, int, bool] | None = None
    for extent in extents:
        if current is not None and current[2] == extent.is_zero:
            current = (current[0], extent.end, extent.is_zero)
            continue
        if current is not None:
            yield current
        current = (extent.start, extent.end, extent.is_zero)
    if current is not None:
        yield current
