"""Is a mount dead?  Asked before mounting and after the end; imports nothing of FUSE."""

from __future__ import annotations

import errno
import os
import threading

PATIENCE_S = 2.0


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
