"""Large reads, whose bytes go to the kernel by reference."""

from __future__ import annotations

import mmap
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts import MIB, Mount

Mounter = Callable[..., Mount]
READ = MIB // 2  # the largest request


def whole(path: Path) -> bytes:
    """What is at the source now: nothing of it from the page cache of the mount."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        parts = iter(lambda: os.read(fd, 3 * READ), b"")
        return b"".join(parts)
    finally:
        os.close(fd)


def spliced(mount: Mount) -> int:
    found = mount.status()["fast_path"]["spliced"]  # type: ignore[index, call-overload]
    assert isinstance(found, int)
    return found


def test_bytes(mount: Mounter, tmp_path: Path) -> None:
    """Data, holes and what is neither, in one request and in many."""
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        for start, length in [
            (0, 5 * MIB),
            (6 * MIB + 512, 700),
            (7 * MIB, MIB),
            (8 * MIB + READ, 77),
        ]:
            file.seek(start)
            file.write(os.urandom(length))
    m = mount(image)
    wanted = image.read_bytes()
    assert whole(m.point / "disk.raw") == wanted
    assert spliced(m) > 0  # not all: one request thread never waits for a disk
    copy = tmp_path / "copy"
    for name in ("disk.qcow2", "disk.vhdx"):
        copy.write_bytes(whole(m.point / name))
        kind = copy.with_name("disk.img"), "-F", name.split(".")[1], copy
        subprocess.run(["qemu-img", "compare", "-f", "raw", *kind], check=True, timeout=60)


@pytest.mark.parametrize("start", [0, 1, 4095, 4096 + 512])
def test_partition_that_begins_inside_of_a_page(mount: Mounter, tmp_path: Path, start: int) -> None:
    """The store's bytes lie otherwise in its pages than in those of who reads."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(os.urandom(2 * MIB + 4 * 4096))
    m = mount(disk)
    fd = os.open(m.point / "disk.raw", os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 2 * MIB) as buffer:
            assert os.preadv(fd, [buffer], start) == 2 * MIB
            assert buffer[:] == disk.read_bytes()[start : start + 2 * MIB]
    finally:
        os.close(fd)
    assert spliced(m) > 0


def test_many_at_once(mount: Mounter, tmp_path: Path) -> None:
    """More of them than there are request threads."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(16 * MIB))
    m = mount(image)
    wanted, wrong = image.read_bytes(), []

    def read(index: int) -> None:
        fd = os.open(m.point / "disk.raw", os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(-1, READ) as buffer:
            for turn in range(64):
                at = (index * 7 + turn * 5) % 32 * READ
                if os.preadv(fd, [buffer], at) != READ or buffer[:] != wanted[at : at + READ]:
                    wrong.append(at)
        os.close(fd)

    threads = [threading.Thread(target=read, args=[index]) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert spliced(m) > 0


def test_cut_source(mount: Mounter, tmp_path: Path) -> None:
    """A source that is shorter than it was: an error, and no bytes left over for another."""
    image, other = tmp_path / "disk.img", tmp_path / "other.img"
    image.write_bytes(os.urandom(4 * MIB))
    other.write_bytes(os.urandom(4 * MIB))
    file = tmp_path / "images.toml"
    file.write_text(f'[images.disk]\nsource = "{image}"\n[images.other]\nsource = "{other}"\n')
    m = mount(file)
    fd = os.open(m.point / "disk/disk.raw", os.O_RDONLY)
    assert os.pread(fd, 4096, 0) == image.read_bytes()[:4096]
    os.truncate(image, 3 * MIB + 100)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    with pytest.raises(OSError):
        for at in range(8):
            os.pread(fd, READ, at * READ)
    os.close(fd)
    for _ in range(3):
        assert whole(m.point / "other/other.raw") == other.read_bytes()


def spliced_writes(mount: Mount) -> int:
    found = mount.status()["fast_path"]["writes_spliced"]  # type: ignore[index, call-overload]
    assert isinstance(found, int)
    return found


@pytest.fixture
def snapshot(mount: Mounter, tmp_path: Path) -> tuple[Mount, Path]:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(8 * MIB + 777))
    m = mount(image)
    (m.point / "snapshots/x").mkdir()
    return m, m.point / "snapshots/x/x.raw"


@pytest.mark.parametrize("start", [0, 512, 4096 + 1])
def test_written_bytes(snapshot: tuple[Mount, Path], tmp_path: Path, start: int) -> None:
    """Aligned or not, onto what is the snapshot's own already and what is not."""
    m, path = snapshot
    wanted = bytearray((m.point / "disk.raw").read_bytes())
    with path.open("r+b", buffering=0) as file:
        for turn in range(2):
            for at in range(start, 6 * MIB, READ + 3 * 4096):
                data = os.urandom(READ - turn)
                assert os.pwrite(file.fileno(), data, at) == len(data)
                wanted[at : at + len(data)] = data
    assert start or spliced_writes(m) > 0  # else small ones come between them
    assert whole(path) == wanted


def test_written_by_many(snapshot: tuple[Mount, Path]) -> None:
    """Large and small ones, reads and other requests between them."""
    m, path = snapshot
    parts = [os.urandom(MIB) for _ in range(8)]

    def write(index: int) -> None:
        with path.open("r+b", buffering=0) as file:
            for _ in range(8):
                for at in range(0, MIB, 128 << 10):
                    data = parts[index][at : at + (128 << 10)]
                    assert os.pwrite(file.fileno(), data, index * MIB + at) == len(data)
                assert os.pwrite(file.fileno(), b"x" * 512, index * MIB) == 512
                assert os.pread(file.fileno(), 512, index * MIB) == b"x" * 512
                path.stat()
                assert os.pwrite(file.fileno(), parts[index][:512], index * MIB) == 512

    threads = [threading.Thread(target=write, args=[index]) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert whole(path)[: 8 * MIB] == b"".join(parts)
    assert spliced_writes(m) > 0
