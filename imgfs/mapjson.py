"""An extent map as the JSON that `qemu-img map --output=json` prints for a raw image."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from imgfs.extents import ExtentList, Flags

SECTOR = 512
AT_ONCE = 1000  # extents, of which there may be millions: what is written by ones takes longer
#: what qemu-img says of an image without bytes
EMPTY = '{ "start": 0, "length": 0, "depth": 0, "present": false, "zero": false, "data": false}'
_ENTRIES = tuple(
    f'{{ "start": %d, "length": %d, "depth": 0, "present": true, {what}, "offset": %d}}'
    for what in ('"zero": false, "data": true', '"zero": true, "data": false')
)
# By a byte of flags: does it read as zeroes?
_IS_ZERO = bytes(bool(flags & int(Flags.ZERO)) for flags in range(256))


def lines(extents: ExtentList) -> Iterator[str]:
    """The text, in pieces of many extents.  Neighbours that read alike are one entry, as in
    qemu."""
    lead, entries = "[", list[str]()
    for start, end, zero in _joined(extents):
        entries.append(_ENTRIES[zero] % (start, end - start, start))
        if len(entries) == AT_ONCE:
            yield lead + ",\n".join(entries)
            lead, entries = ",\n", []
    if entries or lead == "[":
        yield lead + ",\n".join(entries or [EMPTY])
    yield "]\n"


def _joined(extents: ExtentList) -> Iterator[tuple[int, int, int]]:
    """Start, end, and 1 where it reads as zeroes, else 0."""
    padding = -extents.end % SECTOR  # qemu's disks are whole sectors
    tail = [(extents.end + padding, 1)] if padding else []
    kinds = extents.flags.translate(_IS_ZERO)
    at = begun = extents.start
    kind = -1
    for end, following in chain(zip(extents.ends, kinds, strict=True), tail):
        if following != kind:
            if kind >= 0:
                yield begun, at, kind
            begun, kind = at, following
        at = end
    if kind >= 0:
        yield begun, at, kind
