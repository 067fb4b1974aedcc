"""One contract, for every source: what `Source` promises, whatever the bytes come from.

A kind of source is a function that serves an image for as long as a block runs; a check is a
function of what that gives and of the image.  Both are lists: `CHECKS` here, and the kinds beside
the tests that run them (tests/sources/test_conformance.py).
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from imgfs.errors import ImgfsError, OutOfRange, SourceChanged, SourceUnreachable
from imgfs.extents import Flags
from imgfs.sources.base import Source

MIB = 1 << 20
TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Served:
    """An image that is being served.

    `open` opens it, with a timeout of TIMEOUT_S; `stop` ends the server for good, or is None where
    there is none.  `sector`: sizes are rounded up to whole ones, with zeroes.
    """

    open: Callable[[], AbstractAsyncContextManager[Source]]
    stop: Callable[[], None] | None = None
    tells_holes: bool = True
    sector: int = 1


#: Serves the image at the second path; the first is a directory for what the server needs.
Kind = Callable[[Path, Path], AbstractContextManager[Served]]
Check = Callable[[Served, Path], Awaitable[None]]


def content(served: Served, image: Path) -> bytes:
    data = image.read_bytes()
    return data + bytes(-len(data) % served.sector)


async def check_size_and_stat(served: Served, image: Path) -> None:
    async with served.open() as source:
        assert source.size == source.stat.size == len(content(served, image))
        assert 0 <= source.stat.mode <= 0o777
        assert source.stat.mtime_ns > 0
        assert source.name
        assert source.url.isprintable()


async def check_reads_of_any_alignment(served: Served, image: Path) -> None:
    data, chooser = content(served, image), random.Random(1)
    async with served.open() as source:
        assert bytes(await source.read(0, len(data))) == data
        for at in (0, 1, 511, 512, 4095, 65535, MIB - 1, len(data) - 1):
            for length in (0, 1, 511, 512, 513, 65537, 300_001):
                length = min(length, len(data) - at)
                assert bytes(await source.read(at, length)) == data[at : at + length]
        for _ in range(40):
            at = chooser.randrange(len(data))
            length = chooser.randrange(min(2 * MIB, len(data) - at) + 1)
            assert bytes(await source.read(at, length)) == data[at : at + length]


async def check_ranges_outside(served: Served, image: Path) -> None:
    async with served.open() as source:
        size = source.size
        for offset, length in ((-1, 1), (0, size + 1), (size, 1), (size - 1, 2), (0, -1)):
            with pytest.raises(OutOfRange):
                await source.read(offset, length)
            with pytest.raises(OutOfRange):
                await source.extents(offset, length)
        assert bytes(await source.read(size, 0)) == b""


async def check_extents_cover_and_are_true(served: Served, image: Path) -> None:
    """A zero is claimed only where each byte is one; every answer covers what was asked for."""
    data = content(served, image)
    async with served.open() as source:
        whole = await source.extents(0, len(data))
        assert (whole.start, whole.end) == (0, len(data))
        for extent in whole:
            if extent.is_zero:
                assert not any(data[extent.start : extent.end])
        chooser = random.Random(2)
        for _ in range(20):
            start = chooser.randrange(len(data))
            end = chooser.randrange(start, len(data)) + 1
            assert await source.extents(start, end - start) == whole.clip(start, end)


async def check_holes_are_found(served: Served, image: Path) -> None:
    async with served.open() as source:
        found = await source.extents(0, source.size)
        if served.tells_holes:
            assert found.stored_bytes() <= image.stat().st_blocks * 512 + served.sector
            assert any(extent.flags & Flags.HOLE for extent in found)
        else:
            assert found.stored_bytes() == source.size


async def check_concurrent_reads(served: Served, image: Path) -> None:
    data = content(served, image)
    async with served.open() as source:

        async def read(offset: int) -> None:
            length = min(MIB // 2, len(data) - offset)
            assert bytes(await source.read(offset, length)) == data[offset : offset + length]

        async with trio.open_nursery() as nursery:
            for offset in range(0, len(data), MIB // 8):
                nursery.start_soon(read, offset)
            nursery.start_soon(source.extents, 0, source.size)
        assert source.counters.in_flight == 0
        assert source.counters.errors == 0


async def check_cancellation(served: Served, image: Path) -> None:
    """A reader that goes away is gone at once, and disturbs nobody."""
    data = content(served, image)
    async with served.open() as source:

        async def cancelled(number: int) -> None:
            with trio.move_on_after(number / 4000):
                await source.read(0, 4 * MIB)

        for _ in range(3):
            begun = trio.current_time()
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(cancelled, number)
            assert trio.current_time() - begun < 1
            assert bytes(await source.read(MIB, MIB)) == data[MIB : 2 * MIB]
        assert source.counters.in_flight == 0


async def check_identity_of_what_stays(served: Served, image: Path) -> None:
    async with served.open() as one, served.open() as other:
        await one.check_identity()
        assert one.stat.identity == other.stat.identity


async def check_errors_when_the_server_is_gone(served: Served, image: Path) -> None:
    """An error after the timeout, not sooner and not never; it is not taken for a change."""
    if served.stop is None:
        return
    async with served.open() as source:
        await trio.to_thread.run_sync(served.stop)
        begun = trio.current_time()
        with pytest.raises(ImgfsError) as caught:
            await source.read(0, 1000)
        assert TIMEOUT_S * 0.9 < trio.current_time() - begun < TIMEOUT_S * 3
        assert isinstance(caught.value, SourceUnreachable)
        assert not isinstance(caught.value, SourceChanged)
        assert "\n" not in str(caught.value)
        assert source.counters.errors == 1
        assert source.counters.last_error == str(caught.value)


CHECKS: tuple[Check, ...] = (
    check_size_and_stat,
    check_reads_of_any_alignment,
    check_ranges_outside,
    check_extents_cover_and_are_true,
    check_holes_are_found,
    check_concurrent_reads,
    check_cancellation,
    check_identity_of_what_stays,
    check_errors_when_the_server_is_gone,
)
