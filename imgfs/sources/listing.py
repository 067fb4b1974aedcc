"""Directories of images: what is in one, and whether that is still so."""

from __future__ import annotations

import contextlib
import os
import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import trio

from imgfs.errors import AccessDenied, ImgfsError, NotAnImage, SourceNotFound


@dataclass(frozen=True, slots=True)
class Listed:
    """A file in a directory; `name` has surrogates for what is not UTF-8."""

    name: str
    url: str  #: as `open_source` takes it
    mtime_ns: int = field(compare=False)


class Listing(ABC):
    """A directory whose files are images, or plain files.  `url` is shown."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    async def files(self) -> list[Listed]:
        """Its regular files and block devices, in no order.

        Raises SourceNotFound, AccessDenied, NotAnImage (it is no directory), SourceUnreachable.
        """

    @abstractmethod
    async def token(self) -> str | None:
        """Something that differs when the directory changed; None: not known.  Raises as above."""


_KINDS = (stat.S_IFREG, stat.S_IFBLK, stat.S_IFLNK)


class LocalListing(Listing):
    """A directory on this machine."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{Path(path).absolute()}/")

    async def files(self) -> list[Listed]:
        return await trio.to_thread.run_sync(self._files)

    async def token(self) -> str | None:
        try:
            found = await trio.to_thread.run_sync(os.stat, self.url)
        except OSError as exc:
            raise _translated(self.url, exc) from exc
        return f"{found.st_ino}:{found.st_mtime_ns}"

    def _files(self) -> list[Listed]:
        found = []
        try:
            with os.scandir(self.url) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):  # gone meanwhile
                        # Links are not followed, and other directories not looked at: they may
                        # lead into our own mount, which waits for this listing.
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_IFMT(status.st_mode) in _KINDS:
                            found.append(Listed(entry.name, entry.path, status.st_mtime_ns))
        except OSError as exc:
            raise _translated(self.url, exc) from exc
        return found


def _translated(path: str, exc: OSError) -> ImgfsError:
    if isinstance(exc, FileNotFoundError):
        return SourceNotFound(f"{path}: no such directory")
    if isinstance(exc, NotADirectoryError):
        return NotAnImage(f"{path}: is not a directory")
    if isinstance(exc, PermissionError):
        return AccessDenied(f"{path}: permission denied")
    return ImgfsError(f"{path}: {exc.strerror}")
