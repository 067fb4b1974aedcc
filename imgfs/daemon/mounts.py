"""Mounts as the kernel knows them, and whether one is dead; imports nothing of FUSE."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PATIENCE_S = 2.0
FSTYPE = "fuse.imgfs"
_MAX_LINKS = 40  # as the kernel has it

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
    for at, entry in _entries():
        if at == path:
            found = entry
    return found


def mounts_of(device: int, process: Path = Path("/proc/self")) -> list[str]:
    """Where the filesystem of this st_dev is mounted in the process's namespace, oldest first.

    Raises OSError when that cannot be read.
    """
    return [at for at, entry in _entries(process) if entry.device == device]


def _entries(process: Path = Path("/proc/self")) -> Iterator[tuple[str, MountEntry]]:
    """(mount point, entry), oldest first."""
    for line in (process / "mountinfo").read_bytes().splitlines():
        words = line.split(b" ")
        major, _, minor = words[2].partition(b":")
        after = words.index(b"-")
        options = os.fsdecode(words[after + 3]).split(",")
        yield (
            os.fsdecode(_unescaped(words[4])),
            MountEntry(
                os.makedev(int(major), int(minor)),
                os.fsdecode(words[after + 1]),
                frozenset(options),
            ),
        )


def resolved(text: str) -> str:
    """The absolute path of a mount point, symbolic links followed, without asking what is mounted
    there: that may be dead, or not answer."""
    path = _beside(Path(), text)
    for _ in range(_MAX_LINKS):
        if mounted_at(str(path)) is not None:
            break
        try:
            path = _beside(path.parent, str(path.readlink()))
        except OSError:  # no link, or nothing
            break
    return str(path)


def _beside(directory: Path, name: str) -> Path:
    """The path of a name as seen from a directory; only the last part may still be a link."""
    head, last = os.path.split(name.rstrip("/") or name)
    parent = Path(os.path.realpath(directory / head))
    if last in ("", os.curdir, os.pardir):
        return Path(os.path.realpath(parent / last))
    return parent / last


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
    try:
        asking.start()
    except RuntimeError:  # no thread can be had, and without one this might wait for ever
        return False
    asking.join(PATIENCE_S)
    return errno.ENOTCONN in found


def is_ours_and_dead(path: str) -> bool:
    """Is this user's imgfs mounted at the absolute path, and its process gone?"""
    entry = mounted_at(path)
    if entry is None or entry.fstype != FSTYPE:
        return False
    return f"user_id={os.getuid()}" in entry.options and is_dead(path)


def serves(device: int) -> bool:
    """Does this process itself serve the files with this st_dev?"""
    return device in _served


def now_serves(device: int) -> None:
    """From now on this process serves the files with this st_dev; a number is not used twice."""
    _served.add(device)
