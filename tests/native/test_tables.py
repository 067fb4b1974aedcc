"""Tables and bitmaps as runs, against the plainest way to find them."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs._native import _tables

STEP = 512


def expand(runs: list[int]) -> list[int]:
    triples = zip(runs[::3], runs[1::3], runs[2::3], strict=True)
    return [first + i * stride for count, first, stride in triples for i in range(count)]


@given(
    st.lists(st.integers(0, 6).map(lambda n: n * STEP)),
    st.sampled_from([("<I", 4, False), (">I", 4, True), ("<Q", 8, False), (">Q", 8, True)]),
)
def test_runs_say_what_the_table_says(entries: list[int], how: tuple[str, int, bool]) -> None:
    code, width, big_endian = how
    table = b"".join(struct.pack(code, entry) for entry in entries)
    runs = list(_tables.runs(table, width, big_endian, STEP))
    assert expand(runs) == entries
    assert set(runs[2::3]) <= {0, STEP}


def test_runs_are_maximal() -> None:
    table = struct.pack("<6Q", 7, 7, 7, 100, 612, 1124)
    assert list(_tables.runs(table, 8, False, STEP)) == [3, 7, 0, 3, 100, STEP]


def test_entries_of_all_values() -> None:
    table = struct.pack(">3Q", 2**64 - 1, 2**64 - 1, 511)
    assert list(_tables.runs(table, 8, True, STEP)) == [2, 2**64 - 1, 0, 1, 511, 0]


def test_a_table_of_broken_entries() -> None:
    with pytest.raises(ValueError, match="whole entries"):
        _tables.runs(b"1234567", 8, False, 1)
    with pytest.raises(ValueError, match="whole entries"):
        _tables.runs(b"12", 2, False, 1)


@given(st.binary(max_size=40), st.data())
def test_clear_runs(bitmap: bytes, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 8 * len(bitmap)))
    clear = [i for i in range(count) if not bitmap[i // 8] >> (i % 8) & 1]
    runs = list(_tables.clear_runs(bitmap, count))
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    assert [i for start, end in pairs for i in range(start, end)] == clear
    assert all(a[1] < b[0] for a, b in itertools.pairwise(pairs))


def test_clear_runs_of_long_bitmaps() -> None:
    bitmap = b"\xff" * 100 + b"\x00" * 100 + b"\xff" * 99 + b"\x7f"
    assert list(_tables.clear_runs(bitmap, 2400)) == [800, 1600, 2399, 2400]


def test_more_bits_than_there_are() -> None:
    with pytest.raises(ValueError, match="fewer bits"):
        _tables.clear_runs(b"\0", 9)
