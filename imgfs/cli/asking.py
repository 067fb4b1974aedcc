"""Asking a mount for its status, without waiting for one whose process does not answer.

Each question has a process of its own.  A thread would not do: once the mount has taken its
request the kernel lets nobody go who waits for the answer, not even at SIGKILL, and a process
cannot end before its threads have.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import time
from pathlib import Path
from typing import NoReturn

from imgfs.errors import DeadMount, MountError, NoThread
from imgfs.status.rates import Look

PATIENCE_S = 5.0
_MOST_FD = 1 << 16


class Asking:
    """Asks a mount for its status, or another file of .imgfs, one question at a time.

    For a process without threads.
    """

    def __init__(self, mountpoint: str, name: str = "status.json") -> None:
        self._mountpoint = mountpoint
        self._name = name
        self._asked: tuple[int, int] | None = None  #: the process, and the pipe that it writes to

    @property
    def is_asking(self) -> bool:
        return self._asked is not None

    @property
    def fds(self) -> list[int]:
        """What becomes readable when there is an answer to take; nothing when none is owed."""
        return [] if self._asked is None else [self._asked[1]]

    def ask(self) -> None:
        """Ask, unless the mount still owes an answer."""
        if self._asked is None:
            answer, write_end = os.pipe()
            try:
                pid = os.fork()
            except OSError as exc:
                os.close(answer)
                os.close(write_end)
                raise NoThread(f"no process can be started: {exc.strerror}") from None
            if pid == 0:
                _tell(Path(self._mountpoint) / ".imgfs" / self._name, write_end)
            os.close(write_end)
            self._asked = pid, answer

    def take(self) -> Look:
        """The answer that there is.  Raises MountError when the mount is not alive."""
        return self._look(*self.take_text())

    def take_text(self) -> tuple[int, bytes]:
        """The answer that there is: errno, and what is in the file."""
        assert self._asked is not None
        (pid, answer), self._asked = self._asked, None
        with os.fdopen(answer, "rb") as file:
            number, _, text = file.read().partition(b"\n")
        os.waitpid(pid, 0)
        return int(number or errno.EIO), text

    def wait(self) -> Look:
        """[blocks] The answer; raises MountError also when there is none for 5 s."""
        self.ask()
        if not select.select(self.fds, [], [], PATIENCE_S)[0]:
            raise MountError(
                f"{self._mountpoint}: its process does not answer; to take it away without waiting "
                f"run: fusermount3 -uz {self._mountpoint}"
            )
        return self.take()

    def close(self) -> None:
        """Give the question up; who waits for the answer ends when the mount does."""
        if self._asked is not None:
            (pid, answer), self._asked = self._asked, None
            os.kill(pid, signal.SIGKILL)
            os.close(answer)

    def _look(self, number: int, text: bytes) -> Look:
        if number:
            if number in (errno.ENOTCONN, errno.ECONNABORTED):  # the other: while it was asked
                said = f"its process has ended; run: fusermount3 -u {self._mountpoint}"
                raise DeadMount(f"{self._mountpoint}: {said}")
            what = "is not a live imgfs mount"
            if number == errno.EACCES:
                what = "permission denied"
            raise MountError(f"{self._mountpoint}: {what}")
        try:
            status = json.loads(text)
        except ValueError:
            status = None
        if not isinstance(status, dict) or not isinstance(status.get("images"), dict):
            raise MountError(f"{self._mountpoint}: is not a live imgfs mount")
        return Look(status, time.monotonic())


def _tell(path: Path, out: int) -> NoReturn:
    """In a process of its own: write errno and a line end, then what is in the file."""
    try:
        # Whoever reads our output must not wait for this process.
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.closerange(3, out)
        os.closerange(out + 1, _MOST_FD)
        try:
            answer = b"0\n" + path.read_bytes()
        except OSError as exc:
            answer = b"%d\n" % (exc.errno or errno.EIO)
        with os.fdopen(out, "wb") as file:
            file.write(answer)
    finally:
        os._exit(0)
