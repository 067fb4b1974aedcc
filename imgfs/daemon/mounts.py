"""Mounts as the kernel knows them, and whether one is dead; imports nothing of FUSE."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

PATIENCE_S = 2.0
FSTYPE = "fuse.imgfs"
_MOST = 16  # mounts over each other at one place

#: st_dev of what this process has mounted
_served: set[int] = set()


@dataclass(frozen=True, slots=True)
class MountEntry:
    """A line of /proc/self/mountinfo."""

    device: int  #: st_dev of the files in it
    fstype: str
    options: frozenset[str]  #: of the filesystem, not of this mount of it


def mounted_at(path: str) -> MountEntry | None:
    """What is mounted at exactly this absolute path, on top; None when nothing is."""
    found = None
    wanted = os.fsencode(path)
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        words = line.split(b" ")
        if _unescaped(words[4]) == wanted:
            major, _, minor = words[2].partition(b":")
            after = words.index(b"-")
            options = os.fsdecode(words[after + 3]).split(",")
            found = MountEntry(
                os.makedev(int(major), int(minor)),
                os.fsdecode(words[after + 1]),
                frozenset(options),
            )
    return found


def _unescaped(name: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), name)


def is_dead(mountpoint: str) -> bool:
    """True when the process behind a FUSE mount at this path is gone.

    Never waits longer than 2 s: a live file system that does not answer is not dead.
    """
    found: list[int] = []

    def ask() -> None:
        # Not stat: the kernel may answer that from what it has cached.
        try:
            os.statvfs(mountpoint)
        except OSError as exc:
            found.append(exc.errno or 0)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE_S)
    return errno.ENOTCONN in found


def is_ours_and_dead(path: str) -> bool:
    """Is this user's imgfs mounted at the absolute path, and its process gone?"""
    entry = mounted_at(path)
    if entry is None or entry.fstype != FSTYPE:
        return False
    return f"user_id={os.getuid()}" in entry.options and is_dead(path)


def clear_dead(path: str) -> bool:
    """Unmount what `is_ours_and_dead` at the path; True when there was such a mount."""
    cleared = False
    for _ in range(_MOST):
        if not is_ours_and_dead(path):
            break
        detach(path)
        cleared = True
    return cleared


def detach(mountpoint: str) -> None:
    """Take the mount out of the tree, whatever is open in it; that stays open."""
    subprocess.run(
        ["fusermount3", "-u", "-z", "-q", "--", mountpoint],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=10,
    )


def serves(device: int) -> bool:
    """Does this process itself serve the files with this st_dev?"""
    return device in _served


def now_serves(device: int) -> None:
    """From now on this process serves the files with this st_dev; a number is not used twice."""
    _served.add(device)
