"""Local images have their files open while that is of use, and no more of them than may be."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imgfs.errors import ImgfsError, SourceChanged
from imgfs.sources.local.descriptors import DESCRIPTORS, Descriptors
from imgfs.sources.local.file import FileSource, open_file

from .conftest import run


def make(directory: Path, count: int) -> list[Path]:
    paths = [directory / f"{number}.img" for number in range(count)]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    return paths


@contextmanager
def limit_of(files: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def is_open(source: FileSource) -> bool:
    return source.store.fileno() >= 0


def test_one_descriptor_each(tmp_path: Path) -> None:
    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        source = await open_file(str(make(tmp_path, 1)[0]))
        await source.read(0, 10)
        assert len(os.listdir("/proc/self/fd")) == before + 1  # noqa: PTH208
        await source.aclose()
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208

    run(main)


def test_more_images_than_descriptors(tmp_path: Path) -> None:
    async def main() -> None:
        with limit_of(128):
            sources = [await open_file(str(path)) for path in make(tmp_path, 300)]
            assert sum(map(is_open, sources)) <= 64
            for source in sources:
                assert bytes(await source.read(0, 3)) == source.name[:3].encode()
                assert (await source.extents(0, source.size)).end == source.size
                await source.check_identity()
            assert sum(map(is_open, sources)) <= 64
            assert is_open(sources[-1]) and not is_open(sources[0])
            for source in sources:
                await source.aclose()
        assert len(DESCRIPTORS) == 0

    run(main)


def test_the_fast_path_sees_no_file(tmp_path: Path) -> None:
    async def main() -> None:
        source = await open_file(str(make(tmp_path, 1)[0]))
        store = source.store
        assert store.is_present(0, 10)
        assert source.rest(even_if_read=True)
        assert not store.is_present(0, 10)
        with pytest.raises(OSError) as raised:
            store.read(0, 10)
        assert raised.value.errno == errno.ENOTCONN
        await source.read(0, 1)
        assert source.store is store and store.is_present(0, 10)
        await source.aclose()

    run(main)


def test_what_was_read_rests_later(tmp_path: Path) -> None:
    async def main() -> None:
        source = await open_file(str(make(tmp_path, 1)[0]))
        source.store.read(0, 10)
        assert not source.rest(even_if_read=False)
        assert source.rest(even_if_read=False)
        await source.aclose()

    run(main)


@pytest.mark.parametrize("how", ["replaced", "written", "deleted"])
def test_changed_while_it_was_closed(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        path = make(tmp_path, 1)[0]
        source = await open_file(str(path))
        assert source.rest(even_if_read=True)
        if how == "replaced":
            other = tmp_path / "other"
            other.write_bytes(path.read_bytes())
            other.replace(path)
        elif how == "written":
            path.write_bytes(b"other")
        else:
            path.unlink()
        with pytest.raises(SourceChanged):
            await source.read(0, 10)
        await source.aclose()

    run(main)


def test_what_is_written_stays_open(tmp_path: Path) -> None:
    async def main() -> None:
        path = make(tmp_path, 1)[0]
        source = await open_file(str(path), write=True)
        await source.begin_writing()
        assert not source.rest(even_if_read=True)
        await source.write(0, b"new")
        await source.pin()
        assert source.rest(even_if_read=True)
        assert bytes(await source.read(0, 3)) == b"new"
        source.is_needed = lambda: True
        assert not source.rest(even_if_read=True)
        await source.aclose()

    run(main)


def test_none_left_is_said(tmp_path: Path) -> None:
    async def main() -> None:
        first, second = make(tmp_path, 2)
        with limit_of(3), pytest.raises(ImgfsError, match="ulimit -n") as raised:
            await open_file(str(first))
        assert raised.value.errno == errno.EMFILE
        source = await open_file(str(first))
        with limit_of(source.store.fileno() + 1):
            # What is open and not read has to go.
            other = await open_file(str(second))
            assert not is_open(source)
        assert bytes(await source.read(0, 2)) == b"0."
        await source.aclose()
        await other.aclose()

    run(main)


def test_least_recently_used_first() -> None:
    closed: list[str] = []

    class File:
        def __init__(self, name: str) -> None:
            self.name = name

        def rest(self, *, even_if_read: bool) -> bool:
            closed.append(self.name)
            return True

    pool = Descriptors()
    a, b, c = File("a"), File("b"), File("c")
    for file in (a, b, c, a):
        pool.used(file)
    assert pool.spare()
    assert closed == ["b", "c"]
    assert len(pool) == 1
