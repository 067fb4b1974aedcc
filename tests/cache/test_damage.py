"""Damage to any file of a cache's directory: what is read is right, whatever it was."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgfs._native import _map
from imgfs.cache.cached import CachedImage
from imgfs.cache.directory import BLOCK, open_directory
from imgfs.cache.entries import SIZE, encode
from imgfs.cache.kept import Kept
from imgfs.cache.space import CacheSpace
from tests.damage import LONG, all_of, flipped, swapped

from .memory import MemorySource, extents
from .test_cached import noise
from .test_kept import mounted, read_all

SIZE_ = 6 * BLOCK + 777
KNOWN = extents((3 * BLOCK + 100, 0), (5 * BLOCK, 3), (SIZE_, 0))
pytestmark = pytest.mark.timeout(3600 if LONG else 300)
FILES = ("checks", "blocks", "extents")


def source(seed: int) -> MemorySource:
    """Data, data that is zero, a hole that ends inside a block, and an odd end."""
    content = noise(2 * BLOCK, seed) + bytes(BLOCK) + noise(100, seed)
    content += bytes(5 * BLOCK - len(content)) + noise(SIZE_ - 5 * BLOCK, seed + 1)
    return MemorySource(content, KNOWN, name=f"{seed}.img")


class Directories:
    """Two sources' directories as a mount left them, put back before each damage."""

    def __init__(self, root: Path) -> None:
        self.good, self.now = root / "good", root / "now"
        self.good.mkdir()
        for seed in (1, 5):
            mounted(source(seed), self.good, read_all)

    def file(self, seed: int, name: str) -> Path:
        (found,) = self.now.glob(f"{seed}.img-*/{name}")
        return found

    def content(self, seed: int, name: str) -> bytes:
        self.restore()
        return self.file(seed, name).read_bytes()

    def restore(self) -> None:
        shutil.rmtree(self.now, ignore_errors=True)
        shutil.copytree(self.good, self.now)

    def check(self, seed: int = 1) -> MemorySource:
        """Read all, natively too, and see it again; returns the source."""
        found = source(seed)

        async def body(image: CachedImage, space: CacheSpace) -> None:
            await image.prepare()
            for offset in range(0, image.size, BLOCK):
                length = min(BLOCK, image.size - offset)
                want = found.content[offset : offset + length]
                assert image.map.read(offset, length) in (None, want)
            await read_all(image, space)
            # Or what has come is still being written.
            assert image.map.read(0, image.size) in (None, found.content)
            for start, end in KNOWN.data_ranges():
                if any(found.content[start:end]):
                    assert image.map.seek(start, os.SEEK_DATA) == start

        mounted(found, self.now, body)
        return found


@pytest.fixture
def directories(tmp_path: Path) -> Directories:
    return Directories(tmp_path)


def test_undamaged(directories: Directories) -> None:
    directories.restore()
    for seed in (1, 5):
        assert directories.check(seed).fetched == []


@pytest.mark.parametrize("name", ["checks", "extents", "source"])
def test_small_files(directories: Directories, name: str) -> None:
    good, other = (directories.content(seed, name) for seed in (1, 5))
    assert good != other and len(good) == len(other)
    for damaged in all_of(good, other):
        directories.restore()
        directories.file(1, name).write_bytes(damaged)
        directories.check()


