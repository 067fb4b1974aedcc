"""Which files are open on a server: not so many that it has no handles left for more.

OpenSSH's sftp-server may have as many as a process may have files, often 1024; a file whose handle
was given back opens again when it is next read, and is then checked to be the same.
"""

from __future__ import annotations

from typing import Protocol

MOST_OPEN = 200


class HasHandle(Protocol):
    """A file that may have a handle; `is_idle` when nothing is being asked of it."""

    @property
    def is_idle(self) -> bool: ...

    def let_go(self) -> None:
        """Give the handle back, without waiting for the server."""


class Handles:
    """The files of one connection that have handles, the one used last at the end."""

    def __init__(self, most: int = MOST_OPEN) -> None:
        self._most = most
        self._files: dict[HasHandle, None] = {}

    def used(self, file: HasHandle) -> None:
        """This file has a handle, and is about to use it: others may have to let go of theirs."""
        self._files.pop(file, None)
        self._files[file] = None
        if len(self._files) > self._most:
            for other in [f for f in self._files if f.is_idle and f is not file]:
                if len(self._files) <= self._most:
                    break
                del self._files[other]
                other.let_go()

    def forget(self, file: HasHandle) -> None:
        """It has no handle any more."""
        self._files.pop(file, None)
