"""Fetching a whole image before anybody asks for it, at a rate of its own.

It goes through the fills as readahead does: what readers want comes first.  It ends when the image
is there, or when the cache is full: it evicts nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import trio

from imgfs.cache.fills import Fill
from imgfs.extents import ExtentList

log = logging.getLogger(__name__)

CHUNK = 2 << 20
AT_ONCE = 4  # chunks, so that a long line is not idle between two
PAUSE_S = 5.0  # after an error that may pass


async def prefetch(
    extents: ExtentList,
    fetch: Callable[[int, int], list[Fill]],
    has_room: Callable[[int], bool],
    rate: int,
) -> None:
    """Fetch all data of the extents, at most `rate` bytes a second (0: as fast as it goes).

    `fetch(start, end)` starts fetching what is absent of a range; `has_room(length)` says whether
    so many bytes can be kept without evicting others.
    """
    under_way: deque[list[Fill]] = deque()
    begun, done = trio.current_time(), 0
    for start, end in extents.data_ranges():
        for at in range(start, end, CHUNK):
            stop = min(end, at + CHUNK)
            # What is under way may not have taken its room yet.
            while under_way and not has_room(stop - at + CHUNK * len(under_way)):
                await _ended(under_way.popleft())
            if not has_room(stop - at):
                log.info("prefetching stops: the cache is full")
                return
            under_way.append(fetch(at, stop))
            if len(under_way) >= AT_ONCE:
                await _ended(under_way.popleft())
            done += stop - at if under_way and under_way[-1] else 0
            if rate:
                await trio.sleep_until(begun + done / rate)
            else:
                await trio.lowlevel.checkpoint()
    for fills in under_way:
        await _ended(fills)


async def _ended(fills: list[Fill]) -> None:
    for fill in fills:
        await fill.ended.wait()
        if fill.error is not None:
            # What is missing is fetched when it is read; here the rest is gone on with.
            await trio.sleep(PAUSE_S)
