"""What a cache keeps from one mount to the next, and that none of it is ever wrong."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imgfs.cache.cached import CachedImage, open_cached
from imgfs.cache.directory import BLOCK
from imgfs.cache.space import CacheSpace

from .memory import MemorySource, extents
from .test_cached import allocated, noise

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
Body = Callable[[CachedImage, CacheSpace], Awaitable[None]]


def mounted(source: MemorySource, root: Path, body: Body, limit: int = 64 << 20) -> None:
    """One mount of the source, from its begin to its end in good order."""

    async def run() -> None:
        space = CacheSpace(limit, root)
        await space.count_idle()
        with trio.fail_after(60):
            async with open_cached(source, space, root) as image:
                await body(image, space)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert space.used <= limit

    trio.run(run)


async def read_all(image: CachedImage, space: CacheSpace) -> None:
    for offset in range(0, image.size, 5 * BLOCK):
        length = min(5 * BLOCK, image.size - offset)
        data = await image.read(offset, length)
        content = image.source.content  # type: ignore[attr-defined]
        assert bytes(data) == content[offset : offset + length]


def blocks_file(root: Path) -> Path:
    (found,) = root.glob("*/blocks")
    return found


def test_nothing_is_fetched_twice(tmp_path: Path) -> None:
    """Data, zeroes that were data, and holes; odd sizes."""
    content = noise(20 * BLOCK) + bytes(3 * BLOCK) + noise(BLOCK // 2) + bytes(2 * BLOCK) + b"end"
    size = len(content)
    known = extents((21 * BLOCK, 0), (22 * BLOCK, 3), (size, 0))
    mounted(MemorySource(content, known), tmp_path, read_all)
    again = MemorySource(content, known)

    async def body(image: CachedImage, space: CacheSpace) -> None:
        await read_all(image, space)
        assert image.map.read(0, size) == content
        assert image.map.seek(20 * BLOCK, os.SEEK_DATA) == 23 * BLOCK

    mounted(again, tmp_path, body)
    assert again.fetched == []
    assert again.asked_for_extents == 0


def test_another_identity_finds_nothing(tmp_path: Path) -> None:
    mounted(MemorySource(noise(5 * BLOCK, 1)), tmp_path, read_all)
    other = MemorySource(noise(5 * BLOCK, 2))
    mounted(other, tmp_path, read_all)
    assert other.bytes_fetched == other.size


def test_a_bad_block_is_fetched_again(tmp_path: Path) -> None:
    content = noise(40 * BLOCK)
    mounted(MemorySource(content), tmp_path, read_all)
    with blocks_file(tmp_path).open("r+b") as file:
        for block in (0, 17, 39):
            file.seek(block * BLOCK + 12345)
            file.write(b"!")
    again = MemorySource(content)
    mounted(again, tmp_path, read_all)
    assert sorted(offset // BLOCK for offset, _ in again.fetched) == [0, 17, 39]
    once_more = MemorySource(content)
    mounted(once_more, tmp_path, read_all)
    assert once_more.fetched == []


def test_records_without_their_bytes_are_worth_nothing(tmp_path: Path) -> None:
    """As after a power loss that spared the wrong file."""
    content = noise(10 * BLOCK)
    mounted(MemorySource(content), tmp_path, read_all)
    with blocks_file(tmp_path).open("r+b") as file:
        file.truncate(0)
        file.truncate(len(content))
    again = MemorySource(content)
    mounted(again, tmp_path, read_all)
    assert again.bytes_fetched == len(content)


def test_bytes_without_their_record_take_no_room(tmp_path: Path) -> None:
    content = noise(10 * BLOCK)
    mounted(MemorySource(content), tmp_path, read_all)
    (checks,) = tmp_path.glob("*/checks")
    checks.write_bytes(bytes(4 * 10))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        assert space.used == 0
        assert allocated(tmp_path) == 0

    mounted(MemorySource(content), tmp_path, body)


def test_damaged_files_of_the_directory(tmp_path: Path) -> None:
    content = noise(10 * BLOCK) + bytes(10 * BLOCK)
    known = extents((10 * BLOCK, 0), (20 * BLOCK, 3))
    for name in ("source", "checks", "extents", "blocks"):
        for damage in (b"", b"{}", os.urandom(50), b'{"version": 1}'):
            mounted(MemorySource(content, known), tmp_path, read_all)
            (path,) = tmp_path.glob(f"*/{name}")
            path.write_bytes(damage)
            mounted(MemorySource(content, known), tmp_path, read_all)


def test_a_lower_limit_holds_from_the_start(tmp_path: Path) -> None:
    content = noise(40 * BLOCK)
    mounted(MemorySource(content), tmp_path, read_all)

    async def body(image: CachedImage, space: CacheSpace) -> None:
        assert allocated(tmp_path) <= 10 * BLOCK
        await read_all(image, space)

    mounted(MemorySource(content), tmp_path, body, limit=10 * BLOCK)
    assert 0 < allocated(tmp_path) <= 10 * BLOCK


def test_what_nobody_uses_goes_first(tmp_path: Path) -> None:
    """The directories of images that are not mounted count, and are the first to go."""
    first, second = (MemorySource(noise(20 * BLOCK, n), name=f"{n}") for n in (1, 2))
    mounted(first, tmp_path, read_all)
    os.utime(next(tmp_path.glob("1-*")), (1, 1))
    mounted(second, tmp_path, read_all)
    third = MemorySource(noise(20 * BLOCK, 3), name="3")
    mounted(third, tmp_path, read_all, limit=50 * BLOCK)
    assert sorted(path.name[0] for path in tmp_path.glob("*-*")) == ["2", "3"]
    assert allocated(tmp_path) <= 50 * BLOCK
    again = MemorySource(second.content, name="2")
    mounted(again, tmp_path, read_all)
    assert again.fetched == []


@settings(
    max_examples=100 if LONG else 12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.randoms(use_true_random=False))
def test_many_mounts_of_one_source(tmp_path: Path, rng: random.Random) -> None:
    """Random reads over a few mounts, with limits that change and files that are damaged."""
    pieces = [noise(BLOCK, n) if rng.random() < 0.7 else bytes(BLOCK) for n in range(30)]
    content = b"".join(pieces)[: rng.randrange(20 * BLOCK, 30 * BLOCK)]

    async def body(image: CachedImage, space: CacheSpace) -> None:
        for _ in range(rng.randrange(15)):
            offset = rng.randrange(len(content))
            length = min(rng.randrange(1, 8 * BLOCK), len(content) - offset)
            assert bytes(await image.read(offset, length)) == content[offset : offset + length]
            assert space.used <= space.limit
            if rng.random() < 0.2:
                await image.record()

    for _ in range(4):
        limit = rng.choice([0, 3, 12, 40]) * BLOCK
        mounted(MemorySource(content), tmp_path, body, limit)
        assert allocated(tmp_path) <= limit
        for path in tmp_path.glob("*/[bc]*"):
            if rng.random() < 0.4:
                with path.open("r+b") as file:
                    file.seek(rng.randrange(path.stat().st_size))
                    file.write(rng.randbytes(rng.randrange(1, 40)))


ORDER = random.Random(5).sample(range(0, 800, 4), 200)  # apart, so that nothing is read ahead
CHILD = f"""
ORDER = {ORDER}
import sys
from pathlib import Path
import trio
from tests.cache.memory import MemorySource
from tests.cache.test_cached import noise
from imgfs.cache.cached import open_cached
from imgfs.cache.directory import BLOCK
from imgfs.cache.space import CacheSpace

async def main():
    source = MemorySource(noise(800 * BLOCK))
    async with open_cached(source, CacheSpace(1 << 30), Path(sys.argv[1])) as image:
        for done, block in enumerate(ORDER):
            await image.read(block * BLOCK, BLOCK)
            if done == 100:
                await image.record()
                print("recorded", flush=True)
            await trio.sleep(0.005)

trio.run(main)
"""


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.2])
def test_kill_while_reading(tmp_path: Path, after_s: float) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "recorded\n"
    trio.run(trio.sleep, after_s)
    child.kill()
    child.wait()
    child.stdout.close()
    again = MemorySource(noise(800 * BLOCK))

    async def body(image: CachedImage, space: CacheSpace) -> None:
        for block in sorted(ORDER):
            data = await image.read(block * BLOCK, BLOCK)
            assert bytes(data) == again.content[block * BLOCK : (block + 1) * BLOCK]

    mounted(again, tmp_path, body)
    refetched = {offset // BLOCK for offset, _ in again.fetched}
    assert refetched and not refetched & set(ORDER[:100])
