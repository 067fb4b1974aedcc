"""When a source gets a directory of the cache, and what is in it then."""

from __future__ import annotations

import time
from pathlib import Path

import trio
import trio.testing

from imgfs.cache.cached import MANY_EXTENTS, CachedImage, open_cached
from imgfs.cache.directory import BLOCK
from imgfs.cache.space import CacheSpace
from imgfs.extents import ExtentListBuilder, Flags
from imgfs.sources.base import Identity, SourceStat

from .memory import MemorySource, extents
from .test_cached import noise
from .test_kept import Body, mounted

HOLE = Flags.HOLE | Flags.ZERO
SIZE = 20 * BLOCK


class Peeked(MemorySource):
    """One of which short ranges can be had at once."""

    peeked = 0

    async def _peek(self, ranges: object) -> list[bytes]:
        self.peeked += 1
        return [self.content[at : at + length] for at, length in ranges]  # type: ignore[attr-defined]


def sparse() -> Peeked:
    content = noise(5 * BLOCK) + bytes(15 * BLOCK)
    return Peeked(content, extents((5 * BLOCK, 0), (SIZE, HOLE)))


def directories(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()]


async def look(image: CachedImage, space: CacheSpace) -> None:
    await image.extents(0, image.size)
    content = image.source.content  # type: ignore[attr-defined]
    for ranges in ([(0, 100), (SIZE - 7, 7)], [(5 * BLOCK - 50, 100)]):
        found = await image.peek(ranges)
        assert found == [content[at : at + length] for at, length in ranges]
    assert image.source.peeked == 2  # type: ignore[attr-defined]
    assert image.source.fetched == []  # type: ignore[attr-defined]


def test_who_looks_makes_no_directory(tmp_path: Path) -> None:
    mounted(sparse(), tmp_path, look)
    assert directories(tmp_path) == []


def test_the_first_block_makes_it_and_keeps_the_map(tmp_path: Path) -> None:
    async def body(image: CachedImage, space: CacheSpace) -> None:
        assert directories(tmp_path) == []
        assert await image.read(BLOCK, 10) == image.source.content[BLOCK : BLOCK + 10]  # type: ignore[attr-defined]
        assert len(directories(tmp_path)) == 1

    async def again(image: CachedImage, space: CacheSpace) -> None:
        await image.read(BLOCK, 10)
        source = image.source
        assert isinstance(source, MemorySource)
        assert (source.fetched, source.asked_for_extents) == ([], 0)
        assert not image.is_only_looked_at

    mounted(sparse(), tmp_path, body)
    mounted(sparse(), tmp_path, again)


def test_what_is_wanted_at_length_is_read(tmp_path: Path) -> None:
    async def body(image: CachedImage, space: CacheSpace) -> None:
        assert await image.peek([(0, 3 * BLOCK)]) is None

    mounted(sparse(), tmp_path, body)


def test_a_long_map_is_kept_at_once(tmp_path: Path) -> None:
    builder = ExtentListBuilder()
    for number in range(1, MANY_EXTENTS + 1):
        builder.append(number * 512, Flags.DATA if number % 2 else HOLE)
    known = builder.finish(MANY_EXTENTS * 512)
    content = noise(known.end)

    async def body(image: CachedImage, space: CacheSpace) -> None:
        await image.prepare()

    for asked in (1, 0):
        source = MemorySource(content, known)
        mounted(source, tmp_path, body)
        assert source.asked_for_extents == asked


def test_whole_seconds_that_lasted_when_it_was_opened(tmp_path: Path) -> None:
    """It is the source's opening that counts, and not that of the directory."""

    def source(age_s: float) -> MemorySource:
        made = sparse()
        mtime_ns = time.time_ns() - int(age_s * 1e9)
        made.stat = SourceStat(made.size, mtime_ns, 0o600, Identity("sftp", "1"))
        return made

    def body(pause_s: float) -> Body:
        async def read(image: CachedImage, space: CacheSpace) -> None:
            await trio.sleep(pause_s)
            await image.read(0, 10)

        return read

    mounted(source(0.5), tmp_path, body(1.7))
    assert directories(tmp_path) == []
    mounted(source(5), tmp_path, body(0))
    assert len(directories(tmp_path)) == 1


def test_blocks_that_came_after_they_were_counted(tmp_path: Path) -> None:
    """Another mount has left some meanwhile."""

    async def main() -> None:
        space = CacheSpace(64 << 20, tmp_path)
        await space.count_idle()
        await trio.to_thread.run_sync(mounted, sparse(), tmp_path, read_five)
        source = sparse()
        async with open_cached(source, space, tmp_path) as image:
            for block in range(5):
                assert await image.read(block * BLOCK, BLOCK) is not None
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert source.fetched == []
            assert space.used == 5 * BLOCK
        assert space.used == 0

    async def read_five(image: CachedImage, space: CacheSpace) -> None:
        await image.read(0, 5 * BLOCK)

    trio.run(main)


def test_all_blocks_that_come_at_once_are_kept(tmp_path: Path) -> None:
    async def body(image: CachedImage, space: CacheSpace) -> None:
        async with trio.open_nursery() as nursery:
            for block in range(5):
                nursery.start_soon(image.read, block * BLOCK, BLOCK)
                await trio.sleep(0.0002)
        # Readers have their bytes before these are written.
        with trio.fail_after(10):
            while image.store.present < 5:
                await trio.sleep(0.01)

    for name in range(20):
        mounted(MemorySource(noise(5 * BLOCK), name=f"{name}"), tmp_path, body)
