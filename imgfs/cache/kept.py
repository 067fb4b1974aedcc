"""What is known of the blocks that a source's directory holds from one mount to the next.

`checks` has an entry a block (entries.py).  An entry is written only after the block's bytes are
durable.  What a block contains follows from the source's identity, so an entry that survives its
block's eviction is not wrong, only of no use: the bytes no longer agree with it.  So nothing but
the order "bytes, then entry" has to survive a crash, and what of the entries a crash tears is
lost and claims nothing.  A block that is found here is *unverified* until its bytes were compared
with its entry, and only then present: nobody reads it before.

`extents` is the source's extent map: a checksum, the number of extents, their ends, their flags.
The checksum depends on the directory's key, too: the map of another source, or of another state
of this one, is none.

All functions here may wait for a disk, and are for a worker thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from imgfs._native import _map
from imgfs.cache.directory import BLOCK, CacheDirectory
from imgfs.cache.entries import NOTHING, Codec, decode, encode
from imgfs.cache.entries import SIZE as ENTRY_SIZE
from imgfs.checksums import checksum
from imgfs.extents import ExtentList

log = logging.getLogger(__name__)

_CHUNK = 1 << 16  # entries that are looked at in one go
_STEP = 256  # blocks that are verified in one go
_HEADER = struct.Struct("<QQ")

Run = tuple[int, int]  #: (first block, count)


@dataclass(slots=True)
class Found:
    """What a directory holds: blocks to be verified, and such as are zero."""

    unverified: int = 0
    zeroes: list[Run] = field(default_factory=list)


class Kept:
    """The entries of one block store, whose file is `path`.  Raises OSError where the disk does."""

    def __init__(self, directory: CacheDirectory, size: int) -> None:
        self._directory = directory
        self._size = size
        self._count = -(-size // BLOCK)
        self.path = directory.path / "blocks"
        self.codec = Codec(directory.key)

    def load(self) -> Found:
        """Put entries and blocks in order, after whatever ended the last mount."""
        found = Found()
        stored = _Runs(_data_runs(self._directory.blocks, self._size))
        for first, entries in self._entries():
            good = _nothing(len(entries))
            for index, entry in enumerate(entries):
                if entry == NOTHING:
                    continue
                block = first + index
                if entry == self.codec.zero_entry(block):
                    good[index] = entry
                    _extend(found.zeroes, block)
                elif stored.take(block):
                    good[index] = entry
                    found.unverified += 1
            if good != entries:
                self._write(first, good)
        for first, count in stored.rest():
            self._punch(first, count)
        return found

    def verify(self, store: _map.Store, first: int, count: int) -> tuple[list[Run], list[Run]]:
        """Which of the recorded blocks agree with their entries, and which do not.

        A block, or a part of `checks`, that cannot be read any more agrees with nothing.
        """
        good: list[Run] = []
        bad: list[Run] = []
        for block, entry in enumerate(self._read(first, count), first):
            if self._is_stored(block, entry):
                _extend(good if self._agrees(store, block, entry) else bad, block)
        return good, bad

    def _is_stored(self, block: int, entry: int) -> bool:
        return entry != NOTHING and entry != self.codec.zero_entry(block)

    def _agrees(self, store: _map.Store, block: int, entry: int) -> bool:
        start = block * BLOCK
        try:
            data = store.read(start, min(BLOCK, self._size - start))
        except OSError as exc:
            log.warning("%s: at %d: %s", self.path, start, exc.strerror)
            return False
        return self.codec.entry_of(block, data) == entry

    def record(self, checks: dict[int, int]) -> None:
        """Write entries of blocks whose bytes are durable (see `sync_blocks`)."""
        blocks = sorted(checks)
        at = 0
        while at < len(blocks):
            to = at + 1
            while to < len(blocks) and blocks[to] == blocks[to - 1] + 1:
                to += 1
            self._write(blocks[at], array("Q", (checks[b] for b in blocks[at:to])))
            at = to

    def forget(self, first: int, count: int) -> None:
        """Nothing is known of these any more."""
        if any(self._read(first, count)):
            self._write(first, _nothing(count))

    def recorded(self, most: int) -> list[Run]:
        """Up to about `most` blocks that are recorded as stored, whether verified or not."""
        runs: list[Run] = []
        for first, entries in self._entries():
            for index, entry in enumerate(entries):
                if self._is_stored(first + index, entry):
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
        """The map that was saved, if it is whole, of this directory and of the source's size."""
        try:
            data = (self._directory.path / "extents").read_bytes()
        except OSError:
            return None
        return self._decode_extents(data)

    def check_extents(self) -> bool:
        """False: a map was saved, and is damaged; it is removed."""
        path = self._directory.path / "extents"
        if not path.exists() or self.load_extents() is not None:
            return True
        path.unlink()
        return False

    def _decode_extents(self, data: bytes) -> ExtentList | None:
        if len(data) < _HEADER.size:
            return None
        check, count = _HEADER.unpack_from(data)
        if len(data) != _HEADER.size + 9 * count or self._check_of_extents(data[8:]) != check:
            return None
        ends = decode(data[_HEADER.size : _HEADER.size + 8 * count])
        flags = data[_HEADER.size + 8 * count :]
        if (ends[-1] if ends else 0) != self._size:
            return None
        return ExtentList(0, ends, flags)

    def _check_of_extents(self, body: bytes) -> int:
        return checksum(body, self._directory.key)

    def save_extents(self, extents: ExtentList) -> None:
        ends = array("Q", extents.ends)
        body = struct.pack("<Q", len(ends)) + encode(ends) + extents.flags
        new: Path = self._directory.path / "extents.new"
        new.write_bytes(struct.pack("<Q", self._check_of_extents(body)) + body)
        new.replace(self._directory.path / "extents")

    def _entries(self) -> Iterator[tuple[int, array[int]]]:
        """(first block, entries) of all parts of the file that are not a hole."""
        for start, end in _data_ranges(self._directory.checks, ENTRY_SIZE * self._count):
            last = -(-end // ENTRY_SIZE)
            for first in range(start // ENTRY_SIZE, last, _CHUNK):
                yield first, self._read(first, min(_CHUNK, last - first))

    def _read(self, first: int, count: int) -> array[int]:
        """What cannot be read is not known."""
        size = ENTRY_SIZE * count
        try:
            data = os.pread(self._directory.checks, size, ENTRY_SIZE * first)
        except OSError as exc:
            log.warning("%s: %s", self._directory.path / "checks", exc.strerror)
            data = b""
        return decode(data + bytes(size - len(data)))

    def _write(self, first: int, entries: array[int]) -> None:
        data, at = encode(entries), ENTRY_SIZE * first
        while data:
            done = os.pwrite(self._directory.checks, data, at)
            data, at = data[done:], at + done

    def _punch(self, first: int, count: int) -> None:
        start = first * BLOCK
        with contextlib.suppress(OSError):
            store = _map.Store(self._directory.blocks, self._size, BLOCK)
            store.punch(start, min(count * BLOCK, self._size - start))


def _nothing(count: int) -> array[int]:
    return array("Q", bytes(ENTRY_SIZE * count))


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
