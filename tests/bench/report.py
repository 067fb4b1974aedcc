"""What the benches have in common: the peers that are there, their figures, and how these are told.

A bench notes one value after the other, by what was measured and by who did it.  With --json they
are written as they came:

    {"rows": [{"what": "4 KiB random QD1", "unit": "IOPS", "samples": {"imgfs": [51000.0, …], …}}],
     "load": [0.4, 1.9], "seconds": 132.5}

`load` is the machine's before and after, `seconds` how long all took.  Of seconds, milliseconds and
MiB (of memory, of what crossed the wire) less is better, of all other units more.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

MIB = 1 << 20
PR_SET_CHILD_SUBREAPER = 36
LESS = frozenset({"s", "ms", "MiB"})
Peer = TypeVar("Peer")

#: What must be installed for a peer to take part, and how it tells its version.
PROGRAMS = {
    "qemu-storage-daemon": "qemu-storage-daemon",
    "qemu-img": "qemu-img",
    "nbdfuse": "nbdfuse",
    "nbdcopy": "nbdcopy",
    "nbdkit": "nbdkit",
    "tunnel": "nbdkit",
    "ssh": "ssh",
    "sshfs": "sshfs",
    "rclone": "rclone",
    "scp": "scp",
    "rsync": "rsync",
    "curl": "curl",
    "xmount": "xmount",
    "virt-sparsify": "virt-sparsify",
    "cp, virt-sparsify": "virt-sparsify",
}


def program_of(peer: str) -> str | None:
    """The longest name in PROGRAMS that the peer's begins with tells it."""
    names = [name for name in PROGRAMS if peer.startswith(name)]
    return PROGRAMS[max(names, key=len)] if names else None


def installed(peers: Mapping[str, Peer]) -> dict[str, Peer]:
    """Without those that are not there, which are named on stderr."""
    there = {}
    for name, peer in peers.items():
        program = program_of(name)
        if program is None or shutil.which(program):
            there[name] = peer
        else:
            print(f"{name}: is left out: no {program}", file=sys.stderr)
    return there


@dataclass(frozen=True)
class Row:
    """One figure, of all who did it; the first is what the others are compared with."""

    what: str
    unit: str
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ours(self) -> str:
        return next((name for name in self.samples if name.startswith("imgfs")), "")

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def ratio(self, name: str) -> float:
        """How many times as good imgfs is."""
        ours, theirs = self.median(self.ours), self.median(name)
        if self.unit in LESS:
            ours, theirs = theirs, ours
        return ours / theirs if theirs else float("inf")


class Report:
    """The figures of one run of one bench."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self._load = os.getloadavg()[0]
        self._begun = time.monotonic()

    def note(self, what: str, unit: str, name: str, value: float) -> None:
        row = self.rows.setdefault(what, Row(what, unit))
        assert row.unit == unit
        row.samples.setdefault(name, []).append(value)
        print(f"{what}: {name}: {shown(value)} {unit}", file=sys.stderr, flush=True)

    def told(self) -> dict[str, Any]:
        return {
            "rows": [asdict(row) for row in self.rows.values()],
            "load": [round(self._load, 1), round(os.getloadavg()[0], 1)],
            "seconds": round(time.monotonic() - self._begun, 1),
        }

    def finish(self, json_file: Path | None) -> None:
        """Print all, and write it."""
        for row in self.rows.values():
            print(f"{row.what}, {row.unit}")
            for name, values in row.samples.items():
                spread = f"{shown(min(values))} to {shown(max(values))}"
                line = f"  {name:36} {shown(row.median(name)):>12}   {spread:28}"
                print(line + (f" imgfs is {row.ratio(name):5.2f} times" if row.ours else ""))
        told = self.told()
        print("load {} to {}, {} s".format(*told["load"], told["seconds"]))
        if json_file is not None:
            json_file.write_text(json.dumps(told, indent=1) + "\n")


def shown(value: float) -> str:
    """Three digits that count."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")


def parser_of(what: str | None, rounds: int) -> argparse.ArgumentParser:
    """A bench's command line; what is peculiar to it is still to be added."""
    parser = argparse.ArgumentParser(description=what)
    add_options(parser, rounds)
    return parser


def adopt_daemons() -> None:
    """Daemons come to us when their parents end, and their CPU is ours to count."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


Measure = Callable[[Path, argparse.Namespace, Report], None]


def run_bench(parser: argparse.ArgumentParser, measure: Measure) -> None:
    """Measure in a directory for the bench alone, with caches and state of its own, and tell it."""
    options = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(dir=getattr(options, "work", None) or "/var/tmp") as work:
        os.environ["XDG_CACHE_HOME"] = f"{work}/cache"
        os.environ["XDG_STATE_HOME"] = f"{work}/state"
        measure(Path(work), options, report)
    report.finish(options.json)


def memory_of(pid: int, field: str) -> float:
    """MiB, of /proc's VmRSS or VmHWM; 0 when it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    return 0


def peak(pid: int) -> float:
    """The most memory that the process has had, in MiB."""
    return memory_of(pid, "VmHWM")


def _family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, tasks.read_text().split()):
                yield from _family(child)


def run_watched(command: list[object], **more: Any) -> float:
    """Run it to its end; MiB of the most memory that it and its children had at one time.

    What wait4 tells begins with what this process had when it made that one.  Raises
    CalledProcessError.
    """
    process, most = subprocess.Popen([str(word) for word in command], **more), 0.0
    while process.poll() is None:
        most = max(most, sum(memory_of(pid, "VmRSS") for pid in _family(process.pid)))
        time.sleep(0.02)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return most


def in_turn(peers: Mapping[str, Peer], number: int) -> list[tuple[str, Peer]]:
    """Who comes first meets memory that nobody used for a while: another one each round."""
    items, turn = list(peers.items()), number % max(1, len(peers))
    return items[turn:] + items[:turn]
