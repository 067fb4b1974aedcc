"""Which bytes are in use, holes, and deleted: against a naive model; and the parts of a disk."""

from __future__ import annotations

from array import array
from itertools import groupby

from hypothesis import given, settings
from hypothesis import strategies as st

from imgfs.extents import from_data_ranges
from imgfs.guest.disk import Content, Guest, Partition, Volume
from imgfs.guest.segments import Segment
from imgfs.guest.space import Filesystem
from imgfs.guest.usage import OUTSIDE, Amounts, State, Usage, parts_of

SIZE = 60  # bytes
MARKS = st.lists(st.booleans(), min_size=SIZE, max_size=SIZE)


def ranges(marks: list[bool]) -> list[tuple[int, int]]:
    found, at = [], 0
    for mark, group in groupby(marks):
        length = len(list(group))
        if mark:
            found.append((at, at + length))
        at += length
    return found


def usage(data: list[bool], free: list[bool]) -> Usage:
    bounds = [bound for each in ranges(free) for bound in each]
    return Usage(from_data_ranges(iter(ranges(data)), SIZE), bounds)


@settings(deadline=None)
@given(MARKS, MARKS, st.data())
def test_runs_and_amounts(data: list[bool], free: list[bool], draw: st.DataObject) -> None:
    found = usage(data, free)
    wanted = [
        State.HOLE if not stored else State.DELETED if is_free else State.DATA
        for stored, is_free in zip(data, free, strict=True)
    ]
    runs = list(found)
    assert [state for start, end, state in runs for _ in range(start, end)] == wanted
    assert len(found) == len(runs) == len(list(groupby(wanted)))
    start = draw.draw(st.integers(0, SIZE))
    end = draw.draw(st.integers(start, SIZE))
    part = wanted[start:end]
    counts = (part.count(state) for state in (State.DATA, State.HOLE, State.DELETED))
    assert found.amounts(start, end) == Amounts(*counts)


def test_nothing() -> None:
    empty = Usage(from_data_ranges(iter(()), 0))
    assert (empty.size, len(empty), empty.amounts(0, 0)) == (0, 0, Amounts())
    assert parts_of(Guest(0, "none"), empty) == []


def content(kind: str, label: str = "", why: str = "") -> Content:
    return Content((kind,), Filesystem(kind, 10, label, left_whole=why), why)


def test_parts() -> None:
    """A striped volume counts both stripes, and what has no place counts nothing."""
    lost = Content(("ext",), left_whole="it ends at byte 90, behind the disk of 60 bytes")
    stripes = (Segment(0, 8, (32, 36), 2),)
    guest = Guest(
        SIZE,
        "gpt",
        (
            Partition(3, 30, 20, "", "", True, Content(("LVM2",))),
            Partition(1, 5, 20, "", "", True, content("xfs", "root")),
            Partition(2, 50, 40, "", "", False, lost),
        ),
        (Volume("vg-a", 8, stripes, content("swap")), Volume("vg-b", 8, (), Content())),
        free=array("Q", [10, 20]),
    )
    data = [at < 15 or 33 <= at < 37 for at in range(SIZE)]
    found = parts_of(guest, usage(data, [10 <= at < 20 for at in range(SIZE)]))
    assert [(part.name, part.holds, part.amounts, part.is_volume) for part in found] == [
        ("partition 2", "ext", Amounts(), False),
        ("partition 1", "xfs root", Amounts(5, 10, 5), False),
        ("partition 3", "LVM2", Amounts(4, 16, 0), False),
        (OUTSIDE, "", Amounts(5, 15, 0), False),
        ("volume vg-b", "", Amounts(), True),
        ("volume vg-a", "swap", Amounts(4, 4, 0), True),
    ]
    assert found[0].left_whole == lost.left_whole
    assert sum(part.amounts.size for part in found if not part.is_volume) == SIZE
