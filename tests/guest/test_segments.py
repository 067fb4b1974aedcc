"""Where a volume's bytes are on the disk, against a model that has them one by one."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from imgfs.guest.segments import Segment, through, to_disk
from imgfs.steps import Read, Steps, read_all
from tests.drive import Files

DISK = bytes((n * 7 + n // 256) % 256 for n in range(1 << 13))


@st.composite
def layouts(draw: st.DrawFn) -> list[Segment]:
    """Segments whose stripes do not overlap: the disk is given out in order."""
    segments, at, used = [], 0, 0
    for _ in range(draw(st.integers(1, 4))):
        stripes, chunk = draw(st.integers(1, 4)), draw(st.integers(1, 16))
        rows = draw(st.integers(1, 8))
        bases = []
        for _ in range(stripes):
            used += draw(st.integers(0, 20))
            bases.append(used)
            used += rows * chunk
        order = draw(st.permutations(bases))
        size = rows * chunk * stripes
        segments.append(Segment(at, size, tuple(order), size if stripes == 1 else chunk))
        at += size
    return segments


def places(segments: list[Segment]) -> list[int]:
    """The disk's byte of each of the volume's."""
    found = []
    for segment in segments:
        for n in range(segment.size):
            chunk, rest = divmod(n, segment.stripe_size)
            row, stripe = divmod(chunk, len(segment.stripes))
            found.append(segment.stripes[stripe] + row * segment.stripe_size + rest)
    return found


def bounds(draw: st.DataObject, size: int) -> list[tuple[int, int]]:
    edges = sorted(draw.draw(st.sets(st.integers(0, size), max_size=12)))
    return list(zip(edges[::2], edges[1::2], strict=False))


@given(layouts(), st.data())
def test_reads(segments: list[Segment], data: st.DataObject) -> None:
    where = places(segments)
    ranges = bounds(data, len(where)) or [(0, len(where))]

    def steps() -> Steps[list[bytes]]:
        return (yield from read_all([Read(start, end - start) for start, end in ranges]))

    found = Files(DISK).run(through(steps(), segments))
    assert found == [bytes(DISK[n] for n in where[start:end]) for start, end in ranges]


@given(layouts(), st.data())
def test_free_ranges(segments: list[Segment], data: st.DataObject) -> None:
    where = places(segments)
    ranges = bounds(data, len(where))
    free = array("Q", [edge for each in ranges for edge in each])
    found = [n for start, end in to_disk(free, segments) for n in range(start, end)]
    assert sorted(found) == sorted(n for start, end in ranges for n in where[start:end])


@given(layouts())
def test_ranges_in_order(segments: list[Segment]) -> None:
    found = [n for each in segments for start, end in each.ranges() for n in range(start, end)]
    assert found == places(segments)


def test_a_read_past_the_end_is_short() -> None:
    def steps() -> Steps[list[bytes]]:
        return (yield from read_all([Read(8, 10), Read(10, 4)]))

    assert Files(DISK).run(through(steps(), [Segment(0, 10, (100,), 10)])) == [DISK[108:110], b""]
