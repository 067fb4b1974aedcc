"""What of a shown file is stored, from counts alone, against all of its pieces."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs._native import _pieces
from imgfs.errors import UnsupportedFeature
from imgfs.extents import ExtentList, ExtentListBuilder, from_data_ranges
from imgfs.formats.layout import Layout
from imgfs.views.showing import SHOWN, layout_of
from tests.formats.shown import ABOUT, random_ranges


def counted(layout: Layout, extents: ExtentList) -> int:
    pieces = layout.map(0, layout.size)
    known = [(0, extents.ends, extents.flags)]
    ends, flags = _pieces.extents(pieces.packed, 0, layout.size, known)
    return ExtentList(0, ends, flags).stored_bytes()


def check(extents: ExtentList) -> None:
    for extension in SHOWN:
        try:
            layout = layout_of(extension, extents, ABOUT)
        except UnsupportedFeature:
            continue
        assert layout.stored_bytes(extents) == counted(layout, extents), extension


@given(st.lists(st.tuples(st.integers(1, 3 << 20), st.sampled_from(list(range(4)))), max_size=9))
def test_small(runs: list[tuple[int, int]]) -> None:
    builder = ExtentListBuilder()
    for length, flags in runs:
        builder.append(builder.end + length, flags)
    check(builder.finish(builder.end))


SIZES = [(size, count) for size in (1, 512, 65536, (1 << 30) - 512) for count in (0, 1, 40)]
LARGE = [(1 << 40, 1), ((3 << 40) + 7, 40)]  # take seconds each


@pytest.mark.parametrize(("size", "count"), SIZES + LARGE)
def test_large(size: int, count: int) -> None:
    rng = random.Random(size + count)
    check(from_data_ranges(iter(random_ranges(rng, size, count)), size))
    check(from_data_ranges(iter([(size - 1, size)]), size))


def test_whole() -> None:
    check(from_data_ranges(iter([(0, 700 << 20)]), 700 << 20))
