"""The mtime of a target's file is that of the disk: what changes the one changes the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from imgfs._native import _map

BLOCK = _map.BLOCK
SIZE = 8 * BLOCK
LONG_AGO = 10**18


@dataclass
class Disk:
    """Blocks 0 and 1 are the target's, 2 is zero, the rest is the base's."""

    fd: int
    target: _map.Store
    map: _map.SegmentMap
    dirty: _map.SegmentMap
    base: _map.SegmentMap

    def moved(self, change: Callable[[], object]) -> tuple[bool, bool]:
        """Did the mtime change, and the count of changes?"""
        os.utime(self.fd, ns=(0, LONG_AGO))
        before = self.map.changes
        change()
        return os.fstat(self.fd).st_mtime_ns != LONG_AGO, self.map.changes != before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    base_path = tmp_path / "base"
    base_path.write_bytes(b"b" * SIZE)
    with base_path.open("rb") as file:
        store = _map.Store(file.fileno(), SIZE, whole=True)
    base = _map.SegmentMap(SIZE)
    base.set_store(0, SIZE, store, 0)
    fd = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, SIZE)
    target = _map.Store(fd, SIZE, whole=True)
    map, dirty = _map.SegmentMap(SIZE), _map.SegmentMap(SIZE)
    map.copy(0, base, 0, SIZE)
    map.set_target(target, dirty)
    assert map.write(0, b"t" * 2 * BLOCK)
    assert map.zero(2 * BLOCK, 3 * BLOCK)
    yield Disk(fd, target, map, dirty, base)
    os.close(fd)


def test_every_change_changes_it(disk: Disk) -> None:
    map = disk.map
    assert disk.moved(lambda: map.write(0, b"again")) == (True, True)
    assert disk.moved(lambda: map.write(5 * BLOCK, b"x" * BLOCK)) == (True, True)
    assert disk.moved(lambda: map.zero(0, BLOCK)) == (True, True)
    assert disk.moved(lambda: map.zero(0, BLOCK)) == (True, True)  # of what is a hole already
    assert disk.moved(lambda: map.below(BLOCK, 2 * BLOCK, disk.base)) == (True, True)
    assert disk.moved(lambda: map.move(6 * BLOCK, map, 5 * BLOCK, BLOCK)) == (True, True)


def test_what_is_read_or_refused_changes_nothing(disk: Disk) -> None:
    map = disk.map
    assert disk.moved(lambda: map.read(0, SIZE)) == (False, False)
    assert disk.moved(lambda: map.data_bytes()) == (False, False)
    assert disk.moved(lambda: map.write(3 * BLOCK + 1, b"inside")) == (False, False)
    map.set_target(None)
    assert disk.moved(lambda: map.write(0, b"no target")) == (False, False)


def test_giving_space_back_keeps_it(disk: Disk) -> None:
    """No byte of the disk changes with that."""
    map = disk.map
    assert map.below(0, 2 * BLOCK, disk.base)
    disk.dirty.take()
    before = os.fstat(disk.fd).st_blocks
    assert disk.moved(lambda: map.reclaim(0, 2 * BLOCK, disk.target, disk.dirty)) == (False, False)
    assert os.fstat(disk.fd).st_blocks < before
