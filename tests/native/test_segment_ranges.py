"""Many ranges of a segment map at once, and one store in the place of another."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgfs._native import _map

SIZE = 400
kinds = st.sampled_from([_map.ASK, _map.ZERO, _map.STORE])
ranges = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE), kinds), max_size=30)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> _map.Store:
    return new_store(tmp_path_factory.mktemp("store") / "file", b"s")


def new_store(path: Path, fill: bytes, size: int = SIZE) -> _map.Store:
    path.write_bytes(fill * size)
    with path.open("rb") as file:
        return _map.Store(file.fileno(), size, whole=True)


def packed(found: list[tuple[int, int, int]]) -> tuple[array[int], array[int], bytes]:
    starts = array("Q", [min(a, b) for a, b, _ in found])
    ends = array("Q", [max(a, b) for a, b, _ in found])
    return starts, ends, bytes(kind for _, _, kind in found)


@settings(deadline=None)
@given(ranges)
def test_setting_many_is_setting_each(store: _map.Store, found: list[tuple[int, int, int]]) -> None:
    many, each = _map.SegmentMap(SIZE), _map.SegmentMap(SIZE)
    many.set_ranges(*packed(found), store)
    for start, end, kind in zip(*packed(found), strict=True):
        if kind == _map.ASK:
            each.set_ask(start, end)
        elif kind == _map.ZERO:
            each.set_zero(start, end)
        else:
            each.set_store(start, end, store, start)
    assert many.segments(0, SIZE) == each.segments(0, SIZE)
    assert len(many) == len(each)
    again = _map.SegmentMap(SIZE)
    again.fill(*many.ranges(), store)
    assert again.segments(0, SIZE) == each.segments(0, SIZE)


def test_what_cannot_be_set(store: _map.Store) -> None:
    m = _map.SegmentMap(SIZE)
    for bad in (_map.LITERAL, 7):
        with pytest.raises(ValueError, match="range"):
            m.set_ranges(*packed([(0, 5, bad)]), store)
    with pytest.raises(ValueError, match="range"):
        m.set_ranges(*packed([(0, 5, _map.STORE)]))
    with pytest.raises(ValueError, match="range"):
        m.set_ranges(array("Q", [5]), array("Q", [4]), bytes([_map.ZERO]))
    m.set_ranges(*packed([(SIZE - 5, SIZE + 9, _map.ZERO)]))  # what lies beyond is left out
    assert m.segments(0, SIZE)[-1][:3] == (SIZE - 5, SIZE, _map.ZERO)


def test_a_store_in_the_place_of_another(store: _map.Store, tmp_path: Path) -> None:
    old, new = new_store(tmp_path / "old", b"o"), new_store(tmp_path / "new", b"n")
    m = _map.SegmentMap(SIZE)
    m.set_literal(0, b"l" * 10)
    m.set_literal(10, b"k" * 10)
    m.set_store(20, 30, old, 20)
    m.set_store(30, 40, new, 30)
    m.set_store(40, 50, store, 40)
    m.set_zero(50, SIZE)
    m.replace_store(old, new)
    assert m.read(0, 60) == b"l" * 10 + b"k" * 10 + b"n" * 20 + b"s" * 10 + bytes(10)
    assert len(m) == 5  # the two that are one now are joined
    m.replace_store(old, store)  # which it does not name
    m.replace_store(new, store)
    assert m.read(20, 30) == b"s" * 30
    del m  # whoever counts the references is content


def test_a_store_that_was_replaced_leaves_its_place(tmp_path: Path) -> None:
    """A map has room for 65536 of them."""
    m = _map.SegmentMap(SIZE)
    now = new_store(tmp_path / "file", b"x")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    m.set_store(0, SIZE, now, 0)
    for _ in range(66_000):
        new = _map.Store(fd, SIZE, whole=True)
        m.replace_store(now, new)
        now = new
    os.close(fd)
    assert m.read(0, SIZE) == b"x" * SIZE


def test_stores_that_cannot_be_replaced(store: _map.Store, tmp_path: Path) -> None:
    m = _map.SegmentMap(SIZE)
    m.set_store(0, SIZE, store, 0)
    short = new_store(tmp_path / "short", b"x", SIZE - 1)
    for new in (short, store):
        with pytest.raises(ValueError, match="range"):
            m.replace_store(store, new)
    m.set_target(store)
    with pytest.raises(ValueError, match="range"):
        m.replace_store(store, new_store(tmp_path / "new", b"x"))
