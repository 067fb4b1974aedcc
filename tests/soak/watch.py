"""What the mount's process holds: sampled while all rests, and judged at the end."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

MIB = 1 << 20
#: Memory may rise so much from the end of the warm-up on, of which allocators take some.
MOST_RISE = 10 * MIB
MOST_RISE_SHARE = 0.10
MOST_MEMORY = 400 * MIB
MORE_FDS = 8  # connections that were asked for in one moment, and not in another
ENOUGH = 6  # samples, to tell a slope


@dataclass(frozen=True)
class Sample:
    seconds: float
    anonymous: int  #: bytes of memory that is nobody's file
    resident: int
    fds: int
    kinds: dict[str, int]  #: of the fds
    threads: int
    cached: int  #: bytes on disk in the cache
    steps: int


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def children(pid: int) -> dict[int, str]:
    """Pids and states."""
    found = {}
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, tasks.read_text().split()):
            found[child] = status_of(child)["State"]
    return found


def fds_of(pid: int) -> Counter[str]:
    """By what they are: files by their names."""
    kinds: Counter[str] = Counter()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:
            continue
        kinds[target.rpartition("/")[2] if target.startswith("/") else target.split(":")[0]] += 1
    return kinds


def allocated(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def sample(pid: int, seconds: float, cache: Path, steps: int) -> Sample:
    status, kinds = status_of(pid), fds_of(pid)
    return Sample(
        seconds=seconds,
        anonymous=int(status["RssAnon"].split()[0]) << 10,
        resident=int(status["VmRSS"].split()[0]) << 10,
        fds=kinds.total(),
        kinds=dict(kinds),
        threads=int(status["Threads"]),
        cached=allocated(cache),
        steps=steps,
    )


def slope(samples: Sequence[Sample]) -> float:
    """Bytes of memory a second: the median of all pairs' (Theil and Sen), which outliers leave
    alone."""
    return statistics.median(
        (b.anonymous - a.anonymous) / (b.seconds - a.seconds) for a, b in combinations(samples, 2)
    )


def judged(samples: Sequence[Sample]) -> list[str]:
    """What is wrong with them.  A quarter of the run warms it up."""
    wrong = []
    warm = [each for each in samples if each.seconds >= samples[-1].seconds / 4]
    most = max(each.resident for each in samples)
    if most > MOST_MEMORY:
        wrong.append(f"{most / MIB:.0f} MiB of memory")
    if len(warm) >= ENOUGH:
        rise = slope(warm) * (warm[-1].seconds - warm[0].seconds)
        allowed = max(MOST_RISE, MOST_RISE_SHARE * warm[0].anonymous)
        if rise > allowed:
            wrong.append(f"memory rose by {rise / MIB:.1f} MiB, of {allowed / MIB:.1f} allowed")
    half = len(warm) // 2 or 1
    before, after = (max(each.fds for each in part) for part in (warm[:half], warm[-half:]))
    if after > before + MORE_FDS:
        wrong.append(f"{after} fds, after {before}: {samples[-1].kinds}")
    return wrong