def test_random_bytes_of_the_blocks(directories: Directories) -> None:
    good = directories.content(1, "blocks")
    rng = random.Random(7)
    stored = [block for block in range(7) if good[block * BLOCK : (block + 1) * BLOCK].strip(b"\0")]
    assert len(stored) == 5
    for _ in range(10_000 // len(stored) if LONG else 20):
        directories.restore()
        damaged, hit = good, set()
        for block in rng.sample(stored, rng.randrange(1, len(stored) + 1)):
            at = block * BLOCK + rng.randrange(min(BLOCK, SIZE_ - block * BLOCK))
            damaged, hit = flipped(damaged, at, rng.randrange(8)), hit | {block}
        directories.file(1, "blocks").write_bytes(damaged)
        fetched = directories.check().fetched
        assert {offset // BLOCK for offset, _ in fetched} <= hit
        assert sum(length for _, length in fetched) >= len(hit)


def ranges(rng: random.Random) -> Iterator[tuple[int, int, int]]:
    for length in (1, 512, 4096, BLOCK):
        places = range(0, SIZE_ - length + 1, length)
        for _ in range(100 if LONG else 8):
            first, second = sorted(rng.sample(places, 2))
            yield first, second, length


def test_swapped_parts_of_the_blocks(directories: Directories) -> None:
    good, other = (directories.content(seed, "blocks") for seed in (1, 5))
    for first, second, length in ranges(random.Random(3)):
        directories.restore()
        directories.file(1, "blocks").write_bytes(swapped(good, first, second, length))
        directories.check()
        both = swapped(good + other, first, len(good) + first, length)
        for seed, content in ((1, both[: len(good)]), (5, both[len(good) :])):
            directories.file(seed, "blocks").write_bytes(content)
        for seed in (1, 5):
            directories.check(seed)


def test_truncated_blocks(directories: Directories) -> None:
    good = directories.content(1, "blocks")
    rng = random.Random(4)
    for length in (0, 1, BLOCK, *(rng.randrange(SIZE_) for _ in range(200 if LONG else 10))):
        directories.restore()
        directories.file(1, "blocks").write_bytes(good[:length])
        directories.check()


@pytest.mark.parametrize(
    "names",
    [
        names
        for n in (1, 2, 3)
        for names in itertools.combinations(("checks", "blocks", "extents"), n)
    ],
)
def test_files_of_another_directory(directories: Directories, names: tuple[str, ...]) -> None:
    """Even all of them together: they are of another source."""
    directories.restore()
    for name in names:
        one, two = (directories.file(seed, name) for seed in (1, 5))
        content = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(content)
    for seed in (1, 5):
        directories.check(seed)


def test_pages_of_entries_swapped(tmp_path: Path) -> None:
    """The entries of large disks take many pages; one of these says that all is zero."""
    page = 4096 // SIZE
    pages = 32  # so that two parts of 64 KiB can be swapped, too
    shown = MemorySource(bytes(8), name="large")
    shown.stat = shown.stat.__class__(pages * page * BLOCK, 0, 0o600, shown.stat.identity)
    shown.size = shown.stat.size
    directory = open_directory(tmp_path, shown)
    kept = Kept(directory, shown.size)
    zeroes = {page * number + each for number in (0, 3, 17) for each in range(page)}
    kept.record({block: kept.codec.zero_entry(block) for block in zeroes})
    good = os.pread(directory.checks, pages * 4096, 0)

    def claimed(content: bytes) -> set[int]:
        os.pwrite(directory.checks, content, 0)
        found = kept.load().zeroes
        return {block for first, count in found for block in range(first, first + count)}

    assert claimed(good) == zeroes
    for length in (SIZE, 512, 4096, 16 * 4096):
        for first, second in ((0, 16 * 4096), (3 * 4096, 19 * 4096)):
            if first % length == 0 and second % length == 0:
                assert claimed(swapped(good, first, second, length)) < zeroes
    for word in (1, (1 << 64) - 1, *(1 << bit for bit in range(64))):
        assert claimed(encode(array("Q", [word]) * (pages * page))) == set()
    directory.close()


def test_a_disk_that_cannot_be_read(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot be read is a bad block, and fetched again."""
    directories.restore()

    class Bad:
        def __init__(self, store: _map.Store) -> None:
            self.store = store

        def read(self, offset: int, length: int) -> bytes:
            if offset == BLOCK:
                raise OSError(5, "Input/output error")
            return self.store.read(offset, length)

    verify = Kept.verify
    monkeypatch.setattr(Kept, "verify", lambda kept, store, *run: verify(kept, Bad(store), *run))  # type: ignore[arg-type]
    assert {offset // BLOCK for offset, _ in directories.check().fetched} == {1}
