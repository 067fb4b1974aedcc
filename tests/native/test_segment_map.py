"""The segment map against a naive model: one entry a byte."""

from __future__ import annotations

import errno
import itertools
import os
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgfs._native import _map

SIZE = 600
COUNT = 2000 if os.environ.get("IMGFS_TEST_LONG") else 200

ranges = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda t: (min(t), max(t)))
steps = st.lists(
    st.tuples(st.sampled_from(["zero", "zero-data", "ask", "literal", "store"]), ranges),
    max_size=40,
)


class Model:
    """Byte by byte: (kind, seek, value), value None where only Python knows."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.cells: list[tuple[int, int, int | None]] = [(_map.ASK, _map.UNKNOWN, None)] * SIZE

    def apply(self, what: str, start: int, end: int) -> None:
        for i in range(start, end):
            self.cells[i] = {
                "zero": (_map.ZERO, _map.HOLE, 0),
                "zero-data": (_map.ZERO, _map.DATA, 0),
                "ask": (_map.ASK, _map.DATA, None),
                "literal": (_map.LITERAL, _map.DATA, (i * 7 + end) % 251),
                "store": (_map.STORE, _map.DATA, self.content[i]),
            }[what]

    def read(self, start: int, end: int) -> bytes | None:
        values = [cell[2] for cell in self.cells[start:end]]
        return None if None in values else bytes(v for v in values if v is not None)


def apply(m: _map.SegmentMap, store: _map.Store, what: str, start: int, end: int) -> None:
    if what == "zero":
        m.set_zero(start, end)
    elif what == "zero-data":
        m.set_zero(start, end, data=True)
    elif what == "ask":
        m.set_ask(start, end, _map.DATA)
    elif what == "literal":
        m.set_literal(start, bytes((i * 7 + end) % 251 for i in range(start, end)))
    else:
        m.set_store(start, end, store, start)


def native_seek(m: _map.SegmentMap, offset: int, whence: int) -> int | None:
    try:
        return m.seek(offset, whence)
    except OSError as exc:
        assert exc.errno is not None
        return -exc.errno


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    data = bytes((i * i + 13) % 256 for i in range(SIZE))
    path = tmp_path_factory.mktemp("store") / "file"
    path.write_bytes(data)
    return data, path


@settings(max_examples=COUNT, deadline=None)
@given(steps=steps, probe=ranges)
def test_map_equals_model(
    content: tuple[bytes, Path], steps: list[tuple[str, tuple[int, int]]], probe: tuple[int, int]
) -> None:
    data, path = content
    with path.open("rb") as file:
        store = _map.Store(file.fileno(), SIZE, whole=True)
    m, model = _map.SegmentMap(SIZE), Model(data)
    for what, (start, end) in steps:
        apply(m, store, what, start, end)
        model.apply(what, start, end)
    segments = m.segments(0, SIZE)
    assert [(kind, seek) for a, b, kind, seek in segments for _ in range(a, b)] == [
        cell[:2] for cell in model.cells
    ]
    assert len(m) == len(segments)
    start, end = probe
    assert m.read(start, end - start) == model.read(start, end)
    ends, flags = m.extents(start, end - start)
    found = [
        flag for a, b, flag in zip([start, *ends], ends, flags, strict=False) for _ in range(a, b)
    ]
    assert found == [3 * (cell[1] == _map.HOLE) for cell in model.cells[start:end]]
    assert all(a != b for a, b in itertools.pairwise(flags))
    assert m.data_bytes() == sum(cell[1] != _map.HOLE for cell in model.cells)


@settings(max_examples=COUNT, deadline=None)
@given(there=steps, here=steps, source=ranges, data=st.data())
def test_copied_segments(
    content: tuple[bytes, Path],
    there: list[tuple[str, tuple[int, int]]],
    here: list[tuple[str, tuple[int, int]]],
    source: tuple[int, int],
    data: st.DataObject,
) -> None:
    with content[1].open("rb") as file:
        store = _map.Store(file.fileno(), SIZE, whole=True)
    maps, models = [_map.SegmentMap(SIZE) for _ in "ab"], [Model(content[0]) for _ in "ab"]
    for m, model, todo in zip(maps, models, (there, here), strict=True):
        for what, (start, end) in todo:
            apply(m, store, what, start, end)
            model.apply(what, start, end)
    at = data.draw(st.integers(0, SIZE - (source[1] - source[0])))
    maps[1].copy(at, maps[0], source[0], source[1] - source[0])
    models[1].cells[at : at + source[1] - source[0]] = models[0].cells[slice(*source)]
    del maps[0]
    found = [cell for a, b, *cell in maps[0].segments(0, SIZE) for _ in range(a, b)]
    assert found == [list(cell[:2]) for cell in models[1].cells]
    for i, cell in enumerate(models[1].cells):
        got = maps[0].read(i, 1)
        assert (got and got[0]) == cell[2]


def test_copies_outside_of_a_map() -> None:
    m, other = _map.SegmentMap(100), _map.SegmentMap(50)
    for start, other_start, length in ((60, 0, 50), (0, 10, 41), (101, 0, 0), (0, 51, 0)):
        with pytest.raises(ValueError, match="range"):
            m.copy(start, other, other_start, length)
    with pytest.raises(ValueError, match="range"):
        m.copy(0, m, 50, 10)


def test_many_segments_split_chunks() -> None:
    size = 1 << 20
    m = _map.SegmentMap(size)
    order = [(i * 7919) % (size // 16) for i in range(size // 16)]
    for i in order:
        m.set_literal(i * 16, i.to_bytes(8, "little"))
    for i in range(0, size // 16, 997):
        assert m.read(i * 16, 8) == i.to_bytes(8, "little")
    assert len(m) == 2 * (size // 16)
    m.set_zero(0, size)
    assert m.segments(0, size) == [(0, size, _map.ZERO, _map.HOLE)]


def test_load_takes_extents_and_refuses_bad_ones(content: tuple[bytes, Path]) -> None:
    data, path = content
    with path.open("rb") as file:
        store = _map.Store(file.fileno(), SIZE, whole=True)
    m = _map.SegmentMap(SIZE)
    m.load(array("Q", [100, 200, SIZE]), bytes([0, 3, 0]), store)
    assert m.read(0, SIZE) == data[:100] + bytes(100) + data[200:]
    for ends in ([100, 100, SIZE], [SIZE + 1], [100]):
        with pytest.raises(ValueError, match="range"):
            m.load(array("Q", ends), bytes(len(ends)), None)
    assert m.read(0, 100) == data[:100]


def test_seek_at_the_ends() -> None:
    for size in (0, 1, 513):
        m = _map.SegmentMap(size)
        m.set_zero(0, size)
        for offset in (size, size + 1):
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                assert native_seek(m, offset, whence) == -errno.ENXIO
        if size:
            assert native_seek(m, 0, os.SEEK_DATA) == -errno.ENXIO
            assert native_seek(m, size - 1, os.SEEK_HOLE) == size - 1


def test_ranges_outside_are_refused() -> None:
    m = _map.SegmentMap(100)
    with pytest.raises(ValueError, match="range"):
        m.set_zero(50, 101)
    with pytest.raises(ValueError, match="range"):
        m.read(1 << 63, 1 << 63)
    with pytest.raises(ValueError, match="range"):
        m.set_literal(99, b"ab")


def test_scan_file_finds_holes(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(10 << 20)
        file.seek(4 << 20)
        file.write(b"x" * 4096)
    with path.open("rb") as file:
        ends, flags = _map.scan_file(file.fileno(), 10 << 20)
    assert list(ends) == [4 << 20, (4 << 20) + 4096, 10 << 20]
    assert flags == bytes([3, 0, 3])
