"""Why a filesystem has to be left whole, and reading that has no patience with missing bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from imgfs.steps import Read, Steps, read_all

BATCH = 16 << 20  # bytes that are asked for at once


class Doubt(Exception):
    """Why what a filesystem says is free cannot be trusted, with field and value."""


class NotShutDown(Doubt):
    """The filesystem was in use when its disk stopped: a guest may go on with it."""


def read_whole(reads: Sequence[Read]) -> Steps[list[bytes]]:
    """As `read_all`; raises Doubt where the disk ends before a read does."""
    found = yield from read_all(reads)
    for each, data in zip(reads, found, strict=True):
        if len(data) < each.length:
            raise Doubt(f"the disk ends before byte {each.offset + each.length}")
    return found


def batches(reads: Sequence[Read]) -> Iterator[Sequence[Read]]:
    """The reads, in order, in batches of at most BATCH bytes; none may be larger than that."""
    first = asked = 0
    for index, each in enumerate(reads):
        if asked + each.length > BATCH:
            yield reads[first:index]
            first, asked = index, 0
        asked += each.length
    if first < len(reads):
        yield reads[first:]
