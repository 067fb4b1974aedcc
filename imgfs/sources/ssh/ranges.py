"""Where a file has data, as ranges@asyncssh.com says it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import asyncssh

from imgfs.extents import ExtentList, from_data_ranges

log = logging.getLogger(__name__)

MOST_RANGES = 8 << 20


async def data_ranges(file: Any, name: str, size: int, timeout_s: float) -> ExtentList | None:
    """Extents of the open file; None unless the server has the extension and finds a hole."""
    ranges: list[tuple[int, int]] = []
    try:
        async with asyncio.timeout(timeout_s):
            async for start, length in file.request_ranges(0, size):
                if length <= 0 or len(ranges) >= MOST_RANGES:
                    raise ValueError("no progress")
                ranges.append((start, start + length))
        if ranges == [(0, size)]:  # what a server without the extension seems to say
            return None
        return from_data_ranges(iter(_joined(ranges)), size)
    except (ValueError, OverflowError, TimeoutError, asyncssh.SFTPError) as exc:
        log.info("%s: the server's ranges are of no use: %s", name, exc)
        return None


def _joined(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges that touch, as one."""
    current: tuple[int, int] | None = None
    for start, end in ranges:
        if current is not None and start == current[1]:
            current = (current[0], end)
            continue
        if current is not None:
            yield current
        current = (start, end)
    if current is not None:
        yield current
