"""The bridge between trio and asyncio."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import trio

from imgfs.errors import SourceUnreachable
from imgfs.sources.bridge import Bridge

from .conftest import run


async def double(n: int) -> int:
    await asyncio.sleep(0)
    if n < 0:
        raise ValueError(n)
    return 2 * n


def test_result_and_error() -> None:
    async def main() -> None:
        bridge = Bridge()
        assert await bridge.call(double, 4) == 8
        with pytest.raises(ValueError, match="-1"):
            await bridge.call(double, -1)
        await bridge.aclose()

    run(main)


def test_starts_lazily_and_ends() -> None:
    async def main() -> None:
        before = threading.active_count()
        bridge = Bridge()
        assert threading.active_count() == before
        await bridge.call(double, 1)
        await bridge.aclose()
        assert "imgfs-asyncio" not in {thread.name for thread in threading.enumerate()}
        with pytest.raises(SourceUnreachable):
            await bridge.call(double, 1)

    run(main)


def test_cancellation_returns_at_once() -> None:
    """Even from a call that does not end when it is told to."""
    ended = threading.Event()

    async def stubborn() -> None:
        for _ in range(2):
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                continue
        ended.set()

    async def main() -> None:
        bridge = Bridge()
        begun = time.monotonic()
        with trio.move_on_after(0.1) as scope:
            await bridge.call(stubborn)
        assert scope.cancelled_caught
        assert time.monotonic() - begun < 0.5
        assert not ended.is_set()
        await bridge.aclose()

    run(main)


def test_cancellation_reaches_asyncio() -> None:
    cancelled = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def main() -> None:
        bridge = Bridge()
        with trio.move_on_after(0.1):
            await bridge.call(wait)
        assert await trio.to_thread.run_sync(cancelled.wait, 5)
        assert await bridge.call(double, 3) == 6
        await bridge.aclose()

    run(main)


def test_many_at_once_and_cancelled_at_random() -> None:
    async def main() -> None:
        bridge = Bridge()
        done: list[int] = []

        async def one(n: int) -> None:
            with trio.move_on_after(n % 7 / 1000):
                done.append(await bridge.call(double, n))

        async with trio.open_nursery() as nursery:
            for n in range(500):
                nursery.start_soon(one, n)
        assert set(done) <= {2 * n for n in range(500)}
        await bridge.aclose()

    run(main)


def test_closing_ends_what_runs() -> None:
    async def main() -> None:
        bridge = Bridge()
        async with trio.open_nursery() as nursery:

            async def caller() -> None:
                with pytest.raises(SourceUnreachable):
                    await bridge.call(asyncio.sleep, 60)

            nursery.start_soon(caller)
            await trio.sleep(0.1)
            await bridge.aclose()

    run(main)
