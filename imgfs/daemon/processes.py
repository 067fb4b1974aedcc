"""Waiting for the end of a process, whoever's child it is."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from pathlib import Path

import trio

POLL_S = 0.2
REFUSED = (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP)


class Watched:
    """The process that had this number when this was made; close it.

    Where a sandbox refuses pidfd_open(2) it is looked at now and then.
    """

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError when there is none; other OSErrors: no descriptor is left."""
        self._pid = pid
        self._fd = -1
        self._started = b""
        try:
            self._fd = os.pidfd_open(pid)
        except OSError as exc:
            if exc.errno not in REFUSED:
                raise
            self._started, _ = _look(pid)

    def has_ended(self) -> bool:
        """Also when its parent has not asked for its status yet."""
        if self._fd >= 0:
            return self._is_readable(0)
        try:
            started, is_over = _look(self._pid)
        except ProcessLookupError:
            return True
        return is_over or started != self._started

    def _is_readable(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def wait_for(self, seconds: float) -> bool:
        """[blocks] For its end, at most so long; returns whether it has ended."""
        if self._fd >= 0:
            return self._is_readable(seconds)
        by = time.monotonic() + seconds
        while not self.has_ended():
            if time.monotonic() >= by:
                return False
            time.sleep(POLL_S)
        return True

    def send(self, number: int) -> None:
        """A signal, unless it has ended.  Raises OSError."""
        with contextlib.suppress(ProcessLookupError):
            if self._fd >= 0:
                signal.pidfd_send_signal(self._fd, number)
            elif not self.has_ended():
                os.kill(self._pid, number)

    async def wait(self) -> None:
        """For its end."""
        if self._fd >= 0:
            await trio.lowlevel.wait_readable(self._fd)
            return
        while not self.has_ended():
            await trio.sleep(POLL_S)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _look(pid: int) -> tuple[bytes, bool]:
    """When it was started, which tells it from a later one, and whether it is only a status by now.

    Raises ProcessLookupError.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        raise ProcessLookupError from None
    # proc(5) counts from 1, and the third is the first behind the name.
    fields = text[text.rindex(b")") + 2 :].split()
    return fields[22 - 3], fields[0] in (b"Z", b"X")
