"""Directories of images: what is in one, and whether that is still so."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from imgfs.errors import (
    AccessDenied,
    AlreadyThere,
    ImgfsError,
    NoSpace,
    NotAnImage,
    ReadOnlyView,
    SourceNotFound,
)


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

    # Changing it.  Names are as in `Listed`, and none of these follows a link.

    is_writable = False

    async def create(self, name: str) -> None:
        """A new empty file.  Raises AlreadyThere, NoSpace, and as `files` does."""
        raise ReadOnlyView(f"{self.url}{name}: cannot be created")

    async def unlink(self, name: str) -> None:
        """Raises SourceNotFound, and as `files` does."""
        raise ReadOnlyView(f"{self.url}{name}: cannot be removed")

    async def rename(self, name: str, new_name: str, *, replace: bool) -> None:
        """Raises SourceNotFound; AlreadyThere without `replace`; and as `files` does."""
        raise ReadOnlyView(f"{self.url}{name}: cannot be renamed")


_KINDS = (stat.S_IFREG, stat.S_IFBLK, stat.S_IFLNK)


class LocalListing(Listing):
    """A directory on this machine."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{Path(path).absolute()}/")

    is_writable = True

    async def files(self) -> list[Listed]:
        return await trio.to_thread.run_sync(self._files)

    async def create(self, name: str) -> None:
        def work(path: str) -> None:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))

        await self._change(name, work)

    async def unlink(self, name: str) -> None:
        await self._change(name, os.unlink)

    async def rename(self, name: str, new_name: str, *, replace: bool) -> None:
        def work(path: str) -> None:
            old, new = Path(path), Path(self.url + new_name)
            if replace:
                old.rename(new)
            else:
                os.link(old, new, follow_symlinks=False)
                old.unlink()

        await self._change(name, work)

    async def _change(self, name: str, work: Callable[[str], None]) -> None:
        """Do it with the file's path, durably."""

        def run() -> None:
            work(self.url + name)
            directory = os.open(self.url, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

        try:
            await trio.to_thread.run_sync(run)
        except OSError as exc:
            kind, text = _CHANGES.get(exc.errno or 0, (ImgfsError, exc.strerror))
            raise kind(f"{self.url}{name}: {text}") from exc

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


_CHANGES: dict[int, tuple[type[ImgfsError], str]] = {
    errno.EEXIST: (AlreadyThere, "is there already"),
    errno.ENOENT: (SourceNotFound, "no such file"),
    errno.EACCES: (AccessDenied, "permission denied"),
    errno.EPERM: (AccessDenied, "permission denied"),
    errno.EROFS: (ReadOnlyView, "lies on a read-only filesystem"),
    errno.ENOSPC: (NoSpace, "no space is left on its disk"),
}


def _translated(path: str, exc: OSError) -> ImgfsError:
    if isinstance(exc, FileNotFoundError):
        return SourceNotFound(f"{path}: no such directory")
    if isinstance(exc, NotADirectoryError):
        return NotAnImage(f"{path}: is not a directory")
    if isinstance(exc, PermissionError):
        return AccessDenied(f"{path}: permission denied")
    return ImgfsError(f"{path}: {exc.strerror}")
