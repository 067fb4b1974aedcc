"""One image copied out of an nginx on loopback by imgfs and its peers, in turn, in one run.

    .venv/bin/python -m tests.bench.http [--rounds 5] [--data 1024] [--json FILE]

Needs curl; nbdkit, nbdcopy (libnbd-bin) and rclone take part where they are installed.  Every copy
starts cold: new connections, a new mount with an empty cache, no target; only the source is in the
server's page cache.  Measured are: seconds of the copy; seconds with what must be set up before
(mount); and seconds of CPU of all that is not the server, over the whole.  `imgfs read` is reading
without keeping a copy, `imgfs library` the source without mount and cache.  Copies are compared
with their source in the first round.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.report import MIB, Report, adopt_daemons, in_turn, installed, parser_of, run_bench
from tests.images import fill
from tests.servers.web import Nginx

LIBRARY = """
import sys, trio
import imgfs
async def main():
    async with imgfs.open_image(sys.argv[1]) as source:
        step = 2 << 20
        offsets = iter(range(0, source.size, step))
        async def work():
            for at in offsets:
                await source.read(at, min(step, source.size - at))
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(work)
trio.run(main)
"""


@dataclass(frozen=True)
class Job:
    url: str
    target: Path
    work: Path


Peer = Callable[[Job], contextlib.AbstractContextManager[list[object]]]


@contextlib.contextmanager
def mounted(job: Job) -> Iterator[Path]:
    point = job.work / "imgfs"
    point.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "imgfs.cli.main"]
    subprocess.run([*command, job.url, point], check=True, timeout=30)
    try:
        yield point / "disk.raw"
    finally:
        subprocess.run([*command, "umount", point], check=True, timeout=60)


@contextlib.contextmanager
def imgfs(job: Job) -> Iterator[list[object]]:
    with mounted(job) as raw:
        yield ["cp", raw, job.target]


@contextlib.contextmanager
def imgfs_read(job: Job) -> Iterator[list[object]]:
    with mounted(job) as raw:
        yield ["dd", f"if={raw}", "of=/dev/null", "bs=1M", "status=none"]


@contextlib.contextmanager
def imgfs_library(job: Job) -> Iterator[list[object]]:
    yield [sys.executable, "-c", LIBRARY, job.url]


@contextlib.contextmanager
def curl(job: Job) -> Iterator[list[object]]:
    yield ["curl", "-sS", "-o", job.target, job.url]


@contextlib.contextmanager
def nbdkit(job: Job) -> Iterator[list[object]]:
    copy = ["--run", f"nbdcopy $uri {job.target}"]
    yield ["nbdkit", "-r", "-U", "-", "curl", f"url={job.url}", *copy]


@contextlib.contextmanager
def rclone(job: Job) -> Iterator[list[object]]:
    point = job.work / "rclone"
    point.mkdir(exist_ok=True)
    server, _, name = job.url.rpartition("/")
    words = ["--config", "/dev/null", "--http-url", server, ":http:", point]
    process = subprocess.Popen(["rclone", "mount", "--read-only", *map(str, words)])
    try:
        while not point.is_mount():
            if process.poll() is not None:
                raise RuntimeError("rclone mount ended")
            time.sleep(0.01)
        yield ["cp", point / name, job.target]
    finally:
        subprocess.run(["fusermount3", "-uq", point], check=False, timeout=20)
        process.wait(20)


PEERS: dict[str, Peer] = {
    "imgfs": imgfs,
    "curl": curl,
    "nbdkit curl, nbdcopy": nbdkit,
    "rclone mount": rclone,
    "imgfs read": imgfs_read,
    "imgfs library": imgfs_library,
}


@dataclass(frozen=True)
class Sample:
    copy_s: float
    whole_s: float
    cpu_s: float


def children() -> float:
    """Seconds of CPU of those that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def reap() -> None:
    """Count what daemons used that came to us when their parents ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def run_one(peer: Peer, job: Job) -> Sample:
    before, begun = children(), time.perf_counter()
    with peer(job) as command:
        ready = time.perf_counter()
        subprocess.run([str(word) for word in command], check=True, timeout=300)
        copied = time.perf_counter()
    reap()
    return Sample(copied - ready, copied - begun, children() - before)


def measure(work: Path, options: argparse.Namespace, report: Report) -> None:
    for name in ("www", "nginx"):
        (work / name).mkdir()
    source, target = work / "www/disk.img", work / "copy"
    fill(source, options.data * MIB)
    # rclone finds the file in a listing only.
    server = Nginx(work / "nginx", work / "www", more="autoindex on;")
    try:
        for number in range(options.rounds):
            for name, peer in in_turn(installed(PEERS), number):
                subprocess.run(["cat", source], stdout=subprocess.DEVNULL, check=True)
                sample = run_one(peer, Job(server.url("disk.img"), target, work))
                if number == 0 and target.exists():
                    subprocess.run(["cmp", source, target], check=True)
                target.unlink(missing_ok=True)
                report.note("copy", "s", name, sample.copy_s)
                report.note("all, with the mount", "s", name, sample.whole_s)
                report.note("CPU", "s", name, sample.cpu_s)
    finally:
        server.stop()


def main() -> None:
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--data", type=int, default=1024, help="MiB")
    adopt_daemons()
    run_bench(parser, measure)


if __name__ == "__main__":
    main()
