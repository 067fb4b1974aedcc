"""Unmounting by whatever this machine and this user can do it with, and who else has a mount.

root, and the owner of a user namespace, call umount2(2).  Everybody else needs fusermount3, which
is set-uid; libfuse looks for it in a directory of its own before PATH, and so does this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imgfs.daemon.mounts import is_ours_and_dead, mounted_at, mounts_of

_MAX_STACKED = 16  # mounts over each other at one place
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8  # umount2(2)
_DIRECTORIES = ("/usr/bin", "/bin", "/usr/local/bin", "/usr/sbin", "/sbin")
_CALL_UMOUNT2 = """\
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.umount2(os.fsencode(sys.argv[1]), int(sys.argv[2])):
    sys.exit(os.strerror(ctypes.get_errno()))
"""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process whose mount namespace, not ours, has the mount too."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.name})"


def fusermount() -> str | None:
    """The path of fusermount3; None when it is not installed."""
    search = os.pathsep.join((os.environ.get("PATH", os.defpath), *_DIRECTORIES))
    return shutil.which("fusermount3", path=search)


def unmount(path: str, timeout_s: float) -> str | None:
    """Unmount what is on top at the absolute path, unless it is in use.

    Return why that failed, in a line; None when it is done.  A live mount whose process does not
    answer may keep the call from returning: it is made by another process, so that this one can
    go on.  Raises TimeoutError when it takes longer than `timeout_s`.
    """
    helper = fusermount()
    command = [helper, "-u", "--", path] if helper else _umount2_command(path)
    try:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    if done.returncode == 0:
        return None
    return done.stderr.strip().rpartition("\n")[2] or "cannot be unmounted"


def _umount2_command(path: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", _CALL_UMOUNT2, path, str(UMOUNT_NOFOLLOW)]


def detach(path: str) -> None:
    """Take the mount on top at the path out of the tree; what is open in it stays open.

    Raises nothing: where it cannot be done the mount stays.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), MNT_DETACH | UMOUNT_NOFOLLOW) == 0:
        return
    helper = fusermount()
    if ctypes.get_errno() != errno.EPERM or helper is None:
        return
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(
            [helper, "-u", "-z", "-q", "--", path],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10,
        )


def clear_dead(path: str) -> bool:
    """Unmount what `is_ours_and_dead` at the path; True when there was such a mount."""
    cleared = False
    for _ in range(_MAX_STACKED):
        if not is_ours_and_dead(path):
            break
        detach(path)
        cleared = True
    return cleared


def detach_device(device: int, *, only_dead: bool = False) -> None:
    """Detach every mount of this st_dev, wherever it was moved or bound to in our namespace.

    What was mounted over it is another's, and stays; so does the mount below, then.  With
    `only_dead` a live mount stays: the kernel gives the number of a device that is gone to others.
    """
    for path in reversed(mounts_of(device)):
        entry = mounted_at(path)
        is_on_top = entry is not None and entry.device == device
        if is_on_top and (not only_dead or is_ours_and_dead(path)):
            detach(path)


def holders(device: int) -> list[Holder]:
    """One process of each other mount namespace that has a mount of this st_dev.

    Of other users' processes only root can tell.
    """
    seen = {_namespace(Path("/proc/self"))}
    found = []
    for process in _processes():
        namespace = _namespace(process)
        if namespace is None or namespace in seen:
            continue
        seen.add(namespace)
        with contextlib.suppress(OSError):
            if mounts_of(device, process):
                name = (process / "comm").read_text(errors="replace").strip()
                found.append(Holder(int(process.name), name))
    return found


def _processes() -> Iterator[Path]:
    """Ascending: the first of a container's processes is most often its main one."""
    yield from sorted(
        (each for each in Path("/proc").iterdir() if each.name.isdecimal()),
        key=lambda each: int(each.name),
    )


def _namespace(process: Path) -> str | None:
    try:
        return str((process / "ns/mnt").readlink())
    except OSError:
        return None
