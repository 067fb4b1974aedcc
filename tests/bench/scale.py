"""How far it goes: a huge disk, many images in one mount, snapshots of snapshots.

    .venv/bin/python -m tests.bench.scale [--rounds 1] [--only huge|images|deep] [--json FILE]

Needs qemu-img and qemu-storage-daemon (qemu-system-common).  Everything is local.  Each part tells
seconds, and MiB of the most memory that the process which serves the mount had (VmHWM):

huge     a qcow2 of --tib TiB that has --extents extents, half of them data: its map is printed, it
         is mounted and asked for st_blocks, and every extent is sought
images   a mount of a directory of --images images: `ls -l` of all that is in it, and then 4 KiB
         are read of each
deep     --deep snapshots, each of the one before and with 256 KiB of its own; the deepest is read
         whole, and at random; qemu's is a chain of as many qcow2 files

What is read is compared with what must be there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.read import wait_for
from tests.bench.report import MIB, Report, add_options, installed, peak, run_watched
from tests.big_qcow2 import CLUSTER, PER_TABLE, write_qcow2

IMGFS = [sys.executable, "-m", "imgfs.cli.main"]
QSD = "qemu-storage-daemon"
PIECE = 256 << 10


@dataclass(frozen=True)
class Mounted:
    point: Path
    pid: int
    seconds: float  #: that it took to mount

    def peak(self) -> float:
        return peak(self.pid)


@contextlib.contextmanager
def mounted(source: object, work: Path, *options: str) -> Iterator[Mounted]:
    point = work / "mount"
    point.mkdir(exist_ok=True)
    begun = time.perf_counter()
    subprocess.run([*IMGFS, str(source), point, *options], check=True, timeout=60)
    taken = time.perf_counter() - begun
    try:
        pid = json.loads((point / ".imgfs/status.json").read_text())["pid"]
        yield Mounted(point, pid, taken)
    finally:
        subprocess.run([*IMGFS, "umount", point], check=True, timeout=120)


def timed(command: list[object]) -> tuple[float, float]:
    """Seconds, and MiB of its most memory."""
    begun = time.perf_counter()
    memory = run_watched(command, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun, memory


def places(size: int, extents: int) -> dict[int, int]:
    """Every second cluster of tables that lie evenly over the disk; in the file each is where none
    of its neighbours on the disk is."""
    count = extents // 2
    tables = -(-count // (PER_TABLE // 2))
    step = size // CLUSTER // tables // PER_TABLE * PER_TABLE
    disk = (table * step + entry for table in range(tables) for entry in range(0, PER_TABLE, 2))
    stride = 7919 if count % 7919 else 7927
    return {cluster: index * stride % count for index, cluster in zip(range(count), disk)}  # noqa: B905


def seek(path: Path) -> tuple[float, int]:
    """Seconds of a walk, and how many data extents there are."""
    fd, at, found, begun = os.open(path, os.O_RDONLY), 0, 0, time.perf_counter()
    with contextlib.suppress(OSError):
        while True:
            at = os.lseek(fd, os.lseek(fd, at, os.SEEK_DATA), os.SEEK_HOLE)
            found += 1
    os.close(fd)
    return time.perf_counter() - begun, found


@contextlib.contextmanager
def exported(image: Path, work: Path, *more: str) -> Iterator[tuple[Path, int]]:
    """An image behind qemu-storage-daemon, and that one's pid."""
    path = work / "export"
    path.touch()
    block = f"driver=qcow2,node-name=n,read-only=on,file.driver=file,file.filename={image}"
    export = f"type=fuse,id=e,node-name=n,mountpoint={path}"
    process = subprocess.Popen([QSD, "--blockdev", block, "--export", export, *more])
    try:
        wait_for(path)
        yield path, process.pid
    finally:
        process.terminate()
        process.wait(60)
        subprocess.run(["fusermount3", "-uzq", path], check=False, capture_output=True)


def huge(work: Path, options: argparse.Namespace, report: Report) -> None:
    image = work / "huge.qcow2"
    clusters = places(options.tib << 40, options.extents)
    write_qcow2(image, options.tib << 40, clusters)
    what = f"{options.tib} TiB, {options.extents:,} extents"
    # The data is a hole in the file; with that known there would be none.
    plain = ["-o", "extents=off"]
    for _ in range(options.rounds):
        for name, command in {
            "imgfs": [*IMGFS, "map", "--json", *plain, image],
            "qemu-img": ["qemu-img", "map", "--output=json", "-f", "qcow2", image],
        }.items():
            seconds, memory = timed([*command])
            report.note(f"{what}: map as JSON, time", "s", name, seconds)
            report.note(f"{what}: map as JSON, peak memory", "MiB", name, memory)
        with mounted(image, work, *plain) as m:
            path = m.point / "huge.raw"
            begun = time.perf_counter()
            stored = path.stat().st_blocks * 512
            assert stored == len(clusters) * CLUSTER, stored
            taken = m.seconds + time.perf_counter() - begun
            report.note(f"{what}: mount and stat, time", "s", "imgfs", taken)
            report.note(f"{what}: mount and stat, peak memory", "MiB", "imgfs", m.peak())
            taken, found = seek(path)
            assert found == len(clusters), found
            report.note(f"{what}: every extent sought, time", "s", "imgfs", taken)
            report.note(f"{what}: every extent sought, peak memory", "MiB", "imgfs", m.peak())
        if QSD in installed({QSD: None}):
            with exported(image, work) as (path, pid):
                taken, _ = seek(path)
                report.note(f"{what}: every extent sought, time", "s", QSD, taken)
                memory = peak(pid)
                report.note(f"{what}: every extent sought, peak memory", "MiB", QSD, memory)
    image.unlink()


