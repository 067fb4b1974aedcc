"""Which local images have their files open: not so many that none is left for anything else.

A file that nobody reads just now can be closed, and is opened again by its path, and checked to be
the same, when it is read next.  Those that were used last stay open.  A file that is read by the
fast path is not seen here: it is asked whether it was read before it is closed.
"""

from __future__ import annotations

import resource
from typing import Protocol

SHARE = 2  # at most this part of the descriptors that the process may have
MOST = 1000  # and never more: each takes memory of the kernel's
LEAST = 4
MOST_ASKED = 64  # how many are asked before one that was read just now is closed


class OpenFile(Protocol):
    """A file with a descriptor."""

    def rest(self, *, even_if_read: bool) -> bool:
        """Close the descriptor for now.  False where it is needed; or where it was read since this
        was asked last, unless `even_if_read`."""


class Descriptors:
    """The files that have descriptors, the one used last at the end."""

    def __init__(self) -> None:
        self._files: dict[OpenFile, None] = {}

    def __len__(self) -> int:
        return len(self._files)

    @property
    def most(self) -> int:
        """The limit of the process may be changed at any time, by prlimit(1)."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            return MOST
        return max(LEAST, min(MOST, soft // SHARE))

    def used(self, file: OpenFile) -> None:
        """This file has a descriptor: others may have to be closed."""
        self._files.pop(file, None)
        self._files[file] = None
        most = self.most
        if len(self._files) > most:
            self._close_down_to(most, spared=file)

    def forget(self, file: OpenFile) -> None:
        """It has no descriptor any more."""
        self._files.pop(file, None)

    def spare(self) -> bool:
        """There is none left: close half of them.  False when none can be closed."""
        before = len(self._files)
        self._close_down_to(before // 2)
        return len(self._files) < before

    def _close_down_to(self, most: int, spared: OpenFile | None = None) -> None:
        asked = 0
        for file in list(self._files):
            if len(self._files) <= most:
                break
            if file is spared:
                continue
            asked += 1
            del self._files[file]
            if not file.rest(even_if_read=asked > MOST_ASKED):
                self._files[file] = None


#: Of this process.
DESCRIPTORS = Descriptors()
