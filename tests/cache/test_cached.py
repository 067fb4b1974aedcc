"""The cached image: right bytes, single flight, its limit, and what it does when things fail."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imgfs._native import _map
from imgfs.cache.cached import CachedImage, open_cached
from imgfs.cache.directory import BLOCK
from imgfs.cache.fills import FAILED_S
from imgfs.cache.space import CacheSpace
from imgfs.errors import ShortRead, SourceChanged, SourceTimeout
from imgfs.extents import ExtentList

from .memory import MemorySource, extents

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def with_cache(
    source: MemorySource,
    body: Callable[[CachedImage, CacheSpace], Awaitable[None]],
    root: Path | None,
    limit: int = 64 << 20,
) -> None:
    async def run() -> None:
        space = CacheSpace(limit)
        with trio.fail_after(60):
            async with open_cached(source, space, root) as image:
                await body(image, space)
            assert space.used == 0  # all of it was given back

    trio.run(run)


def allocated(root: Path) -> int:
    """Bytes of blocks on disk, without what the file system needs to find them again."""
    total = 0
    for path in root.glob("*/blocks"):
        with path.open("rb") as file:
            found = scanned(file.fileno(), path.stat().st_size)
        total += found.stored_bytes()
    return total


def scanned(fd: int, size: int) -> ExtentList:
    """When a block is punched just where it looks it is asked again."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            return ExtentList(0, *_map.scan_file(fd, size))
    raise AssertionError("the file never holds still")


def test_only_who_waited_for_the_source_missed(tmp_path: Path) -> None:
    source = MemorySource(noise(8 * BLOCK))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(image.read, 0, BLOCK)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert image.counters.misses == 3
        for _ in range(5):
            await image.read(0, BLOCK)
        assert (image.counters.misses, image.counters.reads) == (3, 8)
        source.fail = refuse
        with pytest.raises(SourceTimeout):
            await image.read(6 * BLOCK, 100)
        assert (image.counters.misses, image.counters.reads) == (3, 8)

    def refuse(offset: int, length: int) -> None:
        raise SourceTimeout("away")

    with_cache(source, body, tmp_path)


def test_without_room_every_read_misses() -> None:
    source = MemorySource(noise(8 * BLOCK))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        for n in range(1, 5):
            await image.read(0, BLOCK)
            assert image.counters.misses == n

    with_cache(source, body, None)


