"""Directories that stay: made durably, and recognized when they are not the same any more."""

from __future__ import annotations

import os
from pathlib import Path

from imgfs.errors import StateGone


def sync_directory(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        os.sync()  # of one that may be written and not read
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directories(path: Path) -> None:
    """The directory and what is missing above it, for this user alone; each name is durable.

    Raises OSError.
    """
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)
        sync_directory(each.parent)


class Place:
    """A directory by its path: the same for as long as there is something in it that counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: tuple[int, int] | None = None

    def check(self, *, counts: bool) -> None:
        """[blocks] Raises StateGone when it is not what it was at the first check.

        Unless what was in it `counts` another one may take its place.
        """
        try:
            found = self.path.stat()
            now = found.st_dev, found.st_ino
        except FileNotFoundError:
            now = None
        if now == self._known:
            return
        if self._known is not None and counts:
            raise gone(self.path, is_there=now is not None)
        self._known = now


def gone(path: Path, *, is_there: bool) -> StateGone:
    what = "is another one than" if is_there else "is not there any more, and was"
    return StateGone(
        f"{path}: {what} when it was mounted; bring that one back, or copy what is still shown of "
        "its snapshots and unmount"
    )