def images(work: Path, options: argparse.Namespace, report: Report) -> None:
    pool = work / "pool"
    pool.mkdir()
    for number in range(options.images):
        with (pool / f"disk{number}.raw").open("wb") as file:
            file.write(f"{number:8}".encode() * 512)
            file.truncate(MIB)
    what = f"{options.images:,} images"
    for _ in range(options.rounds):
        with mounted(f"{pool}/", work) as m:
            report.note(f"{what}: mount, time", "s", "imgfs", m.seconds)
            begun = time.perf_counter()
            subprocess.run(
                ["ls", "-lR", m.point], check=True, stdout=subprocess.DEVNULL, timeout=300
            )
            taken = time.perf_counter() - begun
            report.note(f"{what}: ls -lR, in all formats, time", "s", "imgfs", taken)
            begun = time.perf_counter()
            for number in range(options.images):
                with (m.point / f"disk{number}/disk{number}.raw").open("rb") as file:
                    assert file.read(4096) == f"{number:8}".encode() * 512
            taken = time.perf_counter() - begun
            report.note(f"{what}: 4 KiB of each, time", "s", "imgfs", taken)
            report.note(f"{what}: peak memory", "MiB", "imgfs", m.peak())


def at_random(path: Path, size: int, count: int) -> float:
    """Reads of 4 KiB a second, past the page cache."""
    rng, fd = random.Random(1), os.open(path, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, 4096) as buffer:
        begun = time.perf_counter()
        for _ in range(count):
            assert os.preadv(fd, [buffer], rng.randrange(size // 4096) * 4096) == 4096
        taken = time.perf_counter() - begun
    os.close(fd)
    return count / taken


def read_all(path: Path, wanted: bytes) -> float:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    begun = time.perf_counter()
    content = path.read_bytes()
    taken = time.perf_counter() - begun
    assert content == wanted
    return taken


def deep(work: Path, options: argparse.Namespace, report: Report) -> None:
    base, what = work / "base.raw", f"{options.deep} snapshots deep"
    rng = random.Random(2)
    size = max(64 * MIB, options.deep * PIECE)
    content = bytearray(rng.randbytes(size))
    base.write_bytes(content)
    changes = [(rng.randrange(size // PIECE) * PIECE, rng.randbytes(PIECE))
               for _ in range(options.deep)]  # fmt: skip
    for at, data in changes:
        content[at : at + PIECE] = data

    def note(name: str, path: Path) -> None:
        report.note(f"{what}: all read, time", "s", name, read_all(path, bytes(content)))
        report.note(f"{what}: 4 KiB random", "IOPS", name, at_random(path, size, 2000))

    for _ in range(options.rounds):
        with mounted(base, work) as m:
            begun, directory = time.perf_counter(), m.point
            for number, (at, data) in enumerate(changes):
                directory = directory / f"snapshots/s{number}"
                directory.mkdir()
                put(directory / f"s{number}.raw", at, data)
            taken = time.perf_counter() - begun
            report.note(f"{what}: taken and written, time", "s", "imgfs", taken)
        with mounted(base, work) as m:
            directory = m.point.joinpath(*(f"snapshots/s{n}" for n in range(options.deep)))
            begun = time.perf_counter()
            assert (directory / f"s{options.deep - 1}.raw").stat().st_size == size
            taken = m.seconds + time.perf_counter() - begun
            report.note(f"{what}: mount and stat, time", "s", "imgfs", taken)
            note("imgfs", directory / f"s{options.deep - 1}.raw")
            report.note(f"{what}: peak memory", "MiB", "imgfs", m.peak())
            begun = time.perf_counter()
            for _ in range(options.deep):
                directory.rmdir()
                directory = directory.parents[1]
            taken = time.perf_counter() - begun
            report.note(f"{what}: deleted, time", "s", "imgfs", taken)
        if QSD in installed({QSD: None}):
            by_qemu(work, base, changes, report, what, note)


def put(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), data, at) == len(data)
        os.fsync(file.fileno())


def by_qemu(
    work: Path,
    base: Path,
    changes: list[tuple[int, bytes]],
    report: Report,
    what: str,
    note: Callable[[str, Path], None],
) -> None:
    chain = work / "chain"
    chain.mkdir()
    begun, below, format_ = time.perf_counter(), base, "raw"
    for number, (at, data) in enumerate(changes):
        file, part = chain / f"{number}.qcow2", chain / "part"
        part.write_bytes(data)
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", format_, "-b", below, file]
        subprocess.run(create, check=True)
        write = f"write -q -s {part} {at} {len(data)}"
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", write, "-c", "flush", file], check=True)
        below, format_ = file, "qcow2"
    taken = time.perf_counter() - begun
    report.note(f"{what}: taken and written, time", "s", "qemu-img, qemu-io", taken)
    begun = time.perf_counter()
    with exported(below, work) as (path, pid):
        report.note(f"{what}: mount and stat, time", "s", QSD, time.perf_counter() - begun)
        note(QSD, path)
        report.note(f"{what}: peak memory", "MiB", QSD, peak(pid))
    for file in chain.iterdir():
        file.unlink()
    chain.rmdir()


PARTS = {"huge": huge, "images": images, "deep": deep}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, rounds=1)
    parser.add_argument("--tib", type=int, default=64)
    parser.add_argument("--extents", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--deep", type=int, default=100)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--work", default="/var/tmp")
    options = parser.parse_args()
    report = Report()
    for name, part in PARTS.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory(dir=options.work) as work:
                os.environ["XDG_STATE_HOME"] = f"{work}/state"
                part(Path(work), options, report)
    report.finish(options.json)


if __name__ == "__main__":
    main()
