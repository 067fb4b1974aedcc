"""Extent lists against a naive model: one flag a byte."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.extents import (
    ExtentList,
    ExtentListBuilder,
    Flags,
    all_data,
    from_data_ranges,
)

SPARSE = Flags.HOLE | Flags.ZERO

flags = st.sampled_from([Flags.DATA, Flags.HOLE, Flags.ZERO, SPARSE])
pieces = st.lists(st.tuples(st.integers(1, 40), flags), max_size=20)
starts = st.integers(0, 1 << 50)


def build(start: int, pieces: list[tuple[int, Flags]]) -> tuple[ExtentList, list[Flags]]:
    """The list, and the flags of each of its bytes."""
    builder = ExtentListBuilder(start)
    model: list[Flags] = []
    for length, kind in pieces:
        builder.append(builder.end + length, kind)
        model += [kind] * length
    assert builder.end == start + len(model)
    return builder.finish(builder.end), model


def cells(extents: ExtentList) -> list[Flags]:
    return [extent.flags for extent in extents for _ in range(extent.length)]


def check_well_formed(extents: ExtentList) -> None:
    """Ascending, contiguous, covering, and like neighbours are one."""
    at, before = extents.start, None
    for extent in extents:
        assert extent.start == at < extent.end
        assert extent.flags != before
        at, before = extent.end, extent.flags
    assert at == extents.end


@given(start=starts, pieces=pieces)
def test_builder(start: int, pieces: list[tuple[int, Flags]]) -> None:
    extents, model = build(start, pieces)
    check_well_formed(extents)
    assert cells(extents) == model
    assert (extents.start, extents.end) == (start, start + len(model))
    assert len(extents) == len(list(extents))
    assert extents.stored_bytes() == sum(not kind & Flags.HOLE for kind in model)


@given(start=starts, pieces=pieces, data=st.data())
def test_clip(start: int, pieces: list[tuple[int, Flags]], data: st.DataObject) -> None:
    extents, model = build(start, pieces)
    a = data.draw(st.integers(0, len(model)))
    b = data.draw(st.integers(a, len(model)))
    before = cells(extents)
    clipped = extents.clip(start + a, start + b)
    check_well_formed(clipped)
    assert (clipped.start, clipped.end) == (start + a, start + b)
    assert cells(clipped) == model[a:b]
    assert cells(extents) == before
    assert extents.clip(start, extents.end) == extents


@given(start=starts, pieces=pieces)
def test_data_ranges(start: int, pieces: list[tuple[int, Flags]]) -> None:
    extents, model = build(start, pieces)
    ranges = list(extents.data_ranges())
    inside = {at for a, b in ranges for at in range(a - start, b - start)}
    assert inside == {at for at, kind in enumerate(model) if not kind & Flags.ZERO}
    for (_, end), (following, _) in pairwise(ranges):
        assert end < following  # else they would not be maximal


@given(
    steps=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=12),
    size=st.integers(0, 300),
)
def test_from_data_ranges(steps: list[tuple[int, int]], size: int) -> None:
    ranges: list[tuple[int, int]] = []
    model = [SPARSE] * size
    at = 0
    for gap, length in steps:
        start, at = at + gap, at + gap + length
        ranges.append((start, at))
        model[start:at] = [Flags.DATA] * len(model[start:at])
    extents = from_data_ranges(iter(ranges), size)
    check_well_formed(extents)
    assert (extents.start, extents.end) == (0, size)
    assert cells(extents) == model


@given(start=starts, length=st.integers(0, 1 << 50))
def test_all_data(start: int, length: int) -> None:
    extents = all_data(start, start + length)
    assert extents.stored_bytes() == length
    assert list(extents.data_ranges()) == ([(start, start + length)] if length else [])


def test_what_the_builder_refuses() -> None:
    builder = ExtentListBuilder(100)
    for end in (100, 99, 0, -1):
        with pytest.raises(ValueError, match="not past 100"):
            builder.append(end, Flags.DATA)
    builder.append(200, Flags.ZERO)
    with pytest.raises(ValueError, match="not past 200"):
        builder.append(200, Flags.DATA)
    for end in (199, 201):
        with pytest.raises(ValueError, match="reach 200"):
            builder.finish(end)
    assert list(builder.finish(200)) == [(100, 200, Flags.ZERO)]


def test_what_clip_refuses() -> None:
    extents = all_data(10, 20)
    for start, end in ((9, 15), (15, 21), (15, 14), (21, 21)):
        with pytest.raises(ValueError, match="is not inside"):
            extents.clip(start, end)


@pytest.mark.parametrize("ranges", [[(5, 5)], [(5, 4)], [(5, 10), (9, 12)], [(5, 10), (0, 2)]])
def test_what_from_data_ranges_refuses(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="data range"):
        from_data_ranges(iter(ranges), 100)


@given(starts, pieces, st.data())
def test_hole_ranges(start: int, pieces: list[tuple[int, Flags]], data: st.DataObject) -> None:
    extents, model = build(start, pieces)
    first = data.draw(st.integers(start, extents.end))
    end = data.draw(st.integers(first, extents.end))
    holes = [i for a, b in extents.hole_ranges(first, end) for i in range(a, b)]
    assert holes == [i for i in range(first, end) if model[i - start] & Flags.ZERO]
