"""One cached local file through imgfs and its peers, in turn, in one run.

    .venv/bin/python -m tests.bench.read [--rounds 5] [--seconds 2] [--json FILE]

Needs fio, and of the peers those that take part: qemu-storage-daemon (qemu-system-common), nbdfuse
(libnbd-bin) and nbdkit.  Prints medians and imgfs's ratio to each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.report import Report, installed, parser_of, run_bench

SIZE = 512 << 20
EXTENTS = 100_000
FIO = {
    "4 KiB random QD1": ["--rw=randread", "--bs=4k", "--ioengine=psync"],
    "4 KiB random QD16": ["--rw=randread", "--bs=4k", "--ioengine=libaio", "--iodepth=16"],
    "4 KiB random 8 threads": ["--rw=randread", "--bs=4k", "--ioengine=psync", "--numjobs=8"],
    "1 MiB sequential": ["--rw=read", "--bs=1m", "--ioengine=psync"],
}


@contextlib.contextmanager
def through_imgfs(source: Path, work: Path) -> Iterator[Path]:
    point = work / f"imgfs-{source.stem}"
    point.mkdir()
    command = [sys.executable, "-m", "imgfs.cli.main"]
    subprocess.run([*command, source, point], check=True, timeout=30)
    try:
        yield point / f"{source.stem}.raw"
    finally:
        subprocess.run([*command, "umount", point], check=True, timeout=60)


def wait_for(path: Path) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError):
            if path.stat().st_size:
                return
        time.sleep(0.1)
    raise TimeoutError(path)


@contextlib.contextmanager
def served(path: Path, command: list[object]) -> Iterator[Path]:
    """A peer that mounts one file over an existing empty one."""
    path.touch()
    process = subprocess.Popen([str(word) for word in command])
    try:
        wait_for(path)
        yield path
    finally:
        process.terminate()
        process.wait(20)
        subprocess.run(["fusermount3", "-uzq", path], check=False, capture_output=True)


def through_qemu(source: Path, work: Path) -> contextlib.AbstractContextManager[Path]:
    path = work / f"qsd-{source.stem}"
    export = f"type=fuse,id=e,node-name=n,mountpoint={path}"
    block = f"driver=file,filename={source},node-name=n,read-only=on"
    return served(path, ["qemu-storage-daemon", "--blockdev", block, "--export", export])


def through_nbdfuse(source: Path, work: Path) -> contextlib.AbstractContextManager[Path]:
    path = work / f"nbdfuse-{source.stem}"
    return served(path, ["nbdfuse", "-r", path, "--command", "nbdkit", "-s", "file", source])


@contextlib.contextmanager
def itself(source: Path, work: Path) -> Iterator[Path]:
    yield source


PEERS = {
    "imgfs": through_imgfs,
    "qemu-storage-daemon": through_qemu,
    "nbdfuse": through_nbdfuse,
    "the file": itself,
}


def fio(path: Path, words: list[str], seconds: float) -> float:
    """IOPS, or MB/s for sequential reads."""
    command = ["fio", "--name=x", f"--filename={path}", "--readonly", "--invalidate=0"]
    command += ["--time_based", f"--runtime={seconds}", "--group_reporting", f"--size={SIZE}"]
    # tmpfs and some file systems refuse O_DIRECT; all of ours are on a disk.
    command += ["--direct=1", "--thread", "--output-format=json", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    read = json.loads(done.stdout)["jobs"][0]["read"]
    return float(read["bw_bytes"] / 1e6 if "--bs=1m" in words else read["iops"])


def cold(path: Path) -> float:
    """MB/s of a buffered read, its own page cache dropped before (a source below stays cached)."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    buffer, begun = bytearray(1 << 20), time.perf_counter()
    while os.readv(fd, [buffer]):
        pass
    os.close(fd)
    return SIZE / (time.perf_counter() - begun) / 1e6


def walk(path: Path) -> float:
    """Extents a second of a whole SEEK_DATA/SEEK_HOLE walk."""
    fd, at, found = os.open(path, os.O_RDONLY), 0, 0
    begun = time.perf_counter()
    with contextlib.suppress(OSError):
        while True:
            at = os.lseek(fd, os.lseek(fd, at, os.SEEK_DATA), os.SEEK_HOLE)
            found += 1
    os.close(fd)
    assert found >= EXTENTS
    return found / (time.perf_counter() - begun)


def make_sources(work: Path) -> tuple[Path, Path]:
    dense, holed = work / "dense.img", work / "holed.img"
    with dense.open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(1 << 20))
    with holed.open("wb") as file:
        for i in range(EXTENTS):
            os.pwrite(file.fileno(), b"x" * 4096, i * 8192)
        file.truncate(EXTENTS * 8192 + 4096)
        os.fsync(file.fileno())
    dense.read_bytes()
    return dense, holed


def measure(work: Path, options: argparse.Namespace, report: Report) -> None:
    """All are mounted all the time, and take turns at every figure: what else goes on on the
    machine then meets all of them alike."""
    dense, holed = make_sources(work)
    peers = installed(PEERS)
    with contextlib.ExitStack() as stack:
        of_dense = {n: stack.enter_context(peer(dense, work)) for n, peer in peers.items()}
        of_holed = {
            n: stack.enter_context(peer(holed, work))
            for n, peer in peers.items()
            if n != "nbdfuse"  # it reports no holes
        }
        for _ in range(options.rounds):
            for what, words in FIO.items():
                unit = "MB/s" if "--bs=1m" in words else "IOPS"
                for name, path in of_dense.items():
                    report.note(what, unit, name, fio(path, words, options.seconds))
            for name, path in of_dense.items():
                if name != "the file":  # dropping the source's own cache would measure the disk
                    report.note("buffered, cold", "MB/s", name, cold(path))
            for name, path in of_holed.items():
                report.note("SEEK_DATA, SEEK_HOLE walk", "extents/s", name, walk(path))


def main() -> None:
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--seconds", type=float, default=2)
    run_bench(parser, measure)


if __name__ == "__main__":
    main()
