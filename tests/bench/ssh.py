"""One image copied out of an sshd on loopback by imgfs and its peers, in turn, in one run.

    .venv/bin/python -m tests.bench.ssh [--rounds 3] [--all] [--no-proxy] [--json FILE]

Needs sshfs, nbdkit and nbdcopy (libnbd-bin).  Every copy starts cold: a new connection, a new mount
with an empty cache, no target; only the source is in the server's page cache.  Prints medians of:
seconds of the copy; seconds with what must be set up before (mount, tunnel; scp and nbdkit log in
within their copy); both against imgfs's; MB/s of the image's data; bytes on the wire both ways;
allocated bytes of the copy; and seconds of CPU during the copy, user+system, of its command, of all
else on the client's side (imgfs's process) and of the server's.  Copies are compared with their
source in the first round; nothing else is asserted.  All connections pass through a counting proxy;
--no-proxy times without it and counts bytes in one more round.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.images import fill, scatter
from tests.proxy import CountingProxy
from tests.servers import Sshd

MIB = 1 << 20
PR_SET_CHILD_SUBREAPER = 36
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


@contextlib.contextmanager
def nbdkit_ssh(job: Job) -> Iterator[list[object]]:
    login = [f"host={job.host}", f"config={job.config}", f"port={job.port}", "user=root"]
    login += [f"key={job.sshd.directory / 'user'}"]
    login += [f"known-hosts={job.sshd.directory / 'known'}"]
    copy = ["--run", f"nbdcopy $uri {job.target}"]
    yield ["nbdkit", "-r", "-U", "-", "ssh", *login, job.source, *copy]


@contextlib.contextmanager
def nbdkit_file(job: Job) -> Iterator[list[object]]:
    here, there, pid = (job.work / name for name in ("here.sock", "there.sock", "there.pid"))
    serve = f"exec nbdkit -f -r -U {there} -P {pid} file {job.source}"
    process = subprocess.Popen(
        ["ssh", "-F", job.config, "-L", f"{here}:{there}", job.host, serve],
        stdin=subprocess.DEVNULL,
    )
    try:
        # nbdkit writes its pid when it listens.
        wait_until(lambda: here.exists() and pid.exists() and bool(pid.read_text()), "tunnel")
        yield ["nbdcopy", f"nbd+unix:///?socket={here}", job.target]
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(pid.read_text()), 15)
        process.wait(20)
        for path in (here, there, pid):
            path.unlink(missing_ok=True)


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
    cpu_copy: tuple[float, float]  #: user and system seconds
    cpu_client: tuple[float, float]
    cpu_server: tuple[float, float]


def minus(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return max(0.0, a[0] - b[0]), max(0.0, a[1] - b[1])  # ticks are coarse


def descendants(pid: int) -> Iterator[int]:
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, tasks.read_text().split()):
                yield child
                yield from descendants(child)


def cpu(pids: Iterable[int]) -> tuple[float, float]:
    """Of these processes and of all their children that have ended."""
    user = system = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            user += int(stat[11]) + int(stat[13])
            system += int(stat[12]) + int(stat[14])
    return user / TICKS, system / TICKS


def cpu_client(sshd: Sshd) -> tuple[float, float]:
    """Of all that came from this process, living or ended, but the server."""
    ours = set(descendants(os.getpid())) - set(sshd.pids())
    used, living = resource.getrusage(resource.RUSAGE_CHILDREN), cpu(ours)
    return used.ru_utime + living[0], used.ru_stime + living[1]


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
        process = subprocess.Popen([str(word) for word in command])
        _, status, used = os.wait4(process.pid, 0)
        end = time.perf_counter()
        copy = (used.ru_utime, used.ru_stime)
        client = minus(minus(cpu_client(job.sshd), client), copy)
        server = minus(cpu(job.sshd.pids()), server)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
    reap(job.sshd)
    if proxy:
        proxy.wait_idle()
    return Sample(
        copy_s=end - ready,
        whole_s=end - begun,
        wire=proxy.up + proxy.down - wire if proxy else None,
        allocated=job.target.stat().st_blocks * 512,
        cpu_copy=copy,
        cpu_client=client,
        cpu_server=server,
    )


def proxy_rate() -> float:
    """Bytes a second that the proxy carries, one connection, with nothing at either end."""
    total, got, buffer = 2048 * MIB, 0, bytearray(MIB)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                for _ in range(total // MIB):
                    connection.sendall(bytes(MIB))

        threading.Thread(target=serve, daemon=True).start()
        proxy = CountingProxy(listener.getsockname()[1])
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            begun = time.perf_counter()
            while count := client.recv_into(buffer):
                got += count
            seconds = time.perf_counter() - begun
        proxy.close()
    assert got == total
    return got / seconds


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


Figures = dict[str, dict[str, list[Sample]]]


def measure(work: Path, options: argparse.Namespace) -> tuple[Figures, dict[str, int]]:
    """Samples by image and peer, and the bytes of data of each image."""
    sources, keys = work / "sources", work / "sshd"
    for directory in (sources, keys):
        directory.mkdir()
    dense, sparse = sources / "dense.img", sources / "sparse.img"
    fill(dense, options.data * MIB)
    scatter(sparse, options.sparse * MIB, options.data * MIB)
    items = [(dense, DENSE), (sparse, SPARSE | WHOLE if options.all else SPARSE)]
    figures: Figures = {}
    sshd = Sshd(keys)
    proxy = CountingProxy(sshd.port)
    try:
        sshd.trust(proxy.port)
        passes = [None] * options.rounds if options.no_proxy else [proxy] * (options.rounds - 1)
        for number, way in enumerate([*passes, proxy]):
            port, config = way.port if way else sshd.port, work / f"config{number}"
            write_config(config, sshd, port)
            for source, peers in items:
                # Who comes first meets memory that nobody used for a while: in turn.
                turn = number % len(peers)
                order = [*peers.items()][turn:] + [*peers.items()][:turn]
                for name, (host, peer) in order:
                    if options.only and not name.startswith((options.only, "imgfs")):
                        continue
                    target = work / "copy"
                    job = Job(sshd, port, config, host, source, target, work)
                    sample = run_one(peer, job, way)
                    if number == 0:
                        subprocess.run(["cmp", source, target], check=True)
                    target.unlink()
                    figures.setdefault(source.stem, {}).setdefault(name, []).append(sample)
                    print(f"{source.stem} {name}: {sample.copy_s:.2f} s", file=sys.stderr)
    finally:
        proxy.close()
        sshd.stop()
    return figures, dict.fromkeys(figures, options.data * MIB)


def report(image: str, data: int, by_name: dict[str, list[Sample]], timed: int) -> None:
    """Times of the first `timed` rounds; the wire of those that passed through the proxy."""

    def median(name: str, figure: Callable[[Sample], float]) -> float:
        return statistics.median(figure(sample) for sample in by_name[name][:timed])

    def split(name: str, figure: Callable[[Sample], tuple[float, float]]) -> str:
        parts = (median(name, lambda s, i=i: figure(s)[i]) for i in (0, 1))  # type: ignore[misc]
        return "{:5.2f}+{:4.2f}".format(*parts)

    print(f"\n{image}: {data / MIB:,.0f} MiB of data{'':33}CPU s, user+system")
    print(f"{'':31} copy s    x  all s    x   MB/s wire MiB  alloc", end="")
    print(f" {'copy':>10} {'client':>10} {'server':>10}")
    base_copy = median("imgfs", lambda s: s.copy_s)
    base_whole = median("imgfs", lambda s: s.whole_s)
    for name, samples in by_name.items():
        copy, whole = median(name, lambda s: s.copy_s), median(name, lambda s: s.whole_s)
        wire = statistics.median(s.wire for s in samples if s.wire is not None) / MIB
        allocated = median(name, lambda s: s.allocated) / MIB
        print(f"  {name:29} {copy:6.2f} {copy / base_copy:4.2f} {whole:6.2f}", end=" ")
        print(f"{whole / base_whole:4.2f} {data / copy / 1e6:6.0f}", end=" ")
        print(f"{wire:8.1f} {allocated:6.0f}", end=" ")
        print(split(name, lambda s: s.cpu_copy), split(name, lambda s: s.cpu_client), end=" ")
        print(split(name, lambda s: s.cpu_server))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=int, default=512, help="MiB of data in either image")
    parser.add_argument("--sparse", type=int, default=4096, help="MiB that the sparse one spans")
    parser.add_argument("--all", action="store_true", help="scp and sshfs of the sparse image too")
    parser.add_argument("--only", metavar="NAME", help="imgfs and the peers named NAME...")
    parser.add_argument("--no-proxy", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    options = parser.parse_args()
    # Daemons come to us when their parents end, and their CPU is ours to count.
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    print(f"proxy alone: {proxy_rate() / 1e6:,.0f} MB/s")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as work:
        os.environ["XDG_CACHE_HOME"] = f"{work}/cache"
        figures, data = measure(Path(work), options)
    for image, by_name in figures.items():
        report(image, data[image], by_name, options.rounds)
    if options.json:
        samples = {
            image: {name: [asdict(s) for s in values] for name, values in by_name.items()}
            for image, by_name in figures.items()
        }
        options.json.write_text(json.dumps(samples, indent=2))


if __name__ == "__main__":
    main()
