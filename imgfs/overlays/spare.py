"""Room on a full disk for the list of snapshots without one that is deleted."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from imgfs.overlays.log import write_all

_BYTES = 64 << 10


def keep_spare(directory: Path) -> None:
    """See that there is some, as far as that can be had.  Raises nothing."""
    path = directory / "spare"
    with contextlib.suppress(OSError):
        if not path.exists() and (directory / "base").exists():
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                write_all(fd, bytes(_BYTES), 0)
            finally:
                os.close(fd)


def give_up_spare(directory: Path) -> None:
    with contextlib.suppress(OSError):
        (directory / "spare").unlink(missing_ok=True)
