"""One image copied out of a local nbdkit by imgfs, nbdfuse and nbdcopy, in turn, in one run.

    .venv/bin/python -m tests.bench.nbd [--rounds 5] [--data 512] [--sparse 4096] [--tcp]

Needs nbdkit, nbdfuse and nbdcopy (libnbd-bin).  Every copy starts cold: a new connection, a new
mount with an empty cache, no target; only the source is in the server's page cache.  The mounts
are copied by `cp`, and read by `dd` into /dev/null; nbdcopy copies to a file and to null:.
Measured are seconds of the copy, seconds with the mount, and allocated MiB of the copy.  Copies
are compared with their source in the first round; nothing else is asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.report import MIB, Report, in_turn, installed, parser_of, run_bench
from tests.images import fill, scatter
from tests.servers.nbd import Nbdkit


@dataclass(frozen=True)
class Job:
    url: str
    target: Path | None  #: None: read it, and keep nothing
    work: Path


Peer = Callable[[Job], contextlib.AbstractContextManager[list[object]]]


def copy(job: Job, source: Path) -> list[object]:
    if job.target is None:
        return ["dd", f"if={source}", "of=/dev/null", "bs=1M", "status=none"]
    return ["cp", source, job.target]


@contextlib.contextmanager
def imgfs(job: Job) -> Iterator[list[object]]:
    point = job.work / "imgfs"
    point.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "imgfs.cli.main"]
    subprocess.run([*command, job.url, point], check=True, timeout=30)
    try:
        yield copy(job, point / "disk.raw")
    finally:
        subprocess.run([*command, "umount", point], check=True, timeout=60)


@contextlib.contextmanager
def nbdfuse(job: Job) -> Iterator[list[object]]:
    path = job.work / "nbdfuse"
    path.touch()
    process = subprocess.Popen(["nbdfuse", "-r", path, job.url])
    try:
        deadline = time.monotonic() + 20
        while not path.stat().st_size:
            if time.monotonic() > deadline:
                raise TimeoutError("nbdfuse")
            time.sleep(0.002)
        yield copy(job, path)
    finally:
        subprocess.run(["fusermount3", "-u", path], check=False)
        process.wait(20)


@contextlib.contextmanager
def nbdcopy(job: Job) -> Iterator[list[object]]:
    yield ["nbdcopy", job.url, job.target or "null:"]


PEERS: dict[str, Peer] = {"imgfs": imgfs, "nbdfuse": nbdfuse, "nbdcopy": nbdcopy}


@dataclass(frozen=True)
class Sample:
    copy_s: float
    whole_s: float
    allocated: int


def run_one(peer: Peer, job: Job) -> Sample:
    begun = time.perf_counter()
    with peer(job) as command:
        ready = time.perf_counter()
        # Without a timeout: with one, subprocess looks every 50 ms only.
        subprocess.run([str(word) for word in command], check=True)
        end = time.perf_counter()
    allocated = job.target.stat().st_blocks * 512 if job.target else 0
    return Sample(end - ready, end - begun, allocated)


def warm(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass


def measure(work: Path, options: argparse.Namespace, report: Report) -> None:
    dense, sparse = work / "dense.img", work / "sparse.img"
    fill(dense, options.data * MIB)
    scatter(sparse, options.sparse * MIB, options.data * MIB)
    target = work / "copy"
    for source in (dense, sparse):
        server = Nbdkit(work / f"server-{source.stem}", "file", source, tcp=options.tcp)
        try:
            for number in range(options.rounds):
                for name, peer in in_turn(installed(PEERS), number):
                    for what, to in (("read", None), ("copy", target)):
                        if to is None and source is sparse:
                            continue
                        warm(source)
                        sample = run_one(peer, Job(server.url(), to, work))
                        figure = f"{source.stem}: {what}"
                        report.note(figure, "s", name, sample.copy_s)
                        if to is not None:
                            report.note(f"{figure}, with the mount", "s", name, sample.whole_s)
                            allocated = sample.allocated / MIB
                            report.note(f"{source.stem}: allocated", "MiB", name, allocated)
                    if number == 0:
                        subprocess.run(["cmp", source, target], check=True)
                    target.unlink()
        finally:
            server.stop()


def main() -> None:
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--data", type=int, default=512, help="MiB of data in either image")
    parser.add_argument("--sparse", type=int, default=4096, help="MiB that the sparse one spans")
    parser.add_argument("--tcp", action="store_true", help="over loopback, not a unix socket")
    run_bench(parser, measure)


if __name__ == "__main__":
    main()