@settings(
    max_examples=200 if LONG else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_bytes_are_the_sources_whatever_is_read(tmp_path: Path, data: st.DataObject) -> None:
    """Data, zeroes and holes in odd places; reads anywhere, at once; limits of a few blocks."""
    size = data.draw(st.integers(1, 12 * BLOCK))
    cuts = sorted(data.draw(st.sets(st.integers(1, size), max_size=8)) | {size})
    content, parts, start = bytearray(), [], 0
    for end in cuts:
        kind = data.draw(st.sampled_from(["data", "zero", "hole"]))
        content += noise(end - start, end) if kind == "data" else bytes(end - start)
        parts.append((end, 3 if kind == "hole" else 0))
        start = end
    source = MemorySource(bytes(content), extents(*parts))
    reads = data.draw(st.lists(st.tuples(st.integers(0, size), st.integers(0, size)), max_size=25))
    limit = data.draw(st.sampled_from([0, BLOCK, 3 * BLOCK, 64 * BLOCK]))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        async def one(offset: int, length: int) -> None:
            length = min(length, size - offset)
            assert bytes(await image.read(offset, length)) == content[offset : offset + length]
            assert space.used <= space.limit

        for pair in reads[:5]:
            await one(*pair)
        async with trio.open_nursery() as nursery:
            for pair in reads[5:]:
                nursery.start_soon(one, *pair)

    with_cache(source, body, tmp_path, limit)


def test_second_read_is_native(tmp_path: Path) -> None:
    content = noise(5 * BLOCK + 100)
    source = MemorySource(content)

    async def body(image: CachedImage, space: CacheSpace) -> None:
        await image.read(0, image.size)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert image.map.read(0, image.size) == content
        fetched = source.bytes_fetched
        assert bytes(await image.read(7, 3 * BLOCK)) == content[7 : 7 + 3 * BLOCK]
        assert source.bytes_fetched == fetched == image.size
        assert space.used == 6 * BLOCK

    with_cache(source, body, tmp_path)


def test_a_block_is_fetched_once_however_many_want_it(tmp_path: Path) -> None:
    source = MemorySource(noise(BLOCK))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        source.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            for i in range(50):
                nursery.start_soon(image.read, i * 100, 1000)
            await trio.testing.wait_all_tasks_blocked()
            source.gate.set()
        assert source.fetched == [(0, BLOCK)]

    with_cache(source, body, tmp_path)


def test_a_reader_that_goes_away_disturbs_nobody(tmp_path: Path) -> None:
    content = noise(BLOCK)
    source = MemorySource(content)

    async def body(image: CachedImage, space: CacheSpace) -> None:
        source.gate = trio.Event()
        got: list[bytes] = []

        async def stays() -> None:
            got.append(bytes(await image.read(0, 100)))

        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(stays)
                async with trio.open_nursery() as killed:
                    killed.start_soon(image.read, 0, 200)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            source.gate.set()
        assert got == [content[:100]]
        assert len(source.fetched) == 1

    with_cache(source, body, tmp_path)


def test_zero_blocks_become_holes_and_take_no_room(tmp_path: Path) -> None:
    content = noise(BLOCK) + bytes(3 * BLOCK) + noise(BLOCK // 2) + bytes(BLOCK // 2) + bytes(10)
    source = MemorySource(content)

    async def body(image: CachedImage, space: CacheSpace) -> None:
        await image.read(0, image.size)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert image.map.seek(BLOCK, os.SEEK_DATA) == 4 * BLOCK
        assert image.map.seek(0, os.SEEK_HOLE) == BLOCK
        assert image.map.seek(4 * BLOCK, os.SEEK_HOLE) == 5 * BLOCK
        assert image.map.read(0, image.size) == content
        assert space.used == 2 * BLOCK
        assert allocated(tmp_path) <= 2 * BLOCK

    with_cache(source, body, tmp_path)


def test_limit_holds_over_all_images_while_reading(tmp_path: Path) -> None:
    """Four images, 256 blocks each, through 64 blocks: sampled on disk after every read."""
    limit = 64 * BLOCK
    rng = random.Random(7)

    async def run() -> None:
        space = CacheSpace(limit)
        sources = [MemorySource(noise(256 * BLOCK, n), name=f"{n}.img") for n in range(4)]
        async with trio.open_nursery() as nursery:
            images = []
            for source in sources:
                opened: list[CachedImage] = []

                async def hold(source: MemorySource, opened: list[CachedImage] = opened) -> None:
                    async with open_cached(source, space, tmp_path) as image:
                        opened.append(image)
                        await trio.sleep_forever()

                nursery.start_soon(hold, source)
                while not opened:
                    await trio.sleep(0.001)
                images += opened
            for turn in range(300 if LONG else 120):
                image, source = rng.choice(list(zip(images, sources, strict=True)))
                if turn % 10 == 3:
                    source.fail = failing
                length = rng.randrange(1, 40 * BLOCK)
                offset = rng.randrange(0, image.size - length)
                try:
                    found = await image.read(offset, length)
                    assert bytes(found) == source.content[offset : offset + length]
                except SourceTimeout:
                    pass
                source.fail = lambda offset, length: None
                assert space.used <= limit
                assert allocated(tmp_path) <= limit + 64 * 1024  # the files' own metadata
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert space.used == sum(image.store.present for image in images) * BLOCK
            nursery.cancel_scope.cancel()
        assert space.used == 0

    def failing(offset: int, length: int) -> None:
        if rng.random() < 0.5:
            raise SourceTimeout("no answer")

    trio.run(run)


@pytest.mark.parametrize("error", [SourceTimeout("no answer"), ShortRead("cut")])
def test_an_error_reaches_all_who_wait_and_is_not_kept(tmp_path: Path, error: Exception) -> None:
    content = noise(4 * BLOCK)
    source = MemorySource(content)

    async def body(image: CachedImage, space: CacheSpace) -> None:
        def fail(offset: int, length: int) -> None:
            raise error

        source.fail = fail
        failures: list[Exception] = []

        async def one() -> None:
            try:
                await image.read(0, 100)
            except Exception as exc:
                failures.append(exc)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
        assert [type(f) for f in failures] == [type(error)] * 5
        assert space.used == 0
        source.fail = lambda offset, length: None
        with pytest.raises(type(error)):  # the kernel asks twice
            await image.read(50, 100)
        await trio.sleep(FAILED_S + 0.1)
        assert bytes(await image.read(0, 100)) == content[:100]

    with_cache(source, body, tmp_path)


def test_a_changed_source_is_forgotten_whole(tmp_path: Path) -> None:
    source = MemorySource(noise(8 * BLOCK))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        await image.read(0, 2 * BLOCK)

        def fail(offset: int, length: int) -> None:
            raise SourceChanged("another file")

        source.fail = fail
        with pytest.raises(SourceChanged):
            await image.read(6 * BLOCK, 10)
        assert image.became_stale.is_set()
        with pytest.raises(SourceChanged):  # also what had been cached
            await image.read(0, 10)
        assert image.map.read(0, 10) is None

    with_cache(source, body, tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for four blocks and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["-t", "tmpfs", "-o", f"size={4 * BLOCK + BLOCK // 2},mode=700", "tmpfs", str(disk)]
    subprocess.run(["mount", *words], check=True)
    yield disk
    gc.collect()  # an image and its parts refer to each other, and hold the file open
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_means_uncached_reads(small_disk: Path) -> None:
    content = noise(12 * BLOCK)
    source = MemorySource(content)
    hog = small_disk / "hog"
    hog.write_bytes(bytes(3 * BLOCK))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        for offset in (10, 3 * BLOCK, 6 * BLOCK):
            found = await image.read(offset, 3 * BLOCK)
            assert bytes(found) == content[offset : offset + 3 * BLOCK]
            await trio.testing.wait_all_tasks_blocked(0.01)
        # What came through before the disk was full is gone again.
        assert (image.store.present, space.used, allocated(small_disk)) == (0, 0, 0)
        hog.unlink()
        assert bytes(await image.read(0, BLOCK)) == content[:BLOCK]
        assert space.used == 0  # still in the pause
        space._full_until = -1.0  # what ten seconds do
        assert bytes(await image.read(0, 3 * BLOCK)) == content[: 3 * BLOCK]
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert image.map.read(0, 3 * BLOCK) == content[: 3 * BLOCK]

    with_cache(source, body, small_disk)


def test_without_a_directory_everything_still_reads(tmp_path: Path) -> None:
    content = noise(4 * BLOCK)
    source = MemorySource(content)
    (tmp_path / "file").write_text("")

    async def body(image: CachedImage, space: CacheSpace) -> None:
        for _ in range(2):
            assert bytes(await image.read(5, 2 * BLOCK)) == content[5 : 5 + 2 * BLOCK]
        assert image.store.present == 0

    with_cache(source, body, None)
    with_cache(source, body, tmp_path / "file")
