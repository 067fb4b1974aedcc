"""When a layer's bytes changed last: the mtime of its file `data`, which is the disk's mtime.

Whatever changes the disk changes that file: a write, a copy, a punched hole, a new size.  The few
changes that do not touch it set its mtime themselves.  So the kernel keeps the time, also across a
kill, natively answered writes cost nothing for it, and nobody can set the ctime.  A new layer gets
the time of what it is taken of.

A power loss may take an mtime back: fdatasync does not force it out.  Where the layer was open for
writing then, the disk's mtime becomes the time when it is opened next.  Nothing else tells of that
but the directory: opening a layer for writing changes it, so if it has not changed since the
machine started, and nobody closed the layer, the machine went down with the layer open.
"""

from __future__ import annotations

import os
import time
from pathlib import Path


def set_mtime(fd: int, mtime_ns: int | None) -> None:
    """None: now.  Raises OSError."""
    if mtime_ns is None:
        os.utime(fd)
    else:
        os.utime(fd, ns=(os.fstat(fd).st_atime_ns, mtime_ns))


def is_certain(path: Path) -> bool:
    """Does the mtime of the layer's `data` tell of the last write?"""
    started_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    if (path / "closed").exists() or path.stat().st_mtime_ns >= started_ns:
        return True
    return (path / "data").stat().st_blocks == 0  # nothing was ever written


def changed_ns(path: Path) -> int:
    """The mtime of the disk whose top this layer is, which is not open for writing."""
    found = (path / "data").stat().st_mtime_ns
    return found if is_certain(path) else max(found, time.time_ns())
