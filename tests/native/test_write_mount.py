"""Writes through the kernel: a mount of its own (write_mount.py) and a plain file do the same."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SIZE = (16 << 20) + 1000
LONG = bool(os.environ.get("IMGFS_TEST_LONG"))


class Mount:
    def __init__(self, work: Path, threads: int) -> None:
        self.point, self.directory, self.model = work / "mnt", work / "disk", work / "model"
        self.point.mkdir()
        self.directory.mkdir()
        content = os.urandom(SIZE)
        (self.directory / "base").write_bytes(content)
        self.model.write_bytes(content)
        command = [sys.executable, "-m", "tests.native.write_mount", self.point, self.directory]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen([*map(str, command), str(threads)], cwd=root)
        self.disk = self.point / "disk"
        for _ in range(200):
            if self.point.is_mount():
                break
            time.sleep(0.05)
        assert self.disk.stat().st_size == SIZE

    def status(self) -> dict[str, Any]:
        found = json.loads((self.point / "status").read_text())
        assert isinstance(found, dict)
        return found

    def both(self, *words: object) -> None:
        for path in (self.disk, self.model):
            command = [str(word).replace("FILE", str(path)) for word in words]
            subprocess.run(command, check=True, timeout=60, capture_output=True)

    def same(self) -> bool:
        """By a new look at it: neither the kernel's nor Python's copy."""
        for path in (self.disk, self.model):
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        return self.disk.read_bytes() == self.model.read_bytes()

    def close(self) -> None:
        subprocess.run(["fusermount3", "-uz", self.point], check=True, timeout=20)
        assert self.process.wait(20) == 0


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    mount = Mount(tmp_path, 3)
    yield mount
    mount.close()


def test_writes_of_all_sorts(mount: Mount) -> None:
    data = mount.model.with_name("random")
    data.write_bytes(os.urandom(3 << 20))
    dd = ["dd", f"if={data}", "of=FILE", "conv=notrunc", "status=none"]
    mount.both(*dd, "bs=64K", "seek=10")
    before = mount.status()
    assert before["python"] == 0 and before["bytes_written"] == 3 << 20
    mount.both(*dd, "bs=1000", "seek=7777", "count=50")
    mount.both(*dd, "bs=1M", "seek=8", "oflag=direct")
    mount.both(*dd, "bs=4K", "seek=100", "count=20", "oflag=dsync")
    mount.both(*dd, "bs=512", "seek=99", "count=20", "oflag=direct")
    assert mount.same()
    for mode in ("-p", "-z"):
        mount.both("fallocate", mode, "-o", 1 << 20, "-l", 1 << 19, "FILE")
        mount.both("fallocate", mode, "-o", 12345, "-l", 98765, "FILE")
        assert mount.same()
    status = mount.status()
    assert status["zeroes"] == 2 and status["python"] > 0
    mount.both("truncate", "-s", 9_000_000, "FILE")
    mount.both("truncate", "-s", SIZE, "FILE")
    mount.both("sh", "-c", "echo appended >> FILE")
    assert mount.disk.stat().st_size == SIZE + 9 and mount.same()


def test_fsync_onto_known_blocks_is_native(mount: Mount) -> None:
    fd = os.open(mount.disk, os.O_RDWR)
    for count in (0, 5):
        for i in range(5):
            os.pwrite(fd, bytes([count + i]) * 4096, i * 4096)
            os.fsync(fd)
        assert mount.status()["syncs"] == count
    os.close(fd)


def test_tail_is_written_natively(mount: Mount) -> None:
    tail = b"t" * (4096 + SIZE % 4096)
    for path in (mount.disk, mount.model):
        with path.open("r+b") as file:
            file.seek(SIZE - len(tail))
            file.write(tail)
    assert mount.status()["python"] == 0 and mount.same()


def test_mapped_pages_come_by_write_back(mount: Mount) -> None:
    for path in (mount.disk, mount.model):
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
            for at in range(5000, SIZE, 100_000):
                pages[at : at + 7] = b"changed"
            pages[SIZE - 3 :] = b"end"
            pages.flush()
    assert mount.status()["python"] == 0 and mount.same()


def test_direct_writes_reach_who_reads_cached(mount: Mount) -> None:
    (mount.directory / "direct").touch()
    block = mmap.mmap(-1, 4096)  # aligned
    reader = mount.disk.open("rb")
    writer = os.open(mount.disk, os.O_RDWR | os.O_DIRECT)
    for i in range(100):
        reader.seek(i * 4096)
        reader.read(4096)
        block[:] = bytes([i]) * 4096
        assert os.pwrite(writer, block, i * 4096) == 4096
        assert os.pread(reader.fileno(), 4096, i * 4096) == bytes([i]) * 4096
    os.close(writer)
    reader.close()
    block.close()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("direct", [False, True])
def test_fio_verifies(tmp_path: Path, threads: int, direct: bool) -> None:
    mount = Mount(tmp_path, threads)
    if direct:
        (mount.directory / "direct").touch()
    words = ["--name=x", f"--filename={mount.disk}", "--verify=crc32c", "--verify_fatal=1"]
    words += ["--verify_state_save=0"]  # it would go to the working directory
    words += ["--bsrange=512-128k", "--blockalign=512", "--rw=randwrite", "--fsync=20"]
    words += [f"--size={16 << 20}", f"--loops={10 if LONG else 1}", "--direct=1"]
    words += ["--ioengine=libaio", "--iodepth=16", "--thread", "--output-format=json"]
    done = subprocess.run(["fio", *words], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    status = mount.status()
    assert status["writes"] > 0
    # With one thread nobody is to spare.
    assert threads > 1 or status["handed_over"] >= status["writes"]
    mount.close()


def test_reads_go_on_while_python_is_stuck(mount: Mount) -> None:
    """More than the queue takes waits for Python, and reads are answered all the while."""
    direct = os.open(mount.point / "twin", os.O_RDONLY | os.O_DIRECT)
    block = mmap.mmap(-1, 4096)
    os.preadv(direct, [block], 15 << 20)
    (mount.directory / "stuck").touch()
    words = ["--name=x", f"--filename={mount.disk}", "--bs=512k", "--direct=1"]
    words += ["--ioengine=libaio", "--iodepth=200", f"--size={15 << 20}", "--thread"]
    words += [f"--io_size={120 << 20}", "--rw=randwrite", "--norandommap", "--output-format=json"]
    flood = subprocess.Popen(["fio", *words], stdout=subprocess.DEVNULL)
    slowest, reads = 0.0, 0
    while flood.poll() is None:
        begun = time.perf_counter()
        os.preadv(direct, [block], 15 << 20)
        slowest, reads = max(slowest, time.perf_counter() - begun), reads + 1
    os.close(direct)
    block.close()
    assert flood.returncode == 0 and mount.status()["python"] == 240
    assert slowest < 1, f"of {reads} reads"


def test_writers_of_one_block(mount: Mount) -> None:
    """Many write 512 bytes each into the same blocks at once, half of them through Python."""
    fd = os.open(mount.disk, os.O_RDWR | os.O_DIRECT)

    def write(number: int) -> None:
        sector = mmap.mmap(-1, 4096)
        sector[:512] = bytes([number]) * 512
        for block in range(200):
            os.pwritev(fd, [memoryview(sector)[:512]], block * 4096 + number * 512)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    wanted = b"".join(bytes([number]) * 512 for number in range(8)) * 200
    assert mount.disk.read_bytes()[: len(wanted)] == wanted
