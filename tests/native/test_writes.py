"""Writing through a segment map against a bytearray, with a log kept as an overlay keeps it."""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgfs._native import _map

BLOCK = _map.BLOCK
BLOCKS = 6
SIZE = BLOCKS * BLOCK + 700
COUNT = 1000 if os.environ.get("IMGFS_TEST_LONG") else 100
WHATS = ["write", "write", "partial", "zero", "fill", "resize", "sync", "failed sync", "freeze"]
WHATS += ["below", "move"]

steps = st.lists(
    st.tuples(
        st.sampled_from(WHATS), st.integers(0, SIZE), st.integers(1, 3 * BLOCK), st.integers(1, 255)
    ),
    max_size=25,
)


@dataclass
class Layer:
    store: _map.Store
    fd: int
    dirty: _map.SegmentMap
    log: list[tuple[int, int, int]] = field(default_factory=list)


class Disk:
    """A writable map over a base, and beside it what it must read as."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base = bytes((i * i + 13) % 256 for i in range(SIZE))
        path = directory / "base"
        path.write_bytes(self.base)
        with path.open("rb") as file:
            self.base_store = _map.Store(file.fileno(), SIZE, whole=True)
        self.map = _map.SegmentMap(SIZE)
        self.model = bytearray(self.base)
        self.layers: list[Layer] = []
        self.add_layer()

    def add_layer(self) -> None:
        fd = os.open(self.directory / f"layer{len(self.layers)}", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, self.map.size)
        store = _map.Store(fd, self.map.size, whole=True)
        self.layers.append(Layer(store, fd, _map.SegmentMap(self.map.size)))
        self.map.set_target(store, self.layers[-1].dirty)

    def close(self) -> None:
        for layer in self.layers:
            os.close(layer.fd)

    def read(self, start: int, end: int) -> bytes:
        data = self.map.read(start, end - start)
        if data is None:
            self.map.fill_store(start, min(end, SIZE), self.base_store, start)
            data = self.map.read(start, end - start)
            assert data is not None
        return data

    def copy_up(self, block: int) -> None:
        end = min(block + BLOCK, self.map.size)
        assert self.map.copy_up(block, self.read(block, end))

    def write(self, start: int, data: bytes) -> None:
        end = start + len(data)
        if not self.map.write(start, data):
            assert start % BLOCK or end % BLOCK
            for block in {start // BLOCK * BLOCK, end // BLOCK * BLOCK}:
                if block < self.map.size:
                    self.copy_up(block)
            assert self.map.write(start, data)
        self.model[start:end] = data

    def resize(self, size: int) -> None:
        top, old = self.layers[-1], self.map.size
        if size < old:
            self.map.resize(size)
            top.store.quiesce()
            top.store.resize(size)
            os.ftruncate(top.fd, size)
        else:
            os.ftruncate(top.fd, size)
            top.store.resize(size)
            self.map.resize(size)
            if old % BLOCK and size > old:
                self.copy_up(old // BLOCK * BLOCK)
        self.model[size:] = bytes(max(0, size - old))

    def sync(self, fail: bool) -> None:
        top = self.layers[-1]
        taken = top.dirty.take()
        if fail:
            top.dirty.fill(*taken, top.store)
            assert top.dirty.take() == taken
            top.dirty.fill(*taken, top.store)
            return
        assert top.dirty.take() == (array("Q"), array("Q"), b"")
        top.log += zip(*taken, strict=True)
        for start, end, kind in zip(*taken, strict=True):
            if kind == _map.BELOW:
                self.map.reclaim(start, end, top.store, top.dirty)
                assert not any(os.pread(top.fd, end - start, start))

    def lower(self) -> _map.SegmentMap:
        """What is below the top; ASK is the base's."""
        size = self.map.size
        found = _map.SegmentMap(size)
        if size > SIZE:
            found.set_zero(SIZE, size)
        for layer in self.layers[:-1]:
            under = _map.SegmentMap(size)
            if size:
                under.copy(0, found, 0, size)
            for start, end, kind in layer.log:
                end = min(end, size)
                if start >= end:
                    continue
                if kind == _map.STORE:
                    found.set_store(start, end, layer.store, start)
                elif kind == _map.ZERO:
                    found.set_zero(start, end)
                else:
                    found.copy(start, under, start, end - start)
        return found

    def below(self, start: int, end: int) -> None:
        content = self.logged(self.layers[:-1])[start:end]
        assert self.map.below(start, end, self.lower())
        self.model[start:end] = content

    def move(self, start: int, end: int, source: int) -> None:
        """Copy what there is of it in files, to the range from somewhere else."""
        length = min(end - start, self.map.size - source)
        length -= length % BLOCK
        if abs(source - start) < length:
            return
        moved = self.map.move(start, self.map, source, length)
        assert moved is not None and moved % BLOCK == 0 and moved <= length
        assert moved <= self.map.stored(source, length)
        self.model[start : start + moved] = self.model[source : source + moved]

    def do(self, what: str, start: int, length: int, byte: int) -> None:
        size = self.map.size
        start = min(start, size)
        if what == "resize":
            self.resize(min(start + length, SIZE + 2 * BLOCK))
        elif what == "partial":
            self.write(start, bytes([byte]) * min(length, size - start))
        elif what == "fill":
            self.map.fill_store(start, min(start + length, SIZE), self.base_store, start)
        elif what in {"sync", "failed sync"}:
            self.sync(what == "failed sync")
        elif what == "freeze":
            self.map.set_target(None)
            assert not self.map.writable and not self.map.write(0, b"x")
            self.sync(False)
            self.add_layer()
        else:
            start = start // BLOCK * BLOCK
            end = min(start + -(-length // BLOCK) * BLOCK, size)
            if what == "below":
                self.below(start, end)
            elif what == "move":
                self.move(start, end, byte * 100 % max(1, size))
            elif what == "write":
                self.write(start, bytes([byte]) * (end - start))
            else:
                assert self.map.zero(start, end)
                self.model[start:end] = bytes(end - start)

    def check_seek(self) -> None:
        at = 0
        while at < self.map.size:
            found = self.map.seek(at, os.SEEK_HOLE)
            if found is None:
                return
            for start, end, _, seek in self.map.segments(found, self.map.size - found):
                if seek == _map.HOLE:
                    assert not any(self.model[start:end])
            at = found + 1

    def logged(self, layers: list[Layer]) -> bytearray:
        """What these layers are by their files and logs."""
        result = bytearray(self.base.ljust(self.map.size, b"\0")[: self.map.size])
        for layer in layers:
            under = bytes(result)
            for start, end, kind in layer.log:
                end = min(end, self.map.size)
                if start < end and kind == _map.BELOW:
                    result[start:end] = under[start:end]
                elif start < end:
                    data = os.pread(layer.fd, end - start, start)
                    result[start:end] = data if kind == _map.STORE else bytes(end - start)
        return result

    def check_logs(self) -> None:
        """What is left after a crash: the files as they are, and the logs."""
        self.sync(False)
        assert self.logged(self.layers) == self.model


@settings(max_examples=COUNT, deadline=None)
@given(steps=steps)
def test_writes_equal_model(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int, int]]
) -> None:
    disk = Disk(tmp_path_factory.mktemp("disk"))
    for step in steps:
        disk.do(*step)
        disk.check_seek()
    try:
        assert disk.map.size == len(disk.model)
        assert disk.read(0, disk.map.size) == disk.model
        disk.check_logs()
    finally:
        disk.close()


