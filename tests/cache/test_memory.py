"""What comes fast, and no later mount may use, is held in memory and never written to disk."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import trio
import trio.testing

from imgfs._native import _map
from imgfs.cache import filling
from imgfs.cache.cached import CachedImage, Policy, open_cached
from imgfs.cache.directory import BLOCK
from imgfs.cache.memory import LIMIT, OLD_S, Memory
from imgfs.cache.space import CacheSpace
from imgfs.errors import SourceChanged
from imgfs.sources.base import Identity

from .memory import MemorySource, extents

MIB = 1 << 20
STEP = 128 << 10

Body = Callable[[CachedImage, CacheSpace], Awaitable[None]]


def without_identity(source: MemorySource) -> MemorySource:
    source.stat = replace(source.stat, identity=None)
    return source


def run(source: MemorySource, root: Path, body: Body, policy: Policy | None = None) -> None:
    async def main() -> None:
        space = CacheSpace(256 * MIB)
        with trio.fail_after(60):
            async with open_cached(source, space, root, policy) as image:
                await image.prepare()
                await body(image, space)
        assert space.memory.used == 0 and space.used == 0

    trio.run(main)


async def read_through(image: CachedImage, content: bytes) -> None:
    """As a program does that the kernel reads ahead for: natively where it can be."""
    for start in range(0, image.size, STEP):
        length = min(STEP, image.size - start)
        data = image.map.read(start, length)
        if data is None:
            data = await image.read(start, length)
        assert bytes(data) == content[start : start + length]
        await trio.testing.wait_all_tasks_blocked(0.002)


def test_a_stream_is_not_written_to_disk(tmp_path: Path) -> None:
    content = os.urandom(96 * MIB)
    source = without_identity(MemorySource(content))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        most = 0
        for start in range(0, image.size, STEP):
            data = image.map.read(start, STEP) or await image.read(start, STEP)
            assert bytes(data) == content[start : start + STEP]
            await trio.testing.wait_all_tasks_blocked(0.002)
            most = max(most, space.memory.used)
        # Until it is known how fast the source is some of it goes to disk.
        assert image.store.present * BLOCK < 48 * MIB
        assert 0 < most <= LIMIT
        assert source.bytes_fetched <= len(content) + 2 * MIB

    run(source, tmp_path, body)


def test_a_source_with_an_identity_is_kept(tmp_path: Path) -> None:
    content = os.urandom(32 * MIB)
    source = MemorySource(content)
    assert source.stat.identity == Identity("stat", source.stat.identity.token)

    async def body() -> None:
        space = CacheSpace(256 * MIB)
        async with open_cached(source, space, tmp_path) as image:
            await read_through(image, content)
            assert image.store.present * BLOCK == len(content)
            assert space.memory.used == 0

    trio.run(body)


def test_a_slow_source_is_kept(tmp_path: Path) -> None:
    content = os.urandom(16 * MIB)
    source = without_identity(MemorySource(content))
    read = source._read

    async def slowly(offset: int, length: int) -> bytes:
        await trio.sleep(length / (filling.FAST / 8))
        return await read(offset, length)

    source._read = slowly  # type: ignore[method-assign]

    async def body(image: CachedImage, space: CacheSpace) -> None:
        await read_through(image, content)
        assert image.store.present * BLOCK == len(content)

    run(source, tmp_path, body, Policy(readahead=2 * MIB))


def test_prefetched_is_kept(tmp_path: Path) -> None:
    content = os.urandom(24 * MIB)
    source = without_identity(MemorySource(content))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        await read_through(image, content)
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert image.store.present * BLOCK == len(content)

    run(source, tmp_path, body, Policy(prefetch=0))


def test_zero_blocks_are_holes_there_too(tmp_path: Path) -> None:
    data, zeroes = os.urandom(32 * MIB), bytes(8 * MIB)
    content = data + zeroes + os.urandom(8 * MIB)
    source = without_identity(MemorySource(content))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        await read_through(image, content)
        assert image.map.seek(0, os.SEEK_HOLE) == len(data)
        assert image.map.seek(len(data), os.SEEK_DATA) == len(data) + len(zeroes)

    run(source, tmp_path, body)


def test_what_is_written_is_held_no_more(tmp_path: Path) -> None:
    content = os.urandom(64 * MIB)
    source = without_identity(MemorySource(content))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        at = 0
        while not space.memory.used:
            await image.read(at, STEP)
            at += STEP
            await trio.testing.wait_all_tasks_blocked(0.002)
        held = space.memory._held[-1].offset
        source.content = content[:held] + bytes(BLOCK) + content[held + BLOCK :]
        image.spoil(held, held + BLOCK)
        assert bytes(await image.read(held, BLOCK)) == bytes(BLOCK)

    run(source, tmp_path, body)


def test_a_changed_source_leaves_nothing(tmp_path: Path) -> None:
    content = os.urandom(64 * MIB)
    source = without_identity(MemorySource(content, extents((64 * MIB, 0))))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        at = 0
        while not space.memory.used:
            await image.read(at, STEP)
            at += STEP
            await trio.testing.wait_all_tasks_blocked(0.002)
        image.mark_stale(SourceChanged("disk.img: has changed"))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert space.memory.used == 0
        assert image.map.read(0, image.size) is None

    run(source, tmp_path, body)


def test_room() -> None:
    """What was read makes room at once, what nobody reads when it is old, and nothing else does."""
    now = 0.0
    memory = Memory(lambda: now, limit=10 * BLOCK)
    with Path(os.devnull).open("rb") as null:
        store = _map.Store(null.fileno(), 100 * BLOCK)
    m = _map.SegmentMap(100 * BLOCK)
    m.set_store(0, 100 * BLOCK, store, 0)
    assert memory.reserve(6 * BLOCK) and not memory.reserve(5 * BLOCK)
    memory.release(6 * BLOCK)
    assert memory.hold(store, [(0, bytes(4 * BLOCK)), (4 * BLOCK, bytes(4 * BLOCK))])
    assert not memory.reserve(3 * BLOCK)
    m.read(0, 4 * BLOCK)
    assert memory.reserve(6 * BLOCK) and memory.used == 10 * BLOCK
    memory.release(6 * BLOCK)
    assert m.read(0, BLOCK) is None and m.read(4 * BLOCK, BLOCK) == bytes(BLOCK)
    assert not memory.reserve(7 * BLOCK)
    now = OLD_S
    assert memory.reserve(10 * BLOCK)


def test_too_many_pieces_are_none() -> None:
    memory = Memory(lambda: 0.0)
    with Path(os.devnull).open("rb") as null:
        store = _map.Store(null.fileno(), 100 * BLOCK)
    parts = [(number * 8, bytes(8)) for number in range(1000)]
    assert not memory.hold(store, parts)
    assert memory.used == 0 and store.missing(0, 8) == [(0, 1)]


def test_two_that_begin_at_one_place() -> None:
    """The data of a block, and, when its zeroes have been written, the same with what follows."""
    memory = Memory(lambda: 0.0)
    with Path(os.devnull).open("rb") as null:
        store = _map.Store(null.fileno(), 100 * BLOCK)
    assert memory.hold(store, [(BLOCK, bytes(100))])
    assert memory.hold(store, [(BLOCK, bytes(3 * BLOCK))])
    memory.forget(store, 2 * BLOCK, 2 * BLOCK + 1)
    assert store.missing(BLOCK, 3 * BLOCK) == [(1, 3)] and not store.missing(BLOCK, 100)
    assert memory.used == 100
    memory.forget(store, BLOCK, BLOCK + 1)
    assert store.missing(BLOCK, 1) and memory.used == 0
