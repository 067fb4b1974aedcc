"""Prefetching: all of it, at its own rate, behind readers, and never at others' cost."""

from __future__ import annotations

import os
from pathlib import Path

import trio
import trio.testing

from imgfs.cache.cached import CachedImage, Policy, open_cached
from imgfs.cache.directory import BLOCK
from imgfs.cache.space import CacheSpace

from .memory import MemorySource, extents

MIB = 1 << 20


def test_all_data_is_fetched_once_and_no_hole(tmp_path: Path) -> None:
    content = os.urandom(9 * MIB) + bytes(20 * MIB) + os.urandom(3 * MIB)
    source = MemorySource(content, extents((9 * MIB, 0), (29 * MIB, 3), (32 * MIB, 0)))

    async def main() -> None:
        async with open_cached(source, CacheSpace(1 << 30), tmp_path, Policy(prefetch=0)) as image:
            await image.prepare()
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert source.bytes_fetched == 12 * MIB
            assert image.map.read(0, image.size) == content
            assert source.bytes_fetched == 12 * MIB

    trio.run(main)


def test_rate(tmp_path: Path) -> None:
    """Sixteen of twenty megabytes take no less than their share of a second."""
    source = MemorySource(os.urandom(20 * MIB))

    async def main() -> None:
        begun = trio.current_time()
        policy = Policy(prefetch=20 * MIB)
        async with open_cached(source, CacheSpace(1 << 30), tmp_path, policy) as image:
            await image.prepare()
            while image.store.present * BLOCK < 16 * MIB:
                await trio.sleep(0.01)
            assert 0.4 < trio.current_time() - begun < 5

    trio.run(main)


def test_it_stops_when_the_cache_is_full(tmp_path: Path) -> None:
    source = MemorySource(os.urandom(20 * MIB))
    limit = 8 * MIB

    async def main() -> None:
        space = CacheSpace(limit)
        async with open_cached(source, space, tmp_path, Policy(prefetch=0)) as image:
            await image.read(19 * MIB, 100)
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert limit - 4 * MIB <= space.used <= limit
            assert image.map.read(19 * MIB, 100) is not None  # was not evicted for it
            assert source.bytes_fetched <= limit

    trio.run(main)


def test_readers_come_first(tmp_path: Path) -> None:
    source = MemorySource(os.urandom(40 * MIB))

    async def main() -> None:
        async with open_cached(source, CacheSpace(1 << 30), tmp_path, Policy(prefetch=0)) as image:
            source.gate = trio.Event()
            await image.prepare()
            await trio.testing.wait_all_tasks_blocked(0.02)
            running = source.running
            assert 0 < running <= 8
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_one, image)
                await trio.testing.wait_all_tasks_blocked(0.02)
                assert source.running == running + 1
                source.gate.set()

    async def read_one(image: CachedImage) -> None:
        assert bytes(await image.read(39 * MIB, 10)) == source.content[39 * MIB : 39 * MIB + 10]

    trio.run(main)
