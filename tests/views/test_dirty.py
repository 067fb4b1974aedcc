"""What was written and has not landed: against plain bytes, in any order of events."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from imgfs.views.dirty import Dirty, Flight

SIZE = 64

ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 16)).map(
    lambda pair: (pair[0], min(SIZE, pair[0] + pair[1]))
)
events = st.one_of(
    st.tuples(st.just("put"), ranges, st.one_of(st.none(), st.integers(1, 255))),
    st.tuples(st.just("fly"), st.integers(1, 8), st.integers(1, 32)),
    st.tuples(st.just("land"), st.integers(0, 5), st.just(0)),
)


def seen(dirty: Dirty, below: bytes) -> bytes:
    found = bytearray(below)
    for start, end, data in dirty.between(0, SIZE):
        found[start:end] = bytes(end - start) if data is None else data
    return bytes(found)


def land(dirty: Dirty, flight: Flight, below: bytearray) -> None:
    start, end = flight.start, flight.end
    below[start:end] = bytes(end - start) if flight.parts is None else flight.data()
    dirty.land(flight)


@settings(deadline=None, max_examples=300)
@given(st.lists(events, max_size=40))  # type: ignore[arg-type]
def test_what_is_read_is_what_was_written_last(script: list[tuple[str, object, object]]) -> None:
    dirty, wanted, below = Dirty(), bytearray(b"\xff" * SIZE), bytearray(b"\xff" * SIZE)
    for what, one, two in script:
        if what == "put":
            start, end = one  # type: ignore[misc]
            value = None if two is None else bytes([two]) * (end - start)  # type: ignore[list-item]
            dirty.put(start, end, value)
            wanted[start:end] = bytes(end - start) if value is None else value
        elif what == "fly":
            flight = dirty.take_off(one, two)  # type: ignore[arg-type]
            for other in dirty.flights:
                if flight is not None and other is not flight:
                    assert other.end <= flight.start or flight.end <= other.start
        elif dirty.flights:
            land(dirty, dirty.flights[one % len(dirty.flights)], below)  # type: ignore[operator]
        assert seen(dirty, below) == wanted
        held = sum(b - a for a, b, data in dirty.between(0, SIZE) if data is not None)
        assert dirty.held == held
    while dirty:
        if not dirty.flights:
            assert dirty.take_off(1, 8) is not None, "no progress"
        land(dirty, dirty.flights[0], below)
    assert below == wanted
    assert dirty.held == 0
    assert dirty.end == 0


def test_neighbours_are_sent_as_one() -> None:
    dirty = Dirty()
    for at in (0, 8, 4, 12):
        dirty.put(at, at + 4, b"abcd")
    flight = dirty.take_off(16, 100)
    assert flight is not None
    assert flight.data() == b"abcd" * 4
    assert dirty.take_off(1, 100) is None


def test_a_newer_write_waits_for_the_older_one_to_land() -> None:
    dirty = Dirty()
    dirty.put(0, 4, b"old.")
    old = dirty.take_off(1, 100)
    assert old is not None
    dirty.put(2, 6, b"new.")
    assert dirty.take_off(1, 100) is None
    number = dirty.number
    assert dirty.land(old) == [(0, 2)]
    assert not dirty.is_settled(number)
    new = dirty.take_off(1, 100)
    assert new is not None
    assert (new.start, bytes(new.data())) == (2, b"new.")
    dirty.land(new)
    assert dirty.is_settled(number)


def test_zeroes_cost_no_memory() -> None:
    dirty = Dirty()
    dirty.put(0, 1 << 50, None)
    dirty.put(1 << 20, (1 << 20) + 4, b"data")
    assert dirty.held == 4
    first = dirty.take_off(1, 1 << 20)
    assert first is not None
    assert first.parts is None
