"""A sparse image copied out of an sshd on loopback by imgfs copy and its peers, in turn.

    .venv/bin/python -m tests.bench.copy [--rounds 3] [--sparse 8192] [--data 1024] [--many 50]

Needs qemu-img, nbdcopy, nbdkit with its ssh plugin, rsync and scp.  Every copy starts cold: a new
connection, no target; only the source is in the server's page
cache.  nbdcopy and qemu-img are run twice: through a client of the server's SFTP here, and through
a tunnel to an nbdkit that runs on the server.  All are waited for until their copy is on the disk
(`sync FILE`), which imgfs copy does by itself.  Copies are compared with their source in the first
round.  Then so many small images are copied one by one, and by one imgfs copy -j 8, with one of
them damaged.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.report import MIB, Report, in_turn, installed, parser_of, run_bench, run_watched
from tests.bench.ssh import Job, nbdkit_words, tunnel, warm, write_config
from tests.images import scatter
from tests.servers.ssh import Sshd

IMGFS = [sys.executable, "-m", "imgfs.cli.main", "copy", "--no-progress"]
Peer = Callable[[Job], contextlib.AbstractContextManager[list[object]]]


@contextlib.contextmanager
def imgfs(job: Job) -> Iterator[list[object]]:
    yield [*IMGFS, job.sshd.url(job.source, job.port), job.target, "-o", job.sshd.options]


@contextlib.contextmanager
def scp(job: Job) -> Iterator[list[object]]:
    yield ["scp", "-q", "-F", job.config, f"{job.host}:{job.source}", job.target]


@contextlib.contextmanager
def rsync(job: Job) -> Iterator[list[object]]:
    yield ["rsync", "-S", "-e", f"ssh -F {job.config}", f"{job.host}:{job.source}", job.target]


@contextlib.contextmanager
def nbdcopy(job: Job) -> Iterator[list[object]]:
    yield nbdkit_words(job, f"nbdcopy $uri {job.target}")


@contextlib.contextmanager
def qemu_img(job: Job) -> Iterator[list[object]]:
    yield nbdkit_words(job, f"qemu-img convert -f raw -W -m 16 $uri {job.target}")


@contextlib.contextmanager
def nbdcopy_tunnel(job: Job) -> Iterator[list[object]]:
    with tunnel(job) as url:
        yield ["nbdcopy", url, job.target]


@contextlib.contextmanager
def qemu_img_tunnel(job: Job) -> Iterator[list[object]]:
    with tunnel(job) as url:
        yield ["qemu-img", "convert", "-f", "raw", "-W", "-m", "16", url, job.target]


PEERS: dict[str, Peer] = {
    "imgfs copy": imgfs,
    "scp": scp,
    "rsync -S": rsync,
    "nbdcopy, nbdkit ssh": nbdcopy,
    "qemu-img convert, nbdkit ssh": qemu_img,
    "nbdcopy, tunnel to nbdkit": nbdcopy_tunnel,
    "qemu-img convert, tunnel to nbdkit": qemu_img_tunnel,
}


def run_one(peer: Peer, job: Job) -> tuple[float, float, float]:
    """Seconds of all of it, seconds without what was set up before, and MiB of the peak."""
    warm(job.source)
    begun = time.perf_counter()
    with peer(job) as command:
        ready = time.perf_counter()
        peak = run_watched(command)
        subprocess.run(["sync", job.target], check=True)
        end = time.perf_counter()
    return end - begun, end - ready, peak


def single(job: Job, options: argparse.Namespace, report: Report) -> None:
    peers = installed(PEERS)
    if options.only:
        peers = {name: peers[name] for name in ("imgfs copy", *options.only)}
    for number in range(options.rounds):
        for name, peer in in_turn(peers, number):
            whole, copy, peak = run_one(peer, job)
            report.note("a sparse image over ssh", "s", name, whole)
            if copy < whole * 0.99:
                report.note("without the tunnel", "s", name, copy)
            report.note("peak memory", "MiB", name, peak)
            if number == 0:
                subprocess.run(["cmp", job.source, job.target], check=True)
            job.target.unlink()


def many(job: Job, options: argparse.Namespace, report: Report) -> None:
    """All of a directory one by one, and at once; the last but one is damaged."""
    pool, out = job.work / "pool", job.work / "out"
    pool.mkdir()
    out.mkdir()
    for number in range(options.many):
        scatter(pool / f"disk{number:03}.img", 64 * MIB, 8 * MIB, seed=number)
    bad = pool / f"disk{options.many - 2:03}.img"
    bad.write_bytes(b"QFI\xfb" + bytes(3) + b"\x09" + bytes(100))
    sync = ["-o", job.sshd.options]
    what = f"{options.many} images over ssh, one of them damaged"
    for _ in range(options.many_rounds):
        begun = time.perf_counter()
        for path in sorted(pool.iterdir()):
            code = subprocess.run([*IMGFS, job.sshd.url(path), f"{out}/", *sync], check=False)
            assert code.returncode == (path == bad)
        one_by_one = time.perf_counter() - begun
        for path in out.iterdir():
            path.unlink()
        begun = time.perf_counter()
        words = [*IMGFS, f"{job.sshd.url(pool)}/", f"{out}/", "-j", "8", *sync]
        assert subprocess.run(words, check=False).returncode == 1
        report.note(what, "s", "imgfs copy -j 8", time.perf_counter() - begun)
        report.note(what, "s", "one by one", one_by_one)
        assert len(list(out.iterdir())) == options.many - 1
        for path in out.iterdir():
            subprocess.run(["cmp", path, pool / f"{path.stem}.img"], check=True)
            path.unlink()


def measure(work: Path, options: argparse.Namespace, report: Report) -> None:
    (work / "sshd").mkdir()
    sshd = Sshd(work / "sshd")
    try:
        write_config(work / "config", sshd, sshd.port)
        source = work / "source.img"
        job = Job(sshd, sshd.port, work / "config", "default", source, work / "copy", work)
        if options.data:
            scatter(source, options.sparse * MIB, options.data * MIB)
            single(job, options, report)
            source.unlink()
        if options.many:
            many(job, options, report)
    finally:
        sshd.stop()


def main() -> None:
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--data", type=int, default=1024, help="MiB of data")
    parser.add_argument("--sparse", type=int, default=8192, help="MiB that they are spread over")
    parser.add_argument("--many", type=int, default=50, help="images; 0: none")
    parser.add_argument("--many-rounds", type=int, default=1)
    parser.add_argument("--work", default="/var/tmp", help="where; a tmpfs leaves the disk out")
    parser.add_argument("--only", action="append", help="this peer, and imgfs")
    run_bench(parser, measure)


if __name__ == "__main__":
    main()
