"""How much memory this process may have, and how much of that it takes for bytes on their way.

What is in force is the least of: the machine's memory, the limits of the control groups that the
process is in and of those above them (version 2: memory.max and memory.high; version 1:
memory.limit_in_bytes), and RLIMIT_AS and RLIMIT_DATA.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20
MOST = 40 * MIB  # so that all of the process stays below 128 MiB
LEAST = 8 * MIB
MACHINE_SHARE = 16  # the part of the machine's memory
GROUP_SHARE = 4  # of a control group's
ADDRESS_SHARE = 4  # of the addresses that are left, which libraries and stacks need, too
LIBRARIES = 64 * MIB  # addresses that what is loaded later takes

_FILES = {"cgroup2": ("memory.max", "memory.high"), "cgroup": ("memory.limit_in_bytes",)}


def bound(proc: Path = Path("/proc")) -> int:
    """Bytes that may be on their way, read ahead, or waiting to be written; at most MOST."""
    shares = [MOST, _machine() // MACHINE_SHARE]
    shares += [limit // GROUP_SHARE for limit in group_limits(proc)]
    shares += [left // ADDRESS_SHARE for left in _addresses_left(proc)]
    return max(LEAST, min(shares))


def _machine() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _addresses_left(proc: Path) -> Iterator[int]:
    for limit, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            used = re.search(rf"{field}:\s*(\d+) kB", _text(proc / "self/status"))
            yield max(0, soft - int(used[1] if used else 0) * 1024 - LIBRARIES)


def group_limits(proc: Path = Path("/proc")) -> Iterator[int]:
    """The limits of the process's control groups, and of all above them."""
    paths = dict(_groups(_text(proc / "self/cgroup")))
    for line in _text(proc / "self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        words, (kind, _, options) = before.split(" "), after.split(" ", 2)
        path = paths.get(kind)
        if path is None or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        root, top = _plain(words[3]), Path(_plain(words[4]))
        # In a container the mount may show only a part, or another one than where we are.
        inside = path[len(root.rstrip("/")) :] if path.startswith(root.rstrip("/")) else "/"
        directory = top / inside.lstrip("/")
        for each in (directory, *directory.parents):
            for name in _FILES[kind]:
                text = _text(each / name).strip()
                if text.isdecimal():
                    yield int(text)
            if each == top:
                break


def _groups(text: str) -> Iterator[tuple[str, str]]:
    """By the kind of mount: the process's path; see cgroups(7)."""
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            yield "cgroup2", path
        elif "memory" in controllers.split(","):
            yield "cgroup", path


def _plain(name: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), name)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape")
    except (OSError, ValueError):
        return ""
