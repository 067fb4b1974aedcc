"""A layer's log: what was appended is read again; torn ends are cut, all other damage is seen."""

from __future__ import annotations

import os
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.errors import CorruptSnapshot
from imgfs.overlays.log import BLOCK, Batch, Kind, decode, encode, header

SIZE = 100 * BLOCK

records = st.lists(
    st.tuples(st.integers(0, 90), st.integers(1, 10), st.sampled_from(Kind)), max_size=5
)


def log_of(batches: list[list[tuple[int, int, Kind]]]) -> bytes:
    content = header(SIZE)
    for sequence, batch in enumerate(batches, 1):
        numbers = [n for a, count, k in batch for n in (a * BLOCK, (a + count) * BLOCK, k)]
        content += encode(Batch(sequence, SIZE, array("Q", numbers)))
    return content


@given(st.lists(records, max_size=4))
def test_what_was_appended_is_read(batches: list[list[tuple[int, int, Kind]]]) -> None:
    content = log_of(batches)
    found, end, size = decode(content, "log")
    assert (end, size) == (len(content), SIZE)
    assert [[(a // BLOCK, (b - a) // BLOCK, k) for a, b, k in batch] for batch in found] == batches


@given(st.lists(records, min_size=1, max_size=3), st.data())
def test_a_torn_end_is_cut(batches: list[list[tuple[int, int, Kind]]], data: st.DataObject) -> None:
    before, whole = log_of(batches[:-1]), log_of(batches)
    cut = data.draw(st.integers(len(before), len(whole) - 1))
    # The file may have grown before its bytes came.
    torn = whole[:cut] + bytes(data.draw(st.integers(0, len(whole) - cut)))
    if torn != whole:
        found, end, _ = decode(torn, "log")
        assert (len(found), end) == (len(batches) - 1, len(before))


def test_any_damage_before_the_last_batch_is_seen() -> None:
    content = log_of([[(0, 1, Kind.DATA)], [(1, 1, Kind.ZERO)], [(2, 2, Kind.BELOW)]])
    last = len(log_of([[(0, 1, Kind.DATA)], [(1, 1, Kind.ZERO)]]))
    for at in range(last):
        damaged = bytearray(content)
        damaged[at] ^= 0x55
        with pytest.raises(CorruptSnapshot, match=r"^log: .*damaged"):
            decode(bytes(damaged), "log")
    for at in range(last, len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 0x55
        assert decode(bytes(damaged), "log")[1] == last


@pytest.mark.parametrize(
    "record", [(BLOCK, BLOCK, 1), (2 * BLOCK, BLOCK, 1), (0, BLOCK, 3), (0, 2 * SIZE, 1)]
)
def test_records_that_cannot_be(record: tuple[int, int, int]) -> None:
    content = header(SIZE) + encode(Batch(1, SIZE, array("Q", record)))
    with pytest.raises(CorruptSnapshot, match="damaged"):
        decode(content, "log")


def test_other_files() -> None:
    for content in (b"", header(SIZE)[:-1], os.urandom(200), bytes(200)):
        with pytest.raises(CorruptSnapshot, match=r"^x/log: "):
            decode(content, "x/log")
    with pytest.raises(CorruptSnapshot, match="damaged"):
        decode(
            log_of([[(0, 1, Kind.DATA)]])[: len(header(SIZE))] + encode(Batch(2, SIZE, array("Q"))),
            "log",
        )
