"""Sequential readers, and how far ahead of each is fetched.

    candidate   one miss ended here, or one read that the kernel had to split
        |  the next miss begins where it ended (holes between do not count)
        v
    stream      blocks are fetched up to `next`; the last window, from `mark` on, is watched
        |  its first block is read: the next window, larger, is fetched
        v
    dropped     when more than STREAMS streams are followed, the one that moved least recently

Hits are answered natively and are not seen here; the store tells of the first read in a watched
range.  Random reads never begin where another ended, so they only come and go as candidates.
A window is counted in bytes of data: what is zero costs nothing to read.

Where a round trip is long, small windows gain nothing: while the answer is on its way as much
again could be.  So the first is what comes in meanwhile, and they grow faster.  The largest is some
times what the line holds (window.py): between one and two windows are ahead of the reader, and
where that is less than what may be on its way the line idles.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Protocol

from imgfs.cache.fills import Fill
from imgfs.cache.window import Window

STREAMS = 8
FIRST_WINDOW = 1 << 20
MOST_FIRST_WINDOW = 8 << 20
FIRST_RATE = 40e6  # bytes a second that a line is taken for
LONG_TRIP_S = 0.05
MOST_WINDOW = 16 << 20  # or, if that is more,
LINES = 2  # times what may be on its way at once
SLACK = 64 << 10  # what a sequential reader may leave out
CANDIDATES = 64
REQUEST = (
    512 << 10
)  # the most that the kernel asks for at once (MAX_PAYLOAD in _native/fuse/fast.h)
ONE_READ = 1 << 20  # what a program may well ask for at once, without reading on


_followed: ContextVar[bool] = ContextVar("followed", default=False)


@contextlib.contextmanager
def followed() -> Iterator[None]:
    """Reads made in here are no stream of their own: who makes them looks after what comes next."""
    token = _followed.set(True)
    try:
        yield
    finally:
        _followed.reset(token)


def is_followed() -> bool:
    return _followed.get()


class Ahead(Protocol):
    """What can be fetched before it is read: an image with a cache, or what is over one.

    Offsets are its own, in bytes.
    """

    @property
    def size(self) -> int: ...

    @property
    def most_ahead(self) -> int:
        """Bytes that may be fetched ahead of one reader."""

    @property
    def line(self) -> Window:
        """What they are fetched over."""

    @property
    def round_trip_s(self) -> float:
        """The line's, as far as it is known already, else 0."""

    def ahead_ranges(self, start: int) -> Iterator[tuple[int, int]]:
        """The ranges that are not zeroes from `start` on, as far as they are known."""

    def fetch_ahead(self, start: int, end: int, *, at_once: bool = False) -> list[Fill]:
        """Start fetching a range that is not zeroes; `at_once`: somebody waits for all of it."""

    def drop_ahead(self, fills: list[Fill]) -> None:
        """Forget what of these only queues."""

    def watch(self, start: int, end: int, then: Callable[[], None]) -> list[Callable[[], None]]:
        """`then` is called when a reader who is served natively gets there, perhaps more than once.
        Each that is returned ends a part of that."""


@dataclass(slots=True, eq=False)
class Stream:
    """A sequential reader; all offsets are bytes."""

    low: int  # reads from here to `next` are its
    mark: int  # and those from here on are in the last window
    next: int
    window: int = 0
    moved: int = 0
    fills: list[Fill] = field(default_factory=list)
    unwatch: list[Callable[[], None]] = field(default_factory=list)


class Readahead:
    """Fetches ahead for those who read `ahead` in sequence."""

    def __init__(self, ahead: Ahead) -> None:
        self._ahead = ahead
        trip_s = ahead.round_trip_s
        self._first = max(FIRST_WINDOW, min(MOST_FIRST_WINDOW, int(trip_s * FIRST_RATE)))
        self._growth = 4 if trip_s > LONG_TRIP_S else 2
        self._streams: list[Stream] = []
        self._candidates: deque[tuple[int, int, int]] = deque(maxlen=CANDIDATES)
        self._clock = count()

    def missed(self, start: int, end: int) -> bool:
        """A read came to Python.  True when it is part of a stream."""
        for stream in self._streams:
            if stream.low <= start <= stream.next + SLACK:
                if end > stream.mark:
                    self._advance(stream, end)
                return True
        begun = start
        for at, (first, ended, goes_on) in enumerate(self._candidates):
            if ended <= start <= goes_on + SLACK:
                del self._candidates[at]
                if ended - first == REQUEST and start == ended and end - first <= ONE_READ:
                    begun = first  # perhaps one read, in two requests
                    break
                self._advance(self._new_stream(start), end)
                return True
        self._candidates.append((begun, end, self._next_data(end)))
        return False

    def _seen(self, stream: Stream, mark: int) -> None:
        """A reader reached what was watched from `mark` on."""
        if stream.mark == mark and stream in self._streams:
            self._advance(stream, stream.next)

    @property
    def window(self) -> int:
        """The largest window of any stream, in bytes: how far ahead of the fastest one it is."""
        return max((stream.window for stream in self._streams), default=0)

    def stop(self) -> None:
        """Follow nobody any more."""
        for stream in list(self._streams):
            self._forget(stream)
        self._candidates.clear()

    def _forget(self, stream: Stream) -> None:
        self._streams.remove(stream)
        self._unwatch(stream)
        self._ahead.drop_ahead(stream.fills)

    def _unwatch(self, stream: Stream) -> None:
        for unwatch in stream.unwatch:
            unwatch()
        stream.unwatch = []

    def _next_data(self, offset: int) -> int:
        if offset >= self._ahead.size:
            return offset
        return next(self._ahead.ahead_ranges(offset), (offset, offset))[0]

    def _new_stream(self, start: int) -> Stream:
        if len(self._streams) == STREAMS:
            self._forget(min(self._streams, key=lambda s: s.moved))
        stream = Stream(start, start, start)
        self._streams.append(stream)
        return stream

    def _advance(self, stream: Stream, read_to: int) -> None:
        """Fetch the next window, and watch it."""
        stream.moved = next(self._clock)
        most = min(self._ahead.most_ahead, max(MOST_WINDOW, LINES * self._ahead.line.limit))
        stream.window = min(stream.window * self._growth or self._first, most)
        stream.low = stream.mark
        stream.mark = stream.next = max(stream.next, read_to)
        stream.fills = [fill for fill in stream.fills if not fill.ended.is_set()]
        left = stream.window
        for start, end in self._ahead.ahead_ranges(stream.next) if self._more(stream) else ():
            end = min(end, start + left)
            stream.fills += self._ahead.fetch_ahead(start, end)
            left -= end - start
            stream.next = end
            if left <= 0:
                break
        if left:
            stream.window = 0  # there is no more to be ahead of
        self._unwatch(stream)
        if stream.mark < stream.next:
            then = partial(self._seen, stream, stream.mark)
            stream.unwatch = self._ahead.watch(stream.mark, stream.next, then)

    def _more(self, stream: Stream) -> bool:
        return self._ahead.most_ahead > 0 and stream.next < self._ahead.size
