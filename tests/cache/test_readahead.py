"""Readahead: streams are followed, even when all their reads are hits; random reads are not."""

from __future__ import annotations

import os
import random
from pathlib import Path

import trio
import trio.testing

from imgfs.cache.cached import CachedImage
from imgfs.cache.directory import BLOCK
from imgfs.cache.space import CacheSpace
from imgfs.formats.disk import Disk
from imgfs.pieces import PieceList, PieceListBuilder
from imgfs.steps import Steps, read
from imgfs.views.decoded import DecodedView, Layer
from imgfs.views.raw import RawView
from imgfs.views.showing import encoded

from .memory import MemorySource, extents
from .test_cached import with_cache

MIB = 1 << 20


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked(0.02)


def test_a_stream_is_fetched_ahead_and_never_twice(tmp_path: Path) -> None:
    source = MemorySource(bytes(range(1, 256)) * (32 * MIB // 255))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        misses = 0
        for offset in range(0, image.size - MIB, MIB):
            # As the request threads do: what is there is read natively, the rest asks.
            if image.map.read(offset, MIB) is None:
                misses += 1
                await image.read(offset, MIB)
            await settled()
        assert misses < 6
        assert source.bytes_fetched <= image.size
        assert max(length for _, length in source.fetched) > MIB

    with_cache(source, body, tmp_path, limit=1 << 30)


def test_the_window_is_that_of_the_fastest_stream(tmp_path: Path) -> None:
    source = MemorySource(bytes(range(1, 256)) * (64 * MIB // 255))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        assert image.window == 0
        seen = []
        for offset in range(0, image.size, MIB):
            await image.read(offset, min(MIB, image.size - offset))
            await settled()
            seen.append(image.window)
        assert seen[0] == 0  # one read is no stream
        assert seen[1] == MIB
        assert max(seen) >= 8 * MIB
        assert seen[-1] == 0  # nothing is left to be ahead of

    with_cache(source, body, tmp_path, limit=1 << 30)


def test_a_stream_is_asked_for_in_order(tmp_path: Path) -> None:
    """A source that sends in the order of its requests must not send what is wanted first last."""
    source = MemorySource(os.urandom(96 * MIB))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        for offset in range(0, 64 * MIB, MIB):
            if image.map.read(offset, MIB) is None:
                await image.read(offset, MIB)
            await settled()
        ahead = [offset for offset, length in source.fetched if length > MIB]
        assert len(ahead) > 20
        assert ahead == sorted(ahead)

    with_cache(source, body, tmp_path, limit=1 << 30)


def test_a_whole_window_is_ahead_of_a_stream(tmp_path: Path) -> None:
    """Whoever reads into the last window is not the one who waits for the next."""
    source = MemorySource(os.urandom(96 * MIB))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        for offset in range(0, 48 * MIB, MIB):
            if image.map.read(offset, MIB) is None:
                await image.read(offset, MIB)
            await settled()
            if offset > 16 * MIB:
                assert max(at + length for at, length in source.fetched) >= offset + 16 * MIB

    with_cache(source, body, tmp_path, limit=1 << 30)


def test_a_stream_goes_over_holes(tmp_path: Path) -> None:
    """A megabyte of data every ten: the next data is where the stream goes on."""
    size, parts, content = 200 * MIB, [], bytearray()
    for end in range(10 * MIB, size + 1, 10 * MIB):
        parts += [(end - MIB, 3), (end, 0)]
        content += bytes(9 * MIB) + os.urandom(1) * MIB
    source = MemorySource(bytes(content), extents(*parts))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        misses = 0
        for start in range(9 * MIB, size, 10 * MIB):
            for offset in range(start, start + MIB, 128 << 10):
                if image.map.read(offset, 128 << 10) is None:
                    misses += 1
                    await image.read(offset, 128 << 10)
                await settled()
        assert misses < 10
        assert source.bytes_fetched == 20 * MIB

    with_cache(source, body, tmp_path, limit=1 << 30)


def test_random_reads_fetch_only_their_blocks(tmp_path: Path) -> None:
    source = MemorySource(os.urandom(64 * MIB))
    rng = random.Random(3)

    async def body(image: CachedImage, space: CacheSpace) -> None:
        blocks = set()
        for _ in range(100):
            block = rng.randrange(0, 64 * MIB // BLOCK, 4)
            blocks.add(block)
            if image.map.read(block * BLOCK + 4096, 4096) is None:
                await image.read(block * BLOCK + 4096, 4096)
            await settled()
        assert source.bytes_fetched == len(blocks) * BLOCK

    with_cache(source, body, tmp_path, limit=1 << 30)


def test_large_random_reads_are_no_streams(tmp_path: Path) -> None:
    """The kernel asks for half a megabyte at once; who reads on after a megabyte is a stream."""
    source = MemorySource(os.urandom(64 * MIB))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        for offset in range(0, 60 * MIB, 4 * MIB):
            for half in (0, MIB // 2):
                await image.read(offset + half, MIB // 2)
                await settled()
        assert source.bytes_fetched == 15 * MIB
        assert image.window == 0
        for offset in (2 * MIB, 2 * MIB + MIB // 2, 3 * MIB):
            await image.read(offset, MIB // 2)
            await settled()
        assert image.window == MIB

    with_cache(source, body, tmp_path, limit=1 << 30)


def test_random_reads_do_not_push_a_stream_out(tmp_path: Path) -> None:
    source = MemorySource(os.urandom(96 * MIB))
    rng = random.Random(4)

    async def body(image: CachedImage, space: CacheSpace) -> None:
        misses = 0
        for offset in range(0, 48 * MIB, 512 << 10):
            if image.map.read(offset, 512 << 10) is None:
                misses += 1
                await image.read(offset, 512 << 10)
            for _ in range(20):
                elsewhere = 48 * MIB + rng.randrange(48 * MIB // BLOCK) * BLOCK
                if image.map.read(elsewhere, 512) is None:
                    await image.read(elsewhere, 512)
            await settled()
        assert misses < 8

    with_cache(source, body, tmp_path, limit=1 << 30)


def test_a_reader_does_not_wait_behind_readahead(tmp_path: Path) -> None:
    """With the window full of fetches that hang, a miss elsewhere starts at once."""
    source = MemorySource(os.urandom(96 * MIB))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        for offset in range(0, 16 * MIB, MIB):
            await image.read(offset, MIB)
        await settled()
        source.gate = trio.Event()
        for offset in range(16 * MIB, 60 * MIB, MIB):
            image.map.read(offset, MIB)  # runs into what is watched
            await settled()
        line = image._fills.window
        running = source.running
        assert line.limit <= line.out < line.limit + 2 * MIB
        wanted = 90 * MIB
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.read, wanted, 4096)
            await settled()
            assert source.running == running + 1
            assert source.fetched[-1] == (wanted, BLOCK)
            source.gate.set()

    with_cache(source, body, tmp_path, limit=1 << 30)


def test_windows_keep_to_their_share_of_a_small_limit(tmp_path: Path) -> None:
    source = MemorySource(os.urandom(16 * MIB))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        for offset in range(0, image.size, 256 << 10):
            data = await image.read(offset, 256 << 10)
            assert bytes(data) == source.content[offset : offset + (256 << 10)]
            assert space.used <= space.limit
            await settled()
        assert source.bytes_fetched < 1.2 * image.size

    with_cache(source, body, tmp_path, limit=2 * MIB)


class Reversed(Disk):
    """The file's chunks, last one first."""

    format = "reversed"
    CHUNK = 256 << 10

    def __init__(self, size: int) -> None:
        self.size = size

    def map(self, offset: int, length: int) -> Steps[PieceList]:
        yield from read(0, 1)
        pieces = PieceListBuilder()
        while pieces.end < self.size:
            pieces.data(pieces.end + self.CHUNK, self.size - pieces.end - self.CHUNK)
        return pieces.finish(self.size)


def test_who_reads_a_disk_in_a_file_is_followed(tmp_path: Path) -> None:
    """By the disk's offsets: in the file he goes backwards."""
    size = 32 * MIB
    source = MemorySource((bytes(range(1, 256)) * (size // 255 + 1))[:size])

    async def body(image: CachedImage, space: CacheSpace) -> None:
        raw = RawView(source, image)
        disk = DecodedView("disk.raw", [Layer([raw], Reversed(size))])
        step, misses = 128 << 10, 0
        await disk.prepare()
        for offset in range(0, size, step):
            if disk.map.read(offset, step) is None:
                misses += 1
                found = await disk.read(offset, step)
                where = size - offset - Reversed.CHUNK + 2 * (offset % Reversed.CHUNK)
                assert found == source.content[where : where + step]
            await settled()
        assert misses <= 3
        assert source.bytes_fetched <= size + BLOCK

    with_cache(source, body, tmp_path, limit=1 << 30)


def test_who_reads_a_shown_file_is_followed(tmp_path: Path) -> None:
    source = MemorySource(bytes(range(1, 256)) * 257 * 512)

    async def body(image: CachedImage, space: CacheSpace) -> None:
        shown = await encoded(RawView(source, image), ".qcow2", "disk.qcow2", "x")
        step, misses = 128 << 10, 0
        await shown.prepare()
        for offset in range(0, shown.size, step):
            length = min(step, shown.size - offset)
            if shown.map.read(offset, length) is None:
                misses += 1
                await shown.read(offset, length)
            await settled()
        assert misses <= 3
        assert source.bytes_fetched <= source.size

    with_cache(source, body, tmp_path, limit=1 << 30)
