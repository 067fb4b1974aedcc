"""SEEK_DATA and SEEK_HOLE against a naive model: a block is a hole when every byte of it is."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgfs._native import _map

LIMIT = 12 * _map.BLOCK
COUNT = 2000 if os.environ.get("IMGFS_TEST_LONG") else 200
DATA, HOLE, UNKNOWN = _map.DATA, _map.HOLE, _map.UNKNOWN

# Near the edges of blocks and of sectors, where the rounding happens, or anywhere.
edges = st.one_of(
    st.builds(
        lambda block, off: max(0, block * _map.BLOCK + off),
        st.integers(0, 12),
        st.sampled_from((-513, -512, -1, 0, 1, 511, 512)),
    ),
    st.integers(0, LIMIT),
).map(lambda at: min(at, LIMIT))
cuts = st.lists(st.tuples(edges, st.sampled_from("zhdlu")), max_size=24)


def built(size: int, parts: list[tuple[int, str]]) -> tuple[_map.SegmentMap, list[int]]:
    """A map, and what it says of each byte; what no part covers is a hole."""
    m, cells = _map.SegmentMap(size), [HOLE] * size
    m.set_zero(0, size)
    ends = [*sorted(at for at, _ in parts), size]
    for (start, end), (_, kind) in zip(itertools.pairwise(ends), parts, strict=False):
        end = min(end, size)
        if start >= end:
            continue
        if kind == "z":
            m.set_zero(start, end)
        elif kind == "h":
            m.set_ask(start, end, HOLE)  # another segment, and a hole too
        elif kind == "d":
            m.set_ask(start, end, DATA)
        elif kind == "l":
            m.set_literal(start, bytes(end - start))
        else:
            m.set_ask(start, end, UNKNOWN)
        cells[start:end] = [{"z": HOLE, "h": HOLE, "u": UNKNOWN}.get(kind, DATA)] * (end - start)
    return m, cells


def model_seek(cells: list[int], offset: int, wanted: int) -> int | None:
    """lseek's answer; None where it depends on what is unknown; -ENXIO."""
    at, size = offset, len(cells)
    while at < size:
        start = at - at % _map.BLOCK
        end = min(start + _map.BLOCK, size)
        said = next((cell for cell in cells[start:end] if cell != HOLE), HOLE)
        if said == UNKNOWN:
            return None
        if said == wanted:
            return at
        at = end
    return size if wanted == HOLE and offset < size else -errno.ENXIO


def seek(m: _map.SegmentMap, offset: int, whence: int, *size: int) -> int | None:
    try:
        return m.seek(offset, whence, *size)
    except OSError as exc:
        assert exc.errno is not None
        return -exc.errno


def walk(size: int, at: Callable[[int, int], int | None]) -> list[tuple[int, int]]:
    """The ranges of data that a program finds, as cp does."""
    found, offset = [], 0
    while offset < size:
        start = at(offset, os.SEEK_DATA)
        if start == -errno.ENXIO:
            break
        assert start is not None and start >= offset
        end = at(start, os.SEEK_HOLE)
        assert end is not None and end > start
        found.append((start, end))
        offset = end
    return found


@settings(max_examples=COUNT, deadline=None)
@given(size=edges, parts=cuts, offset=edges)
def test_equals_the_model(size: int, parts: list[tuple[int, str]], offset: int) -> None:
    m, cells = built(size, parts)
    assert seek(m, offset, os.SEEK_DATA) == model_seek(cells, offset, DATA)
    assert seek(m, offset, os.SEEK_HOLE) == model_seek(cells, offset, HOLE)


@settings(max_examples=COUNT, deadline=None)
@given(size=edges, longer=edges, parts=cuts, offset=edges)
def test_of_a_file_shorter_than_its_map(
    size: int, longer: int, parts: list[tuple[int, str]], offset: int
) -> None:
    m, cells = built(max(size, longer), parts)
    known = [DATA if cell == UNKNOWN else cell for cell in cells[:size]]
    assert seek(m, offset, os.SEEK_DATA, size) == model_seek(known, offset, DATA)
    assert seek(m, offset, os.SEEK_HOLE, size) == model_seek(known, offset, HOLE)


@settings(max_examples=COUNT, deadline=None)
@given(size=edges, parts=cuts)
def test_a_walk_finds_all_data_at_aligned_edges(size: int, parts: list[tuple[int, str]]) -> None:
    m, cells = built(size, [(at, kind) for at, kind in parts if kind != "u"])
    ranges = walk(size, lambda offset, whence: seek(m, offset, whence))
    inside = {at for start, end in ranges for at in range(start, end)}
    assert all(at in inside for at, cell in enumerate(cells) if cell == DATA)
    for start, end in ranges:
        assert start % _map.BLOCK == 0
        assert end % _map.BLOCK == 0 or end == size
    # What stat says lets cp look for holes whenever there is one to be found.
    if ranges != [(0, size)] and size:
        assert -(-m.data_bytes() // 512) * 512 < size


def test_a_hole_smaller_than_a_block_is_data() -> None:
    m = _map.SegmentMap(3 * _map.BLOCK)
    m.set_ask(0, m.size, DATA)
    m.set_zero(_map.BLOCK - 512, 2 * _map.BLOCK - 512)
    assert m.seek(0, os.SEEK_HOLE) == m.size
    assert m.seek(_map.BLOCK, os.SEEK_DATA) == _map.BLOCK
    m.set_zero(2 * _map.BLOCK - 512, 2 * _map.BLOCK + 1)
    assert m.seek(0, os.SEEK_HOLE) == _map.BLOCK
    assert m.seek(_map.BLOCK + 5, os.SEEK_DATA) == 2 * _map.BLOCK
    assert m.seek(2 * _map.BLOCK + 5, os.SEEK_DATA) == 2 * _map.BLOCK + 5


@pytest.mark.parametrize("size", [1, 511, 4095, 4097, 8193])
def test_the_end_is_exact(size: int) -> None:
    m = _map.SegmentMap(size)
    m.set_ask(0, size, DATA)
    assert m.seek(0, os.SEEK_HOLE) == size
    m.set_zero(size - 1, size)
    tail = size - 1 if (size - 1) % _map.BLOCK == 0 else size
    assert m.seek(0, os.SEEK_HOLE) == tail
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        assert seek(m, size, whence) == -errno.ENXIO
