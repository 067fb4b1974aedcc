"""Files that no directory names, for as long as they are open."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from imgfs.daemon.processes import REFUSED


def nameless(name: str) -> int:
    """The descriptor of an empty file in memory; where memfd_create(2) is refused, on disk.

    Either way the link of it below /proc ends with what `link_end` says.
    """
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC)
    except OSError as exc:
        if exc.errno not in REFUSED:
            raise
    with tempfile.TemporaryDirectory(prefix="imgfs-") as private:  # 0700
        path = Path(private, f"memfd:{name}")
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def link_end(name: str) -> str:
    return f"/memfd:{name} (deleted)"
