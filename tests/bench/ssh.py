"""One image copied out of an sshd on loopback by imgfs and its peers, in turn, in one run.

    .venv/bin/python -m tests.bench.ssh [--rounds 3] [--all] [--no-proxy] [--json FILE]

Needs sshfs, nbdkit and nbdcopy (libnbd-bin).  Every copy starts cold: a new connection, a new
mount with an empty cache, no target; only the source is in the server's page cache.  Measured are:
seconds of the copy; seconds with what must be set up before (mount, tunnel; scp and nbdkit log in
within their copy); MiB on the wire both ways; allocated MiB of the copy; and seconds of CPU during
the copy on the client's side (its command, and imgfs's process) and on the server's.  Copies are
compared with their source in the first round; nothing else is asserted.  All connections pass
through a counting proxy; --no-proxy times without it and counts bytes in one more round.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.report import MIB, Report, adopt_daemons, in_turn, installed, parser_of, run_bench
from tests.images import fill, scatter
from tests.servers.counting_proxy import CountingProxy
from tests.servers.ssh import Sshd

TICKS = os.sysconf("SC_CLK_TCK")
#: Names of hosts in the ssh_config that all peers are given: OpenSSH's ciphers, and imgfs's first.
CIPHERS = {"": "default", ", aes128-gcm": "gcm"}


@dataclass(frozen=True)
class Job:
    """What a peer needs to know; `host` is a name in `config`."""

    sshd: Sshd
    port: int
    config: Path
    host: str
    source: Path
    target: Path
    work: Path


Peer = Callable[[Job], contextlib.AbstractContextManager[list[object]]]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.002)


@contextlib.contextmanager
def imgfs(job: Job) -> Iterator[list[object]]:
    point = job.work / "imgfs"
    point.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "imgfs.cli.main"]
    url = job.sshd.url(job.source, job.port)
    subprocess.run([*command, url, point, "-o", job.sshd.options], check=True, timeout=30)
    try:
        yield ["cp", point / f"{job.source.stem}.raw", job.target]
    finally:
        subprocess.run([*command, "umount", point], check=True, timeout=60)


@contextlib.contextmanager
def sshfs(job: Job) -> Iterator[list[object]]:
    point = job.work / "sshfs"
    point.mkdir(exist_ok=True)
    remote = f"{job.host}:{job.source.parent}"
    process = subprocess.Popen(["sshfs", "-f", "-F", job.config, remote, point])
    try:
        wait_until(point.is_mount, "sshfs")
        yield ["cp", point / job.source.name, job.target]
    finally:
        subprocess.run(["fusermount3", "-uq", point], check=False)
        process.wait(20)


@contextlib.contextmanager
def scp(job: Job) -> Iterator[list[object]]:
    yield ["scp", "-q", "-F", job.config, f"{job.host}:{job.source}", job.target]


@contextlib.contextmanager
def ssh_cat(job: Job) -> Iterator[list[object]]:
    yield ["sh", "-c", f"ssh -F {job.config} {job.host} cat {job.source} >{job.target}"]


@contextlib.contextmanager
def ssh_tar(job: Job) -> Iterator[list[object]]:
    pack = f"tar -C {job.source.parent} -S -cf - {job.source.name}"
    unpack = f"tar -C {job.work} --transform s/.*/{job.target.name}/ -xf -"
    pipe = f"ssh -F {job.config} {job.host} {pack} | {unpack}"
    yield ["bash", "-o", "pipefail", "-c", pipe]


def nbdkit_words(job: Job, command: str) -> list[object]:
    login = [f"host={job.host}", f"config={job.config}", f"port={job.port}", "user=root"]
    login += [f"identity={job.sshd.directory / 'user'}"]
    login += [f"known-hosts={job.sshd.directory / 'known'}"]
    return ["nbdkit", "-r", "-U", "-", "ssh", *login, job.source, "--run", command]


@contextlib.contextmanager
def nbdkit_ssh(job: Job) -> Iterator[list[object]]:
    yield nbdkit_words(job, f"nbdcopy $uri {job.target}")


@contextlib.contextmanager
def tunnel(job: Job) -> Iterator[str]:
    """The URL of an nbdkit on the server."""
    here, there, pid = (job.work / name for name in ("here.sock", "there.sock", "there.pid"))
    serve = f"exec nbdkit -f -r -U {there} -P {pid} file {job.source}"
    process = subprocess.Popen(
        ["ssh", "-F", job.config, "-L", f"{here}:{there}", job.host, serve],
        stdin=subprocess.DEVNULL,
    )
    try:
        # nbdkit writes its pid when it listens.
        wait_until(lambda: here.exists() and pid.exists() and bool(pid.read_text()), "tunnel")
        yield f"nbd+unix:///?socket={here}"
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(pid.read_text()), 15)
        process.wait(20)
        for path in (here, there, pid):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def nbdkit_file(job: Job) -> Iterator[list[object]]:
    with tunnel(job) as url:
        yield ["nbdcopy", url, job.target]


def both(name: str, peer: Peer) -> dict[str, tuple[str, Peer]]:
    return {name + suffix: (host, peer) for suffix, host in CIPHERS.items()}


IMGFS: dict[str, tuple[str, Peer]] = {"imgfs": ("default", imgfs)}
WHOLE = both("scp", scp) | both("sshfs", sshfs)
DENSE = IMGFS | WHOLE | both("ssh cat", ssh_cat) | both("nbdkit ssh", nbdkit_ssh)
SPARSE = IMGFS | both("ssh tar -S", ssh_tar) | both("tunnel, nbdkit file", nbdkit_file)
SPARSE |= both("nbdkit ssh", nbdkit_ssh)


@dataclass(frozen=True)
class Sample:
    copy_s: float
    whole_s: float
    wire: int | None
    allocated: int
    cpu_client: float  #: seconds
    cpu_server: float


def descendants(pid: int) -> Iterator[int]:
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, tasks.read_text().split()):
                yield child
                yield from descendants(child)


def cpu(pids: Iterable[int]) -> float:
    """Seconds of these processes and of all their children that have ended."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, stat[11:15]))
    return ticks / TICKS


