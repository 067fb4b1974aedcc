"""A directory of many images behind ssh on loopback, looked at with `ls`.

    .venv/bin/python -m tests.bench.many [--images 1000] [--rounds 1] [--json FILE]

Needs qemu-img.  Half of the images are raw and half qcow2, of 1 GiB with a few clusters of data.
Every command is the first on a mount of its own.  Cold: nothing was kept of the images; warm: an
earlier mount has looked at the same.

ls -l */    every image as it is, in every format that it is shown in, extents.json, directories
ls -lR      what is in all directories too: original/, sparse/, partitions/, originals/

Seconds; the CPU seconds of the mount meanwhile; the greatest resident size of its process; and its
CPU in percent of one core in five seconds in which nobody asks it anything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.report import MIB, Report, parser_of, run_bench
from tests.bench.ssh import cpu
from tests.servers.ssh import Sshd

IMGFS = [sys.executable, "-m", "imgfs.cli.main"]
IDLE_S = 5.0
GIB = 1 << 30
COMMANDS = {"ls -l */": "ls -l */", "ls -lR": "ls -lR ."}


def fill_pool(pool: Path, count: int) -> None:
    """Images by turns raw and qcow2; no two are the same."""
    pool.mkdir()
    raw, qcow2 = pool.parent / "one.img", pool.parent / "one.qcow2"
    with raw.open("wb") as file:
        file.truncate(GIB)
        for at in (0, 300 << 20, GIB - 4096):
            file.seek(at)
            file.write(os.urandom(4096))
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, qcow2], check=True)
    for number in range(count):
        source = qcow2 if number % 2 else raw
        target = pool / f"disk{number:04}{source.suffix}"
        subprocess.run(["cp", "--sparse=always", source, target], check=True)
        if source is raw:
            with target.open("r+b") as file:
                file.seek(1000)
                file.write(str(number).encode())


@contextlib.contextmanager
def mounted(sshd: Sshd, pool: Path, point: Path) -> Iterator[int]:
    """The mount's process."""
    point.mkdir(exist_ok=True)
    subprocess.run(
        [*IMGFS, f"{sshd.url(pool)}/", point, "-o", sshd.options], check=True, timeout=60
    )
    try:
        yield int(json.loads((point / ".imgfs/status.json").read_bytes())["pid"])
    finally:
        subprocess.run([*IMGFS, "umount", point], check=True, timeout=120)


def resident(pid: int) -> int:
    """The most bytes so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


def measure(work: Path, options: argparse.Namespace, report: Report) -> None:
    pool, cache, point = work / "pool", work / "cache", work / "point"
    os.environ |= {"XDG_CACHE_HOME": str(cache), "XDG_STATE_HOME": str(work / "state")}
    fill_pool(pool, options.images)
    (work / "sshd").mkdir()
    sshd = Sshd(work / "sshd")

    def look(what: str, command: str) -> None:
        with mounted(sshd, pool, point) as pid:
            before, begun = cpu([pid]), time.perf_counter()
            done = subprocess.run(
                command, shell=True, cwd=point, capture_output=True, text=True, timeout=300
            )
            taken, after = time.perf_counter() - begun, cpu([pid])
            # Partitions come and go by what is on a disk; here there are none.
            if done.returncode or done.stdout.count(".qcow2\n") < options.images:
                raise RuntimeError(done.stderr[:1000])
            report.note(f"{what}, time", "s", "imgfs", taken)
            report.note(f"{what}: CPU", "s", "imgfs", after - before)
            report.note(f"{what}: peak memory", "MiB", "imgfs", resident(pid) / MIB)
            time.sleep(1)  # what the last names left to do is done
            before = cpu([pid])
            time.sleep(IDLE_S)
            idle = 100 * (cpu([pid]) - before) / IDLE_S
            report.note(f"{what}: CPU when idle", "%", "imgfs", idle)

    try:
        for _ in range(options.rounds):
            for name, command in COMMANDS.items():
                shutil.rmtree(cache, ignore_errors=True)
                for state in ("cold", "warm"):
                    look(f"{options.images:,} images: {name}, {state}", command)
    finally:
        sshd.stop()


def main() -> None:
    parser = parser_of(__doc__, rounds=1)
    parser.add_argument("--images", type=int, default=1000)
    run_bench(parser, measure)


if __name__ == "__main__":
    main()