def test_full_disk_changes_nothing(tmp_path: Path) -> None:
    with Path("/dev/full").open("r+b", buffering=0) as file:
        full = _map.Store(file.fileno(), SIZE, whole=True)
    m, dirty = _map.SegmentMap(SIZE), _map.SegmentMap(SIZE)
    m.set_target(full, dirty)
    with pytest.raises(OSError, match="No space left"):
        m.write(0, bytes(BLOCK))
    assert m.segments(0, SIZE) == dirty.segments(0, SIZE) == [(0, SIZE, _map.ASK, _map.UNKNOWN)]
    assert (m.writes, m.bytes_written) == (0, 0)


def test_sync_is_enough_only_when_all_is_accounted_for(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    dirty = disk.layers[-1].dirty
    assert disk.map.sync()
    disk.write(0, b"1" * BLOCK)
    assert not disk.map.sync()
    taken = dirty.take()
    assert not disk.map.sync()
    dirty.fill(*taken, disk.layers[-1].store)
    dirty.settle()
    assert not disk.map.sync()
    dirty.take()
    dirty.settle()
    assert disk.map.sync()
    disk.write(5, b"2")
    assert disk.map.sync()
    disk.resize(100)
    assert not disk.map.sync()
    dirty.settle()
    assert disk.map.sync()
    disk.map.set_target(None)
    assert not disk.map.sync()
    disk.close()


def test_a_million_ranges(tmp_path: Path) -> None:
    count, path = 1_000_000, tmp_path / "data"
    with path.open("w+b") as file:
        file.truncate(count * 2 * BLOCK)
        store = _map.Store(file.fileno(), count * 2 * BLOCK, whole=True)
    m = _map.SegmentMap(count * 2 * BLOCK)
    starts = array("Q", range(0, count * 2 * BLOCK, 2 * BLOCK))
    ends = array("Q", range(BLOCK, count * 2 * BLOCK, 2 * BLOCK))
    kinds = bytes([_map.STORE, _map.ZERO]) * (count // 2)
    m.fill(starts, ends, kinds, store)
    assert len(m) == 2 * count
    assert m.take() == (starts, ends, kinds)
    assert len(m) == 1


def test_fill_leaves_what_is_known() -> None:
    m = _map.SegmentMap(SIZE)
    m.set_literal(100, b"abc")
    m.fill_literal(98, b"0123456789")
    assert m.read(98, 10) == b"01abc56789"
    m.fill_zero(0, SIZE + 5, data=True)
    assert m.read(98, 10) == b"01abc56789"
    assert m.segments(0, SIZE)[0] == (0, 98, _map.ZERO, _map.DATA)
    with pytest.raises(ValueError, match="outside"):
        m.fill(array("Q", [0]), array("Q", [1]), bytes([_map.STORE]))


def test_fill_copy_leaves_what_is_known() -> None:
    m, other = _map.SegmentMap(100), _map.SegmentMap(100)
    other.set_literal(0, bytes(range(50)))
    other.set_zero(50, 80)
    m.set_literal(40, b"x" * 20)
    m.fill_copy(0, other, 0, 100)
    assert m.read(0, 80) == bytes(range(40)) + b"x" * 20 + bytes(20)
    assert m.segments(80, 20) == [(80, 100, _map.ASK, _map.UNKNOWN)]


def test_targets_that_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "data").open("w+b") as file:
        file.truncate(SIZE)
        blocks = _map.Store(file.fileno(), SIZE)
        whole = _map.Store(file.fileno(), SIZE, whole=True)
    m = _map.SegmentMap(SIZE)
    for store, dirty in [(blocks, None), (whole, m), (whole, _map.SegmentMap(1))]:
        with pytest.raises(ValueError, match="outside"):
            m.set_target(store, dirty)
    assert not m.writable
    with pytest.raises(ValueError, match="outside"):
        blocks.resize(5)
