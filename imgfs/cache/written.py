"""What was fetched, written into a block store: what is zero is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from imgfs._native import _map
from imgfs.cache.directory import BLOCK
from imgfs.cache.entries import Codec
from imgfs.cache.kept import Run
from imgfs.image import Buffer

Part: TypeAlias = tuple[int, Buffer]  #: an offset in bytes, and the source's bytes from there


@dataclass(slots=True)
class Written:
    """What became of some parts: blocks stored, ranges of zeroes in bytes, entries by block."""

    blocks: list[Run] = field(default_factory=list)
    zeroes: list[tuple[int, int]] = field(default_factory=list)
    checks: dict[int, int] = field(default_factory=dict)


def write_parts(
    store: _map.Store, runs: list[Run], parts: list[Part], codec: Codec | None
) -> Written:
    """In a thread: write what is not zero.  `parts` are all data of the blocks in `runs`.

    With `codec` there are entries of them.
    """
    written = Written()
    for offset, data in parts:
        blocks, zeroes = store.write_nonzero(offset, data)
        written.blocks += blocks
        written.zeroes += zeroes
    if codec is not None:
        checks = written.checks
        for first, count in written.blocks:
            for block in range(first, first + count):
                checks[block] = codec.entry_of(block, _content(block, store.size, parts))
        for first, count in runs:
            for block in range(first, first + count):
                if block not in checks:
                    checks[block] = codec.zero_entry(block)
    return written


def _content(block: int, size: int, parts: list[Part]) -> Buffer:
    """All of a block: what is in no part is zero."""
    start, end = block * BLOCK, min((block + 1) * BLOCK, size)
    for offset, data in parts:
        if offset <= start and end <= offset + len(data):
            return memoryview(data)[start - offset : end - offset]
    whole = bytearray(end - start)
    for offset, data in parts:
        a, b = max(start, offset), min(end, offset + len(data))
        if a < b:
            whole[a - start : b - start] = memoryview(data)[a - offset : b - offset]
    return whole
