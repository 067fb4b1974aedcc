"""Sequential readers, and how far ahead of each is fetched.

    candidate   one miss ended here
        |  the next miss begins where it ended (holes between do not count)
        v
    stream      blocks are fetched up to `next`; the last window, from `mark` on, is watched
        |  its first block is read: the next window, larger, is fetched
        v
    dropped     when more than WATCHES streams are followed, the one that moved least recently

Hits are answered natively and are not seen here; the map tells of the first read in a watched
range.  Random reads never begin where another ended, so they only come and go as candidates.
A window is counted in bytes of data: what is zero costs nothing to read.

Where a round trip is long, small windows gain nothing: while the answer is on its way as much
again could be.  So the first is what comes in meanwhile, and they grow faster.  The largest is some
times what the line holds (window.py): between one and two windows are ahead of the reader, and
where that is less than what may be on its way the line idles.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from imgfs._native import _map
from imgfs.cache.fills import Fill
from imgfs.cache.window import Window
from imgfs.extents import ExtentList

FIRST_WINDOW = 1 << 20
MOST_FIRST_WINDOW = 8 << 20
FIRST_RATE = 40e6  # bytes a second that a line is taken for
LONG_TRIP_S = 0.05
MOST_WINDOW = 16 << 20  # or, if that is more,
LINES = 2  # times what may be on its way at once
SLACK = 64 << 10  # what a sequential reader may leave out
CANDIDATES = 64


@dataclass(slots=True)
class Stream:
    """A sequential reader; all offsets are bytes."""

    slot: int
    low: int  # reads from here to `next` are its
    mark: int  # and those from here on are in the last window
    next: int
    window: int = 0
    moved: int = 0
    fills: list[Fill] = field(default_factory=list)


class Readahead:
    """`fetch(start, end)` starts fetching a range of data; `drop(fills)` forgets what it queued.

    `most_window` is bytes; `line` is what they are fetched over, and `round_trip_s` its length as
    far as it is known already, else 0.
    """

    def __init__(
        self,
        map: _map.SegmentMap,
        extents: ExtentList,
        most_window: int,
        fetch: Callable[[int, int], list[Fill]],
        drop: Callable[[list[Fill]], None],
        line: Window,
        round_trip_s: float = 0.0,
    ) -> None:
        self._map = map
        self._extents = extents
        self._most = most_window
        self._line = line
        self._first = max(FIRST_WINDOW, min(MOST_FIRST_WINDOW, int(round_trip_s * FIRST_RATE)))
        self._growth = 4 if round_trip_s > LONG_TRIP_S else 2
        self._fetch = fetch
        self._drop = drop
        self._streams: dict[int, Stream] = {}
        self._candidates: deque[tuple[int, int]] = deque(maxlen=CANDIDATES)
        self._clock = count()

    def missed(self, start: int, end: int) -> bool:
        """A read came to Python.  True when it is part of a stream."""
        for stream in self._streams.values():
            if stream.low <= start <= stream.next + SLACK:
                if end > stream.mark:
                    self._advance(stream, end)
                return True
        for at, (ended, goes_on) in enumerate(self._candidates):
            if ended <= start <= goes_on + SLACK:
                del self._candidates[at]
                self._advance(self._new_stream(start), end)
                return True
        self._candidates.append((end, self._next_data(end)))
        return False

    def seen(self, slots: list[int]) -> None:
        """Reads reached what these slots watch."""
        for slot in slots:
            stream = self._streams.get(slot)
            if stream is not None:
                self._advance(stream, stream.next)

    @property
    def window(self) -> int:
        """The largest window of any stream, in bytes: how far ahead of the fastest one it is."""
        return max((stream.window for stream in self._streams.values()), default=0)

    def stop(self) -> None:
        """Follow nobody any more."""
        for stream in self._streams.values():
            self._map.watch(stream.slot, 0, 0)
            self._drop(stream.fills)
        self._streams.clear()
        self._candidates.clear()

    def _next_data(self, offset: int) -> int:
        if offset >= self._extents.end:
            return offset
        return next(self._extents.data_ranges(offset), (offset, offset))[0]

    def _new_stream(self, start: int) -> Stream:
        free = next((n for n in range(_map.WATCHES) if n not in self._streams), None)
        if free is None:
            oldest = min(self._streams.values(), key=lambda s: s.moved)
            self._drop(oldest.fills)
            free = oldest.slot
        stream = self._streams[free] = Stream(free, start, start, start)
        return stream

    def _advance(self, stream: Stream, read_to: int) -> None:
        """Fetch the next window, and watch it."""
        stream.moved = next(self._clock)
        most = min(self._most, max(MOST_WINDOW, LINES * self._line.limit))
        stream.window = min(stream.window * self._growth or self._first, most)
        stream.low = stream.mark
        stream.mark = stream.next = max(stream.next, read_to)
        stream.fills = [fill for fill in stream.fills if not fill.ended.is_set()]
        left = stream.window
        for start, end in self._extents.data_ranges(stream.next) if self._more(stream) else ():
            end = min(end, start + left)
            stream.fills += self._fetch(start, end)
            left -= end - start
            stream.next = end
            if left <= 0:
                break
        if left:
            stream.window = 0  # there is no more to be ahead of
        if stream.mark < stream.next:
            self._map.watch(stream.slot, stream.mark, stream.next)

    def _more(self, stream: Stream) -> bool:
        return self._most > 0 and stream.next < self._extents.end
