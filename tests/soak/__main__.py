"""Mixed load on one mount: its bytes stay right, and it holds no more than at the beginning.

    .venv/bin/python -m tests.soak [--minutes 60] [--seed 1] [--work /var/tmp] [--json FILE]
        [--memory MIB] [--descriptors N]

As root, with OpenSSH's sshd, nbdkit, nginx, qemu-img and e2fsprogs.  Six images (a compressed qcow2
here, two behind ssh, one at a web server, two NBD exports; two of them write=through) are read,
written, snapshotted, nested, shown in other formats and copied by a dozen threads, while servers
are restarted, killed and stopped, and the cache is a fraction of the images.  What is read is
compared with models in memory.  At intervals all come to rest: snapshots are compared and deleted,
and the mount's memory, fds, threads, children and files are looked at.  At the end the snapshots
are compared once more in a new mount.

Exits with 0 if every byte was right, memory was flat after a quarter of the time, and no fd, file
or process was left.  What went wrong is told, and then --work keeps what there was.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from imgfs._native import _heap
from tests.soak.gate import Gate, Worker
from tests.soak.watch import MIB, Sample, children, judged, sample, slope
from tests.soak.workers import Snapshots, all_workers
from tests.soak.world import CACHE, IMGFS, World, limited, run, world

PR_SET_CHILD_SUBREAPER = 36
REST_S = 2.0  # what is closed is told to the mount a little later
SLACK = MIB  # of the cache: what is known of its blocks


def until(condition: object, what: str, seconds: float = 20) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(what)
        time.sleep(0.1)


def at_rest(world: World, begun: float, workers: list[Worker], *, snapshots: bool) -> Sample:
    """Raises AssertionError about what should not be there."""
    time.sleep(REST_S)
    until(lambda: not children(world.pid), f"children: {children(world.pid)}")
    assert not list(world.temporary.iterdir()), list(world.temporary.iterdir())
    if not snapshots:
        until(lambda: not world.layers(), f"left of snapshots: {world.layers()}")
    steps = sum(worker.steps for worker in workers)
    found = sample(world.pid, time.monotonic() - begun, world.cache, steps)
    assert found.cached <= CACHE + SLACK, f"{found.cached} bytes in the cache"
    return found


def told(found: Sample) -> str:
    memory = f"{found.anonymous / MIB:.1f} MiB anonymous, {found.resident / MIB:.1f} resident"
    return (
        f"{found.seconds / 60:6.1f} min: {found.steps} steps, {memory}, {found.fds} fds, "
        f"{found.threads} threads, {found.cached / MIB:.1f} MiB cached"
    )


def work_on(world: World, options: argparse.Namespace) -> list[Sample]:
    """All of it but the end.  Raises AssertionError and what a worker raised."""
    seconds = options.minutes * 60
    rests = max(2, int(seconds / 180))
    gate = Gate()
    workers = all_workers(world, gate, options.seed, min(15.0, seconds / 20))
    samples = []
    begun = time.monotonic()
    for worker in workers:
        worker.start()
    try:
        for number in range(rests):
            until_s = time.monotonic() + seconds / rests
            while time.monotonic() < until_s and not gate.is_over:
                time.sleep(0.2)
                stuck = [w for w in workers if time.monotonic() > w.begun + 150]
                if stuck:
                    gate.fail(stuck[0].name, f"stuck in {stuck[0].doing}")
            gate.keeps = number == rests - 1
            gate.close(len(workers))
            if gate.failures:
                break
            found = at_rest(world, begun, workers, snapshots=gate.keeps)
            print(told(found), flush=True)
            if not gate.keeps:
                samples.append(found)
                gate.open()
    finally:
        gate.end()
    for worker in workers:
        worker.join(30)
    if gate.failures:
        raise AssertionError("\n".join(gate.failures))
    again(world, workers)
    for worker in workers:
        counts = ", ".join(f"{what} {count}" for what, count in sorted(worker.counts.items()))
        print(f"  {worker.name}: {counts}")
    return samples


def again(world: World, workers: list[Worker]) -> None:
    """What another mount shows, and what is left when that is over."""
    world.umount()
    world.mount()
    for worker in workers:
        worker.gate.keeps = False
        if isinstance(worker, Snapshots):
            print(f"  {worker.name}: {len(worker.models)} in a new mount", flush=True)
        worker.settle()
    until(lambda: not world.layers(), f"left of snapshots: {world.layers()}")
    world.umount()
    for name in ("far", "nbd"):
        assert world.far_file(name).read_bytes() == world.images[name].reference.read_bytes()
    run("qemu-img", "compare", "-F", "raw", "-f", "qcow2", world.work / "here.qcow2",
        world.images["here"].reference)  # fmt: skip
    run(*IMGFS, "cache", "check")
    run(*IMGFS, "cache", "clear")
    left = [path for path in world.cache.rglob("*") if path.is_file() and path.name != "lock"]
    assert not left, f"left in the cache: {left}"
    left = [path for path in world.state.rglob("*") if path.is_file() and path.stat().st_size]
    assert sum(path.stat().st_size for path in left) < 16 << 10, f"left of the state: {left}"
    print(f"  left of the state: {sorted(path.name for path in left)}")
    assert not list(world.temporary.iterdir())
    text = (world.work / "log").read_text(errors="replace")
    assert "Traceback" not in text, text[text.index("Traceback") - 2000 :][:8000]


def reaped() -> dict[int, str]:
    """Who is left of our children, and those of theirs that came to us."""
    for pid, state in children(os.getpid()).items():
        if state.startswith("Z"):
            os.waitpid(pid, 0)
    return children(os.getpid())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", default="/var/tmp")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    parser.add_argument("--memory", type=int, metavar="MIB", help="most that the mount may have")
    parser.add_argument("--descriptors", type=int, help="most that the mount may have open")
    options = parser.parse_args()
    _heap.limit_arenas(1)  # else a dozen threads keep gigabytes of models that are gone
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    # Who outlives its parent comes to us, and is found.
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    work = Path(tempfile.mkdtemp(prefix="soak-", dir=options.work))
    memory = None if options.memory is None else options.memory * MIB
    with limited(memory, options.descriptors) as limits, world(work, limits) as built:
        built.mount()
        samples = work_on(built, options)
    left = reaped()
    wrong = judged(samples) + ([f"processes: {left}"] if left else [])
    if len(samples) > 2:
        print(f"memory: {slope(samples) * 3600 / MIB:+.2f} MiB an hour")
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in samples], indent=2))
    for each in wrong:
        print(f"WRONG: {each}")
    if wrong:
        sys.exit(1)
    shutil.rmtree(work)
    print("all right")


if __name__ == "__main__":
    main()
