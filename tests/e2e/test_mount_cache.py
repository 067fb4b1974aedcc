"""The cache of a mount: its limit on disk, the process's memory, and what is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.images import fill
from tests.servers import Sshd

from .conftest import MIB, Mount, imgfs

Mounter = Callable[..., Mount]
LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
SIZE, LIMIT = (4096 * MIB, 256 * MIB) if LONG else (160 * MIB, 16 * MIB)
MOST_MEMORY = 150 * MIB


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "sshd"
    directory.mkdir()
    server = Sshd(directory)
    yield server
    server.stop()


def allocated(directory: Path) -> int:
    """Bytes on disk of everything below it."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue
    return total


def resident(pid: int, what: str) -> int:
    """VmRSS or VmHWM of a process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(what)


@pytest.mark.timeout(900)
def test_limit_and_memory_while_reading(mount: Mounter, sshd: Sshd, tmp_path: Path) -> None:
    """Many times the limit, in order through the page cache and then at random past it."""
    source = tmp_path / "big.img"
    fill(source, SIZE)
    m = mount(sshd.url(source), "-o", f"{sshd.options},cache_size={LIMIT}")
    raw = m.point / "big.raw"
    used: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            used.append(allocated(tmp_path / "cache"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        subprocess.run(["cmp", source, raw], check=True, timeout=600)
        theirs, ours = os.open(source, os.O_RDONLY), os.open(raw, os.O_RDONLY | os.O_DIRECT)
        for i in range(2000 if LONG else 200):
            offset = (i * 7919 * 4096) % (SIZE - 4096)
            assert os.pread(ours, 4096, offset) == os.pread(theirs, 4096, offset)
        os.close(ours)
        os.close(theirs)
    finally:
        stop.set()
        watcher.join()
    # The small files beside the store are a block each.
    assert LIMIT // 2 < max(used) <= LIMIT + 64 * 1024
    assert resident(m.pid, "VmHWM") < MOST_MEMORY
    cache = m.status()["cache"]
    assert cache["limit"] == LIMIT and cache["used"] <= LIMIT  # type: ignore[index]


def test_nothing_is_left_after_the_end_or_a_crash(
    mount: Mounter, sshd: Sshd, sparse: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache" / "imgfs"
    directories = lambda: [path for path in cache.iterdir() if path.is_dir()]  # noqa: E731
    first = mount(sshd.url(sparse), "-o", sshd.options)
    second = mount(sshd.url(sparse), "-o", sshd.options)
    for m in (first, second):
        assert (m.point / "disk.raw").read_bytes() == sparse.read_bytes()
    assert len(directories()) == 2  # never shared
    os.kill(second.pid, signal.SIGKILL)
    subprocess.run(["fusermount3", "-u", str(first.point)], check=True, timeout=20)
    for _ in range(200):
        if len(directories()) == 1:
            break
        time.sleep(0.05)
    assert len(directories()) == 1  # what the killed one left
    third = mount(sshd.url(sparse), "-o", sshd.options)
    assert (third.point / "disk.raw").read_bytes() == sparse.read_bytes()
    assert len(directories()) == 1


def test_cache_directory_that_cannot_be_written(sshd: Sshd, sparse: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    point = tmp_path / "point"
    point.mkdir()
    done = imgfs(sshd.url(sparse), point, "-o", sshd.options)
    try:
        assert done.returncode == 0
        assert "the cache cannot be kept there" in done.stderr
        assert done.stderr.count("\n") == 1
        assert (point / "disk.raw").read_bytes() == sparse.read_bytes()
    finally:
        assert imgfs("umount", point).returncode == 0
