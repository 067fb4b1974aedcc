"""A directory on this machine: what is in it, and changing that."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import trio

from imgfs.sources.listing import Listed, Listing
from imgfs.sources.local.errors import CHANGES, DIRECTORIES, translated

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

        with translated(self.url + name, CHANGES):
            await trio.to_thread.run_sync(run)

    async def token(self) -> str | None:
        with translated(self.url, DIRECTORIES):
            found = await trio.to_thread.run_sync(os.stat, self.url)
        return f"{found.st_ino}:{found.st_mtime_ns}"

    def _files(self) -> list[Listed]:
        found = []
        with translated(self.url, DIRECTORIES), os.scandir(self.url) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # gone meanwhile
                    # Links are not followed, and other directories not looked at: they may
                    # lead into our own mount, which waits for this listing.
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_IFMT(status.st_mode) in _KINDS:
                        found.append(Listed(entry.name, entry.path, status.st_mtime_ns))
        return found
