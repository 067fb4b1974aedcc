"""The cache of a mount: its limit on disk, the process's memory, and what is left of it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images import fill
from tests.mounts import MIB, Mount, imgfs
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]
LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
SIZE, LIMIT = (4096 * MIB, 256 * MIB) if LONG else (160 * MIB, 16 * MIB)
MOST_MEMORY = 150 * MIB


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
    # What is known of the blocks is eight bytes for each of 64 KiB, and not counted.
    assert LIMIT // 2 < max(used) <= LIMIT + 64 * 1024 + SIZE // 65536 * 8
    assert resident(m.pid, "VmHWM") < MOST_MEMORY
    cache = m.status()["cache"]
    assert cache["limit"] == LIMIT and cache["used"] <= LIMIT  # type: ignore[index]


def unmounted(m: Mount) -> None:
    assert imgfs("umount", m.point).returncode == 0


def fetched(m: Mount) -> int:
    (image,) = m.status()["images"].values()  # type: ignore[attr-defined]
    return int(image["bytes_fetched"])


def test_kept_from_mount_to_mount(mount: Mounter, sshd: Sshd, sparse: Path, tmp_path: Path) -> None:
    wanted = sparse.read_bytes()
    first = mount(sshd.url(sparse), "-o", sshd.options)
    assert (first.point / "disk.raw").read_bytes() == wanted
    assert fetched(first) > 0
    unmounted(first)
    again = mount(sshd.url(sparse), "-o", sshd.options)
    assert (again.point / "disk.raw").read_bytes() == wanted
    assert fetched(again) == 0
    unmounted(again)
    with sparse.open("r+b") as file:
        file.write(b"changed")
    changed = mount(sshd.url(sparse), "-o", sshd.options)
    assert (changed.point / "disk.raw").read_bytes() == b"changed" + wanted[7:]
    assert fetched(changed) > 0


def test_changed_while_mounted(mount: Mounter, sshd: Sshd, sparse: Path, tmp_path: Path) -> None:
    """The new state takes the directory over: it is kept, the old one's bytes are not."""
    m = mount(sshd.url(sparse), "-o", sshd.options)
    raw = m.point / "disk.raw"
    raw.read_bytes()
    with sparse.open("r+b") as file:
        file.write(b"changed")
    wanted = sparse.read_bytes()
    assert raw.read_bytes() == wanted
    unmounted(m)
    again = mount(sshd.url(sparse), "-o", sshd.options)
    assert (again.point / "disk.raw").read_bytes() == wanted
    assert fetched(again) == 0


def test_two_processes_never_share(
    mount: Mounter, sshd: Sshd, sparse: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache" / "imgfs"

    def directories() -> int:
        return sum(path.is_dir() for path in cache.iterdir())

    first = mount(sshd.url(sparse), "-o", sshd.options)
    second = mount(sshd.url(sparse), "-o", sshd.options, says="another process has its cache")
    for m in (first, second):
        assert (m.point / "disk.raw").read_bytes() == sparse.read_bytes()
    assert directories() == 2
    os.kill(second.pid, signal.SIGKILL)
    unmounted(first)
    assert directories() == 2  # what the killed one left
    third = mount(sshd.url(sparse), "-o", sshd.options)
    assert (third.point / "disk.raw").read_bytes() == sparse.read_bytes()
    assert directories() == 1
    assert fetched(third) == 0


@pytest.mark.timeout(600)
def test_kill_at_random_moments(mount: Mounter, sshd: Sshd, tmp_path: Path) -> None:
    """Every byte is right afterwards, and the limit holds, however often it happens."""
    source = tmp_path / "big.img"
    fill(source, 48 * MIB)
    limit = 24 * MIB
    rng = random.Random(11)
    for round_ in range(20 if LONG else 3):
        m = mount(sshd.url(source), "-o", f"{sshd.options},cache_size={limit}")
        reader = subprocess.Popen(["cmp", source, m.point / "big.raw"], stderr=subprocess.DEVNULL)
        # In the middle of reading; now and then so late that it was being recorded.
        time.sleep(rng.random() * 0.5 + (5 if round_ % 4 == 3 else 0))
        os.kill(m.pid, signal.SIGKILL)
        reader.wait(20)
        subprocess.run(["fusermount3", "-uz", m.point], check=True, timeout=20)
        assert allocated(tmp_path / "cache") <= limit + 64 * 1024
    m = mount(sshd.url(source), "-o", f"{sshd.options},cache_size={limit}")
    subprocess.run(["cmp", source, m.point / "big.raw"], check=True, timeout=60)
    assert allocated(tmp_path / "cache") <= limit + 64 * 1024


def test_what_was_recorded_before_a_kill_is_not_fetched_again(
    mount: Mounter, sshd: Sshd, sparse: Path, tmp_path: Path
) -> None:
    m = mount(sshd.url(sparse), "-o", sshd.options)
    assert (m.point / "disk.raw").read_bytes() == sparse.read_bytes()
    (checks,) = (tmp_path / "cache").glob("imgfs/*/checks")
    deadline = time.monotonic() + 15
    while checks.read_bytes().count(b"\0" * 4) == len(checks.read_bytes()) // 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # all of them are written at once
    os.kill(m.pid, signal.SIGKILL)
    subprocess.run(["fusermount3", "-uz", m.point], check=True, timeout=20)
    again = mount(sshd.url(sparse), "-o", sshd.options)
    assert (again.point / "disk.raw").read_bytes() == sparse.read_bytes()
    assert fetched(again) == 0


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
