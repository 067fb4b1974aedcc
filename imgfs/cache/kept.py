"""What is known of the blocks that a source's directory holds from one mount to the next.

`checks` has four bytes (little endian) a block:

    0       nothing: its bytes, if there are any, mean nothing
    1       all of the source's block is zero, and nothing is stored
    else    the CRC-32 (ISO 3309) of the block as the source has it; 0 and 1 are written as 2

An entry is written only after the block's bytes are durable.  What a block contains follows from
the source's identity, so an entry that survives its block's eviction is not wrong, only of no use:
the bytes no longer agree with it.  So nothing but the order "bytes, then entry" has to survive a
crash.  A block that is found here is *unverified* until its bytes were compared with its entry,
and only then present.

`extents` is the source's extent map: a CRC-32, the number of extents, their ends, their flags.

All functions here may wait for a disk, and are for a worker thread.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from isal import isal_zlib

from imgfs._native import _map
from imgfs.cache.directory import BLOCK, CacheDirectory
from imgfs.extents import ExtentList

ZERO = 1
_CHUNK = 1 << 16  # entries that are looked at in one go
_STEP = 256  # blocks that are verified in one go
_HEADER = struct.Struct("<IQ")

Run = tuple[int, int]  #: (first block, count)


def check_of(data: bytes | bytearray | memoryview) -> int:
    """A block's entry; data is all of the block."""
    return max(2, isal_zlib.crc32(data))


@dataclass(slots=True)
class Found:
    """What a directory holds: blocks to be verified, and such as are zero."""

    unverified: int = 0
    zeroes: list[Run] = field(default_factory=list)


