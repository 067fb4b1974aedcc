"""Who has a layer open: many processes to read it, or one to write it.

The locks are fcntl's, on each layer's file `lock`: the kernel tells which process stands in the
way, and one can go from writing to reading in a step.  But a process loses them as soon as it
closes any descriptor of the file: so each file is opened once, here, for all who hold it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

from imgfs.errors import LayerHeld

_FLOCK = struct.Struct("@hhqqi4x")  # struct flock of fcntl(2), with 64-bit offsets


@dataclass(slots=True)
class _File:
    fd: int
    readers: int = 0
    has_writer: bool = False


_files: dict[str, _File] = {}
_guard = threading.Lock()


class LayerLock:
    """A layer is held until `close`; it can be called again."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        """Raises LayerHeld, which says who holds it in a way that forbids this, and OSError."""
        self._path = path
        self._key = str(path / "lock")
        self._writes = writes
        self._is_held = False
        with _guard:
            file = _files.get(self._key)
            if file is not None and (file.has_writer or writes):
                raise _held(path, "writing" if file.has_writer else "reading", os.getpid())
            if file is None:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                file = _File(os.open(self._key, flags, 0o600))
            try:
                self._take(file.fd)
            except BaseException:
                if self._key not in _files:
                    os.close(file.fd)
                raise
            _files[self._key] = file
            file.has_writer = writes
            file.readers += not writes
        self._is_held = True

    def _take(self, fd: int) -> None:
        operation = fcntl.LOCK_EX if self._writes else fcntl.LOCK_SH
        try:
            fcntl.lockf(fd, operation | fcntl.LOCK_NB)
        except OSError as exc:
            if exc.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise _held(self._path, *_holder(fd, fcntl.F_WRLCK)) from None

    def only_read(self) -> None:
        """Who wrote it does so no more; others may read it too."""
        with _guard:
            if self._is_held and self._writes:
                file = _files[self._key]
                fcntl.lockf(file.fd, fcntl.LOCK_SH)
                file.has_writer, file.readers = False, 1
                self._writes = False

    def is_ours_alone(self) -> bool:
        """Does no other process hold it at this moment?"""
        with _guard:
            _, pid = _holder(_files[self._key].fd, fcntl.F_WRLCK)
            return pid is None

    def close(self) -> None:
        with _guard:
            if not self._is_held:
                return
            self._is_held = False
            file = _files[self._key]
            if self._writes:
                file.has_writer = False
            else:
                file.readers -= 1
            if not file.readers and not file.has_writer:
                del _files[self._key]
                os.close(file.fd)


def _holder(fd: int, wanted: int) -> tuple[str, int | None]:
    """What another process does that forbids the lock, and its id; 0 if we cannot see that one.

    None: there is none.
    """
    asked = _FLOCK.pack(wanted, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    if kind == fcntl.F_UNLCK:
        return "reading", None
    return "writing" if kind == fcntl.F_WRLCK else "reading", max(0, pid)


def _held(path: Path, what: str, pid: int | None) -> LayerHeld:
    return LayerHeld(str(path), what, f"process {pid}" if pid else "another process")
