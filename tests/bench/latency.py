"""One image read over a long line by imgfs and its peers, in turn, in one run.

    .venv/bin/python -m tests.bench.latency [--rounds 3] [--delays 0 20 200] [--json FILE]

Needs sshfs, rclone, nbdkit, nbdfuse (libnbd-bin) and qemu-img with qemu-block-extra. All reach one
sshd through tests/servers/delay_proxy.py: so many milliseconds of round trip, 1 Gbit/s. Everything
starts cold: a new connection, a new mount with an empty cache; only the source is in the server's
page cache. Sequential: the image is read from its start in steps of 1 MiB until --data MiB have
come or --seconds are over, from the open on; MB/s, also of the proxy with nothing at either end.
Random: the same mount then reads 4 KiB here and there, one after the other, in a part that was not
read yet; the median of milliseconds. qemu-img convert shows no file: only its copying is timed,
login included.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.report import MIB, Report, in_turn, installed, parser_of, run_bench
from tests.bench.ssh import wait_until, warm, write_config
from tests.images import fill
from tests.servers.delay_proxy import DelayProxy, carried
from tests.servers.ssh import Sshd

RATE = 125e6
CONVERT = "qemu-img convert"
REST = 384 * MIB  # of the image's end: nobody's readahead has been there


@dataclass(frozen=True)
class Job:
    sshd: Sshd
    port: int
    config: Path
    source: Path
    work: Path


Peer = Callable[[Job], contextlib.AbstractContextManager[Path]]


@dataclass(frozen=True)
class Sample:
    rate: float  #: bytes a second
    random_s: float | None  #: of one read, the median


@contextlib.contextmanager
def imgfs(job: Job) -> Iterator[Path]:
    command = [sys.executable, "-m", "imgfs.cli.main"]
    point, url = job.work / "imgfs", job.sshd.url(job.source, job.port)
    point.mkdir(exist_ok=True)
    subprocess.run([*command, url, point, "-o", job.sshd.options], check=True, timeout=60)
    try:
        yield point / f"{job.source.stem}.raw"
    finally:
        subprocess.run([*command, "umount", point], check=True, timeout=60)
        # The next one is to be as cold.
        subprocess.run([*command, "cache", "clear"], check=True, timeout=60, stdout=sys.stderr)


@contextlib.contextmanager
def served(point: Path, shown: Path, *command: object) -> Iterator[Path]:
    """A peer that stays in the foreground; `shown` is there once it has mounted."""
    point.mkdir(exist_ok=True)
    process = subprocess.Popen([str(word) for word in command])
    try:
        wait_until(shown.exists, str(command[0]))
        yield shown
    finally:
        subprocess.run(["fusermount3", "-uq", point], check=False)
        process.wait(30)


def sshfs(job: Job) -> contextlib.AbstractContextManager[Path]:
    point, remote = job.work / "sshfs", f"default:{job.source.parent}"
    return served(point, point / job.source.name, "sshfs", "-f", "-F", job.config, remote, point)


def rclone(job: Job) -> contextlib.AbstractContextManager[Path]:
    keys, point = job.sshd.directory, job.work / "rclone"
    login = f"host=127.0.0.1,port={job.port},user=root,key_file={keys / 'user'}"
    remote = f":sftp,{login},known_hosts_file={keys / 'known'}:{job.source.parent}"
    words = ["--config", "/dev/null", "--read-only", remote, point]
    return served(point, point / job.source.name, "rclone", "mount", *words)


def nbdkit(job: Job) -> contextlib.AbstractContextManager[Path]:
    keys, point = job.sshd.directory, job.work / "nbd"
    words: list[object] = [point / "nbd.img", "[", "nbdkit", "-r", "--exit-with-parent", "ssh"]
    words += ["host=127.0.0.1", f"port={job.port}", "user=root"]
    words += [f"identity={keys / 'user'}", f"known-hosts={keys / 'known'}", job.source, "]"]
    return served(point, point / "nbd.img", "nbdfuse", "-r", *words)


PEERS: dict[str, Peer] = {
    "imgfs": imgfs,
    "sshfs": sshfs,
    "rclone mount": rclone,
    "nbdkit ssh, nbdfuse": nbdkit,
}


def sequential(path: Path, most: int, seconds: float) -> float:
    """Bytes a second."""
    buffer, got = bytearray(MIB), 0
    begun = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while got < most and time.perf_counter() - begun < seconds:
            got += file.readinto(buffer)
        return got / (time.perf_counter() - begun)


def at_random(path: Path, size: int, count: int) -> float:
    """Seconds of one read of 4 KiB."""
    rng, taken = random.Random(5), []
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for block in rng.sample(range((size - REST) // MIB, size // MIB), count):
            begun = time.perf_counter()
            assert len(os.pread(file.fileno(), 4096, block * MIB + 4096)) == 4096
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def convert(job: Job, proxy: DelayProxy, seconds: float) -> Sample:
    """qemu-img has an ssh driver that takes the key from an agent only.

    It writes when its buffers are full, which may be never: so what came over the line counts.
    """
    target = job.work / "converted"
    agent = subprocess.run(["ssh-agent", "-s"], check=True, capture_output=True, text=True).stdout
    found = dict(part.split("=", 1) for part in agent.replace("\n", ";").split(";") if "=" in part)
    environment = os.environ | {"SSH_AUTH_SOCK": found["SSH_AUTH_SOCK"]}
    try:
        key = job.sshd.directory / "user"
        subprocess.run(["ssh-add", "-q", key], check=True, env=environment)
        where = f"driver=ssh,host=127.0.0.1,port={job.port},user=root,path={job.source}"
        where += ",host-key-check.mode=none"
        words = ["qemu-img", "convert", "--image-opts", where, "-O", "raw", target]
        begun, before = time.perf_counter(), proxy.down
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(words, check=True, env=environment, timeout=seconds)
        return Sample((proxy.down - before) / (time.perf_counter() - begun), None)
    finally:
        os.kill(int(found["SSH_AGENT_PID"]), 15)
        target.unlink(missing_ok=True)


def measure(peer: Peer, job: Job, options: argparse.Namespace) -> Sample:
    with peer(job) as path:
        rate = sequential(path, options.data * MIB, options.seconds)
        time.sleep(1)  # what was read ahead comes in
        return Sample(rate, at_random(path, job.source.stat().st_size, options.count))


def run(work: Path, options: argparse.Namespace, report: Report) -> None:
    sources, keys = work / "sources", work / "sshd"
    for directory in (sources, keys):
        directory.mkdir()
    source = sources / "disk.img"
    fill(source, options.data * MIB + REST + 128 * MIB)
    names = {name: name for name in [*installed(PEERS), CONVERT] if name.startswith(options.only)}
    sshd = Sshd(keys)
    try:
        for number in range(options.rounds):
            for delay in options.delays:
                proxy = DelayProxy(sshd.port, delay / 1000, RATE)
                try:
                    sshd.trust(proxy.port)
                    config = work / "config"
                    write_config(config, sshd, proxy.port)
                    job = Job(sshd, proxy.port, config, source, work)
                    for name, _ in in_turn(names, number):
                        warm(source)
                        if name in PEERS:
                            sample = measure(PEERS[name], job, options)
                        else:
                            sample = convert(job, proxy, options.seconds)
                        report.note(f"{delay} ms: sequential", "MB/s", name, sample.rate / 1e6)
                        if sample.random_s is not None:
                            taken = sample.random_s * 1e3
                            report.note(f"{delay} ms: 4 KiB random", "ms", name, taken)
                finally:
                    proxy.close()
                if number == 0:
                    alone = carried(delay / 1e3, RATE, 512 * MIB) / 1e6
                    report.note(f"{delay} ms: sequential", "MB/s", "the proxy alone", alone)
    finally:
        sshd.stop()


def main() -> None:
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 20, 200], metavar="MS")
    parser.add_argument("--data", type=int, default=1536, help="MiB to be read in sequence")
    parser.add_argument("--seconds", type=float, default=15, help="at most, for that")
    parser.add_argument("--count", type=int, default=20, help="random reads")
    parser.add_argument("--only", default="", metavar="NAME", help="the peers named NAME...")
    run_bench(parser, run)


if __name__ == "__main__":
    main()