class Kept:
    """The entries of one block store.  Raises OSError where the disk does."""

    def __init__(self, directory: CacheDirectory, size: int) -> None:
        self._directory = directory
        self._size = size
        self._count = -(-size // BLOCK)

    def load(self) -> Found:
        """Put entries and blocks in order, after whatever ended the last mount."""
        found = Found()
        stored = _Runs(_data_runs(self._directory.blocks, self._size))
        for first, entries in self._entries():
            good = array("I", bytes(4 * len(entries)))
            for index, entry in enumerate(entries):
                block = first + index
                if entry == ZERO:
                    good[index] = ZERO
                    _extend(found.zeroes, block)
                elif entry and stored.take(block):
                    good[index] = entry
                    found.unverified += 1
            if good != entries:
                self._write(first, good)
        for first, count in stored.rest():
            self._punch(first, count)
        return found

    def verify(self, store: _map.Store, first: int, count: int) -> tuple[list[Run], list[Run]]:
        """Which of the recorded blocks agree with their entries, and which do not."""
        good: list[Run] = []
        bad: list[Run] = []
        for block, entry in enumerate(self._read(first, count), first):
            if entry > ZERO:
                start = block * BLOCK
                data = store.read(start, min(BLOCK, self._size - start))
                _extend(good if check_of(data) == entry else bad, block)
        return good, bad

    def record(self, checks: dict[int, int]) -> None:
        """Write entries of blocks whose bytes are durable (see `sync_blocks`)."""
        blocks = sorted(checks)
        at = 0
        while at < len(blocks):
            to = at + 1
            while to < len(blocks) and blocks[to] == blocks[to - 1] + 1:
                to += 1
            self._write(blocks[at], array("I", (checks[b] for b in blocks[at:to])))
            at = to

    def forget(self, first: int, count: int) -> int:
        """Nothing is known of these any more; returns how many had been recorded as stored."""
        entries = self._read(first, count)
        recorded = sum(entry > ZERO for entry in entries)
        if any(entries):
            self._write(first, array("I", bytes(4 * count)))
        return recorded

    def recorded(self, most: int) -> list[Run]:
        """Up to about `most` blocks that are recorded as stored, whether verified or not."""
        runs: list[Run] = []
        for first, entries in self._entries():
            for index, entry in enumerate(entries):
                if entry > ZERO:
                    _extend(runs, first + index)
                    most -= 1
                    if most <= 0:
                        return runs
        return runs

    def verify_all(self) -> tuple[int, int]:
        """Verify every recorded block, and forget those that are bad; how many were either."""
        store = _map.Store(self._directory.blocks, self._size, BLOCK)
        totals = [0, 0]
        for first, entries in self._entries():
            for at in range(0, len(entries), _STEP):
                count = min(_STEP, len(entries) - at)
                good, bad = self.verify(store, first + at, count)
                totals[0] += sum(run[1] for run in good)
                for run in bad:
                    totals[1] += run[1]
                    self.forget(*run)
                    self._punch(*run)
        return totals[0], totals[1]

    def sync_blocks(self) -> None:
        os.fdatasync(self._directory.blocks)

    def load_extents(self) -> ExtentList | None:
        """The map that was saved, if it is whole and of the source's size."""
        try:
            data = (self._directory.path / "extents").read_bytes()
            check, count = _HEADER.unpack_from(data)
        except (OSError, struct.error):
            return None
        if len(data) != _HEADER.size + 9 * count or isal_zlib.crc32(data[4:]) != check:
            return None
        ends = _array("Q", data[_HEADER.size : _HEADER.size + 8 * count])
        found = ExtentList(0, ends, data[_HEADER.size + 8 * count :])
        return found if found.end == self._size else None

    def save_extents(self, extents: ExtentList) -> None:
        ends = array("Q", extents.ends)
        if sys.byteorder == "big":
            ends.byteswap()
        body = struct.pack("<Q", len(ends)) + ends.tobytes() + extents.flags
        new: Path = self._directory.path / "extents.new"
        new.write_bytes(struct.pack("<I", isal_zlib.crc32(body)) + body)
        new.replace(self._directory.path / "extents")

    def _entries(self) -> Iterator[tuple[int, array[int]]]:
        """(first block, entries) of all parts of the file that are not a hole."""
        for start, end in _data_ranges(self._directory.checks, 4 * self._count):
            for first in range(start // 4, -(-end // 4), _CHUNK):
                yield first, self._read(first, min(_CHUNK, -(-end // 4) - first))

    def _read(self, first: int, count: int) -> array[int]:
        data = os.pread(self._directory.checks, 4 * count, 4 * first)
        return _array("I", data + bytes(4 * count - len(data)))

    def _write(self, first: int, entries: array[int]) -> None:
        if sys.byteorder == "big":
            entries = entries[:]
            entries.byteswap()
        data = entries.tobytes()
        while data:
            done = os.pwrite(self._directory.checks, data, 4 * first + 4 * len(entries) - len(data))
            data = data[done:]

    def _punch(self, first: int, count: int) -> None:
        start = first * BLOCK
        with contextlib.suppress(OSError):
            store = _map.Store(self._directory.blocks, self._size, BLOCK)
            store.punch(start, min(count * BLOCK, self._size - start))


def _array(kind: str, data: bytes) -> array[int]:
    found = array(kind, data)
    if sys.byteorder == "big":
        found.byteswap()
    return found


def _data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    if size:
        ends, flags = _map.scan_file(fd, size)
        yield from ExtentList(0, ends, flags).data_ranges()


def _data_runs(fd: int, size: int) -> Iterator[Run]:
    """The blocks that are stored, whole or in part; ascending, each once."""
    at = 0
    for start, end in _data_ranges(fd, size):
        first, last = max(at, start // BLOCK), -(-end // BLOCK)
        if last > first:
            yield first, last - first
            at = last


def _extend(runs: list[Run], block: int) -> None:
    if runs and runs[-1][0] + runs[-1][1] == block:
        runs[-1] = (runs[-1][0], runs[-1][1] + 1)
    else:
        runs.append((block, 1))


class _Runs:
    """Blocks of ascending runs, asked for in ascending order; the rest is what was not."""

    def __init__(self, runs: Iterator[Run]) -> None:
        self._runs = runs
        self._first, self._count = next(runs, (0, 0))
        self._rest: list[Run] = []

    def take(self, block: int) -> bool:
        while self._count and block >= self._first:
            if block < self._first + self._count:
                if block > self._first:
                    self._rest.append((self._first, block - self._first))
                self._count -= block + 1 - self._first
                self._first = block + 1
                if not self._count:
                    self._first, self._count = next(self._runs, (0, 0))
                return True
            self._skip()
        return False

    def rest(self) -> list[Run]:
        while self._count:
            self._skip()
        return self._rest

    def _skip(self) -> None:
        self._rest.append((self._first, self._count))
        self._first, self._count = next(self._runs, (0, 0))
