"""The window on simulated lines: no clock, no sockets."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import pytest

from imgfs.cache.window import FIRST, LEAST, MOST, Flight, Window

MIB = 1 << 20
FILL = 31 << 16


@dataclass
class Line:
    """What is asked for leaves in order at the rate, and comes a round trip later."""

    rate: float
    trip_s: float
    window: Window = field(default_factory=Window)
    now: float = 0.0
    longest_s: float = 0.0
    _free_at: float = 0.0
    _flights: list[tuple[float, int, Flight]] = field(default_factory=list)
    _number: Callable[[], int] = field(default_factory=lambda: count().__next__)

    def ask(self) -> None:
        flight = self.window.started(self.now, FILL)
        self._free_at = max(self._free_at, self.now) + FILL / self.rate
        arrives = self._free_at + self.trip_s
        heapq.heappush(self._flights, (arrives, self._number(), flight))

    def take(self, got: int = FILL) -> None:
        self.now, _, flight = heapq.heappop(self._flights)
        self.window.ended(flight, self.now, got)
        self.longest_s = max(self.longest_s, self.now - flight.at)

    def run(self, seconds: float) -> float:
        """Read ahead for so long; what part of the line's rate came in."""
        end, came, self.longest_s = self.now + seconds, 0, 0.0
        while self.now < end:
            while self.window.has_room:
                self.ask()
            self.take()
            came += FILL
        return came / seconds / self.rate


LINES = [(125e6, 0.2), (125e6, 0.02), (12.5e6, 0.2), (250e6, 0.2), (1e9, 0.05), (500e6, 0.0003)]


@pytest.mark.parametrize("rate, trip_s", LINES)
def test_the_line_is_kept_full(rate: float, trip_s: float) -> None:
    line = Line(rate, trip_s)
    assert line.run(max(2.0, 10 * trip_s)) > 0.6  # growing
    assert line.run(30) > 0.97
    # What a miss would wait for, beyond what cannot be helped: half a trip, and some fetches.
    assert line.longest_s < 1.8 * trip_s + 7 * FILL / rate


@pytest.mark.parametrize("rate, trip_s", [(500e6, 0.0003), (12.5e6, 0.001), (1.25e6, 0.2)])
def test_it_stays_small_where_more_gains_nothing(rate: float, trip_s: float) -> None:
    line = Line(rate, trip_s)
    line.run(20)
    assert LEAST <= line.window.limit < FIRST
    assert line.window.limit < 3 * (rate * trip_s + 2 * FILL)


def test_it_is_bounded() -> None:
    line = Line(2e9, 0.5)
    line.run(20)
    assert line.window.limit == MOST


@pytest.mark.parametrize("before", LINES)
@pytest.mark.parametrize("after", LINES)
def test_it_follows_a_line_that_becomes_another(
    before: tuple[float, float], after: tuple[float, float]
) -> None:
    line = Line(*before)
    line.run(15)
    line.rate, line.trip_s = after
    line.run(20)
    assert line.run(20) > 0.95
    fresh = Line(*after)
    fresh.run(40)
    assert fresh.window.limit / 2.5 < line.window.limit < fresh.window.limit * 2.5


def test_a_slow_reader_teaches_nothing_wrong() -> None:
    """One fetch at a time says nothing of the rate: the window is as before."""
    line = Line(125e6, 0.2)
    line.run(10)
    limit = line.window.limit
    while line.window.out:
        line.take()
    for _ in range(20):
        line.now += 1
        line.ask()
        line.take()
    assert line.window.limit == limit


def test_failures_count_for_nothing_but_room() -> None:
    window = Window()
    flights = [window.started(0.0, FILL) for _ in range(20)]
    assert not window.has_room
    for flight in flights:
        window.ended(flight, 30.0, 0)
    assert (window.out, window.limit, window.trip_s) == (0, FIRST, None)
    assert window.has_room


def test_a_line_that_takes_minutes_for_one_fetch() -> None:
    line = Line(10e3, 5.0)
    line.run(40 * FILL / 10e3)
    assert line.window.limit < 2 * FILL
    while line.window.out:
        line.take()
    assert line.window.has_room
