"""How many bytes to have on their way at once: what the line holds, and little more.

A line of rate R (bytes a second) and round trip T holds R*T bytes.  With fewer on their way it
idles; with more they queue before it, and whoever misses waits behind them.  Neither is known
beforehand, and both change.

    trip    the shortest time of a fetch.  When it has not been seen for a while the window is
            halved until one fetch has found the line without a queue, and tells it anew.
    rate    what came in between start and end of a fetch: the highest of the last seconds, of
            fetches that could have seen all of the line: the window was full, or they queued.

The limit is rate * trip, and SPARE for what comes late.  A fetch that took no longer than the trip
though the window was full says that the line may hold more: then the limit grows by what came,
which doubles it in a round trip, up to twice what is known to be held.

Nothing here reads a clock: times are seconds from the caller.  After Cardwell et al., BBR:
Congestion-Based Congestion Control (ACM Queue 14, 5), for requests instead of packets.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

MIB = 1 << 20
FIRST = 16 * MIB  # until something is known
LEAST = 1 * MIB
MOST = 64 * MIB  # so much memory a server can make us hold
SPARE = 4 * MIB
SPARE_S = 0.05  # SPARE is not more than comes in so much time
RATE_S = 5.0  # how long a rate is believed
TRIP_S = 10.0  # how long a trip is believed, or
TRIPS = 10  # times itself, where that is longer
NO_QUEUE = 1.1  # times the trip: what is faster did not queue
QUEUED = 2.0  # times the trip: what is slower did
GAIN = 1.1


@dataclass(frozen=True, slots=True)
class Flight:
    """One fetch on its way, and how things were when it started."""

    at: float
    length: int
    delivered: int
    full: bool  #: with it the window was full
    alone: bool  #: the window was half empty: it met no queue of ours


class Highest:
    """The highest rate of the last RATE_S seconds; 0 when there is none."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()  # (time, rate), rates descending

    @property
    def value(self) -> float:
        return self._seen[0][1] if self._seen else 0.0

    def add(self, now: float, rate: float, *, telling: bool) -> None:
        """What is not telling may raise it, and lets nothing grow old."""
        if not telling and rate <= self.value:
            return
        while telling and self._seen and self._seen[0][0] < now - RATE_S:
            self._seen.popleft()
        while self._seen and self._seen[-1][1] <= rate:
            self._seen.pop()
        self._seen.append((now, rate))


class Window:
    """`limit` is bytes, `out` those on their way; `trip_s` is None until it is known."""

    def __init__(self, first: int = FIRST, most: int = MOST) -> None:
        self.most = min(MOST, max(LEAST, most))
        self.limit = min(first, self.most)
        self.out = 0
        self.trip_s: float | None = None
        self._trip_at = 0.0
        self._probing = False
        self._delivered = 0
        self._rate = Highest()

    @property
    def has_room(self) -> bool:
        """May one more fetch be on its way that nobody waits for?"""
        return self.out < (self.limit // 2 if self._probing else self.limit) or not self.out

    @property
    def rate(self) -> float:
        """The highest rate that was seen of late, bytes a second."""
        return self._rate.value

    def started(self, now: float, length: int) -> Flight:
        """A fetch of so many bytes begins; `ended` must follow."""
        alone = self.out <= self.limit // 2
        self.out += length
        full = self.out >= self.limit and not self._probing
        return Flight(now, length, self._delivered, full, alone)

    def ended(self, flight: Flight, now: float, got: int) -> None:
        """It brought `got` bytes; 0 when it failed or there was nothing to fetch."""
        self.out -= flight.length
        self._delivered += got
        if not got:
            return
        took = max(now - flight.at, 1e-6)
        trip = self._learn_trip(flight, now, took)
        telling = flight.full or took > QUEUED * trip
        self._rate.add(now, (self._delivered - flight.delivered) / took, telling=telling)
        if telling:
            self._set_limit(trip, got if flight.full and took < NO_QUEUE * trip else 0)

    def _learn_trip(self, flight: Flight, now: float, took: float) -> float:
        """The trip, as of now."""
        expired = now - self._trip_at > max(TRIP_S, TRIPS * (self.trip_s or 0.0))
        if self.trip_s is None or took <= self.trip_s or (expired and flight.alone):
            self.trip_s = took
            self._trip_at = now
            self._probing = False
        elif expired:
            self._probing = True
        return self.trip_s

    def _set_limit(self, trip: float, more: int) -> None:
        """`more` is what it may grow by because nothing queued."""
        held = self._rate.value * trip
        limit = GAIN * held + min(SPARE, self._rate.value * SPARE_S)
        if more:
            limit = max(limit, min(2 * held, self.limit + more))
        self.limit = int(min(self.most, max(LEAST, limit)))
