"""Writes onto a snapshot by imgfs, and onto a qcow2 overlay by qemu-storage-daemon, in one run.

    .venv/bin/python -m tests.bench.write [--rounds 5] [--size 512] [--only WORD] [--json FILE]

Needs fio, qemu-img (qemu-utils) and qemu-storage-daemon (qemu-system-common).  Both are over one
local raw base on one disk, and shown by FUSE; "the file" is a plain sparse one beside them.  Each
figure is of a fresh overlay, made for it, or of one in which every block has been written before.
All are mounted all the time and take turns at every figure, each round in another order: who comes
first may get memory that the machine must fetch from its host.  Each writes as many bytes, and what
was written before is on the disk when it begins.  fio opens for reading and writing, as qemu does,
and dd for writing only, as cp does.
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
from dataclasses import dataclass
from pathlib import Path

from tests.bench.report import MIB, Report, installed, parser_of, run_bench


@dataclass(frozen=True)
class Figure:
    name: str
    is_fresh: bool
    words: tuple[str, ...]
    part: float = 1  #: of the disk, that is written

    @property
    def is_sequential(self) -> bool:
        return not self.words or "--rw=write" in self.words


SEQUENTIAL = ("--rw=write", "--bs=1m", "--ioengine=psync")
RANDOM = ("--rw=randwrite", "--bs=4k", "--direct=1")
QD16 = (*RANDOM, "--ioengine=libaio", "--iodepth=16")
QD1 = (*RANDOM, "--ioengine=psync")
FSYNC = ("--rw=randwrite", "--bs=4k", "--ioengine=psync", "--fsync=1")
DD: tuple[str, ...] = ()
FIGURES = [
    Figure("1 MiB sequential, dd, fresh", True, DD),
    Figure("1 MiB sequential, dd, again", False, DD),
    Figure("1 MiB sequential, direct, fresh", True, (*SEQUENTIAL, "--direct=1")),
    Figure("1 MiB sequential, direct, again", False, (*SEQUENTIAL, "--direct=1")),
    Figure("1 MiB sequential, buffered, fresh", True, SEQUENTIAL),
    Figure("1 MiB sequential, buffered, again", False, SEQUENTIAL),
    Figure("4 KiB random QD16, fresh", True, QD16, 1 / 8),
    Figure("4 KiB random QD16, again", False, QD16, 1 / 4),
    Figure("4 KiB random QD1, fresh", True, QD1, 1 / 16),
    Figure("4 KiB random QD1, again", False, QD1, 1 / 8),
    Figure("4 KiB write + fsync, fresh", True, FSYNC, 1 / 256),
    Figure("4 KiB write + fsync, again", False, FSYNC, 1 / 256),
]


@dataclass(frozen=True)
class Place:
    base: Path
    work: Path

    @property
    def size(self) -> int:
        return self.base.stat().st_size


class Imgfs:
    name = "imgfs"

    def __init__(self, place: Place) -> None:
        self.place, self.point = place, place.work / "imgfs"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.point.mkdir()
        command = [sys.executable, "-m", "imgfs.cli.main"]
        state = {**os.environ, "XDG_STATE_HOME": str(self.place.work / "state")}
        state.pop("STATE_DIRECTORY", None)
        mount = [*command, self.place.base, self.point]
        subprocess.run(mount, check=True, timeout=30, env=state)
        try:
            yield
        finally:
            subprocess.run([*command, "umount", self.point], check=True, timeout=60)

    @contextlib.contextmanager
    def overlay(self, name: str) -> Iterator[Path]:
        snapshot = self.point / "snapshots" / name
        snapshot.mkdir()
        try:
            yield snapshot / f"{name}.raw"
        finally:
            snapshot.rmdir()


class Qemu:
    name = "qemu-storage-daemon"

    def __init__(self, place: Place) -> None:
        self.place = place

    def running(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def overlay(self, name: str) -> Iterator[Path]:
        file, shown = self.place.work / f"{name}.qcow2", self.place.work / f"qsd-{name}"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.place.base]
        subprocess.run([*create, file], check=True, timeout=30)
        shown.touch()
        block = f"driver=qcow2,node-name=n,discard=unmap,file.driver=file,file.filename={file}"
        export = f"type=fuse,id=e,node-name=n,mountpoint={shown},writable=on,growable=off"
        command = ["qemu-storage-daemon", "--blockdev", block, "--export", export]
        # In a session of its own, as any daemon, and as imgfs is: on a busy machine the kernel
        # shares the processors among sessions, and wakes who is in fio's own one sooner.
        process = subprocess.Popen(command, start_new_session=True)
        try:
            wait_for(shown, self.place.size)
            yield shown
        finally:
            process.terminate()
            process.wait(60)
            subprocess.run(["fusermount3", "-uzq", shown], check=False, capture_output=True)
            file.unlink()


class PlainFile:
    name = "the file"

    def __init__(self, place: Place) -> None:
        self.place = place

    def running(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def overlay(self, name: str) -> Iterator[Path]:
        file = self.place.work / f"{name}.plain"
        file.touch()
        os.truncate(file, self.place.size)
        try:
            yield file
        finally:
            file.unlink()


Peer = Imgfs | Qemu | PlainFile


def wait_for(path: Path, size: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError):
            if path.stat().st_size == size:
                return
        time.sleep(0.05)
    raise TimeoutError(path)


def dd(path: Path, source: Path, size: int) -> float:
    """MB/s."""
    command = ["dd", f"if={source}", f"of={path}", "bs=1M", "conv=notrunc,nocreat"]
    command += [f"count={size // MIB}", "status=none"]
    begun = time.perf_counter()
    subprocess.run(command, check=True, timeout=300)
    return size / 1e6 / (time.perf_counter() - begun)


def fio(path: Path, figure: Figure, size: int, seed: int) -> float:
    """Writes a second, or MB/s for sequential ones."""
    command = ["fio", "--name=x", f"--filename={path}", f"--size={size}", f"--randseed={seed}"]
    command += [f"--io_size={int(size * figure.part)}", "--fallocate=none", "--invalidate=0"]
    command += ["--allow_file_create=0", "--thread", "--output-format=json", *figure.words]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    written = json.loads(done.stdout)["jobs"][0]["write"]
    return float(written["bw_bytes"] / 1e6 if figure.is_sequential else written["iops"])


def make_base(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())
    path.read_bytes()


def measure(work: Path, options: argparse.Namespace, report: Report) -> None:
    size = options.size * MIB
    place = Place(work / "base.img", work)
    make_base(place.base, size)
    every: list[Peer] = [Imgfs(place), Qemu(place), PlainFile(place)]
    peers = installed({peer.name: peer for peer in every})
    figures = [figure for figure in FIGURES if options.only in figure.name]
    with contextlib.ExitStack() as stack:
        written: dict[str, Path] = {}
        for name, peer in peers.items():
            stack.enter_context(peer.running())
            written[name] = stack.enter_context(peer.overlay("written"))
            dd(written[name], place.base, size)
        order = list(peers)
        for number in range(options.rounds):
            for figure in figures:
                unit = "MB/s" if figure.is_sequential else "IOPS"
                for name in order[number % len(order) :] + order[: number % len(order)]:
                    peer = peers[name]
                    with contextlib.ExitStack() as one:
                        path = written[name]
                        if figure.is_fresh:
                            path = one.enter_context(peer.overlay("fresh"))
                        os.sync()
                        if figure.words == DD:
                            speed = dd(path, Path("/dev/zero"), size)
                        else:
                            speed = fio(path, figure, size, number)
                        report.note(figure.name, unit, name, speed)


def main() -> None:
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--size", type=int, default=512, help="of the disk, MiB")
    parser.add_argument("--only", default="", help="figures with this in their names")
    run_bench(parser, measure)


if __name__ == "__main__":
    main()