def cpu_client(sshd: Sshd) -> float:
    """Of all that came from this process, living or ended, but the server."""
    ours = set(descendants(os.getpid())) - set(sshd.pids())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime + cpu(ours)


def reap(sshd: Sshd) -> None:
    """Wait for whatever a peer left running, so that its CPU is counted."""

    def done() -> bool:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        return set(descendants(os.getpid())) == {sshd.pids()[0]}

    wait_until(done, "a process of a peer is left")


def warm(path: Path) -> None:
    """Read what is data of it."""
    buffer, at = bytearray(MIB), 0
    with path.open("rb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            while at < end:
                at += os.preadv(file.fileno(), [buffer], at)


def run_one(peer: Peer, job: Job, proxy: CountingProxy | None) -> Sample:
    warm(job.source)
    wire = proxy.up + proxy.down if proxy else 0
    begun = time.perf_counter()
    with peer(job) as command:
        client, server = cpu_client(job.sshd), cpu(job.sshd.pids())
        ready = time.perf_counter()
        # Without a timeout: with one, subprocess looks every 50 ms only.
        subprocess.run([str(word) for word in command], check=True)
        end = time.perf_counter()
        client = max(0.0, cpu_client(job.sshd) - client)  # ticks are coarse
        server = max(0.0, cpu(job.sshd.pids()) - server)
    reap(job.sshd)
    if proxy:
        proxy.wait_idle()
    return Sample(
        copy_s=end - ready,
        whole_s=end - begun,
        wire=proxy.up + proxy.down - wire if proxy else None,
        allocated=job.target.stat().st_blocks * 512,
        cpu_client=client,
        cpu_server=server,
    )


def write_config(path: Path, sshd: Sshd, port: int) -> None:
    common = f"""
        HostName 127.0.0.1
        Port {port}
        User root
        IdentityFile {sshd.directory / "user"}
        IdentitiesOnly yes
        UserKnownHostsFile {sshd.directory / "known"}
        StrictHostKeyChecking yes
        BatchMode yes
    """
    gcm = "Ciphers aes128-gcm@openssh.com\n"
    path.write_text(f"Host default\n{common}\nHost gcm\n{common}{gcm}")


def measure(work: Path, options: argparse.Namespace, report: Report) -> None:
    sources, keys = work / "sources", work / "sshd"
    for directory in (sources, keys):
        directory.mkdir()
    dense, sparse = sources / "dense.img", sources / "sparse.img"
    fill(dense, options.data * MIB)
    scatter(sparse, options.sparse * MIB, options.data * MIB)
    items = [(dense, DENSE), (sparse, SPARSE | WHOLE if options.all else SPARSE)]
    sshd = Sshd(keys)
    proxy = CountingProxy(sshd.port)
    try:
        sshd.trust(proxy.port)
        passes = [None] * options.rounds if options.no_proxy else [proxy] * (options.rounds - 1)
        for number, way in enumerate([*passes, proxy]):
            port, config = way.port if way else sshd.port, work / f"config{number}"
            write_config(config, sshd, port)
            for source, peers in items:
                for name, (host, peer) in in_turn(installed(peers), number):
                    if options.only and not name.startswith((options.only, "imgfs")):
                        continue
                    target = work / "copy"
                    job = Job(sshd, port, config, host, source, target, work)
                    sample = run_one(peer, job, way)
                    if number == 0:
                        subprocess.run(["cmp", source, target], check=True)
                    target.unlink()
                    note(report, source.stem, name, sample, (way is None) == options.no_proxy)
    finally:
        proxy.close()
        sshd.stop()


def note(report: Report, image: str, name: str, sample: Sample, is_timed: bool) -> None:
    if sample.wire is not None:
        report.note(f"{image}: on the wire", "MiB", name, sample.wire / MIB)
    if not is_timed:
        return
    report.note(f"{image}: copy", "s", name, sample.copy_s)
    report.note(f"{image}: all, with the mount", "s", name, sample.whole_s)
    report.note(f"{image}: allocated", "MiB", name, sample.allocated / MIB)
    report.note(f"{image}: CPU of the client", "s", name, sample.cpu_client)
    report.note(f"{image}: CPU of the server", "s", name, sample.cpu_server)


def main() -> None:
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--data", type=int, default=512, help="MiB of data in either image")
    parser.add_argument("--sparse", type=int, default=4096, help="MiB that the sparse one spans")
    parser.add_argument("--all", action="store_true", help="scp and sshfs of the sparse image too")
    parser.add_argument("--only", metavar="NAME", help="imgfs and the peers named NAME...")
    parser.add_argument("--no-proxy", action="store_true")
    adopt_daemons()
    run_bench(parser, measure)


if __name__ == "__main__":
    main()
