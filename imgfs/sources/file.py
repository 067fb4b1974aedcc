"""Images on this machine: regular files and block devices."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import trio

from imgfs._native import _map
from imgfs.errors import (
    AccessDenied,
    ImgfsError,
    NotAnImage,
    ShortRead,
    SourceChanged,
    SourceNotFound,
    UsageError,
)
from imgfs.extents import ExtentList, all_data
from imgfs.mountstate import serves
from imgfs.sources.base import Identity, Source, SourceStat

_ERRORS: dict[int, tuple[type[ImgfsError], str]] = {
    errno.ENOENT: (SourceNotFound, "no such file"),
    errno.ENOTDIR: (SourceNotFound, "no such file"),
    errno.EACCES: (AccessDenied, "permission denied"),
    errno.EPERM: (AccessDenied, "permission denied"),
    errno.EISDIR: (NotAnImage, "is a directory; for all images in it write a / at its end"),
}


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        kind, text = _ERRORS.get(exc.errno or 0, (ImgfsError, exc.strerror or str(exc)))
        raise kind(f"{path}: {text}") from exc


def _identity(st: os.stat_result) -> Identity:
    token = f"{st.st_dev}:{st.st_ino}:{st.st_size}:{st.st_mtime_ns}:{st.st_ctime_ns}"
    return Identity("stat", token)


class FileSource(Source):
    """An open local file.  `fd` is this source's own, read-only; `map` shows all of it."""

    def __init__(self, path: str, fd: int, stat_: SourceStat, *, extents: bool) -> None:
        super().__init__(Path(path).name, path, stat_)
        self.fd = fd
        self._path = path
        self._want_extents = extents
        self._known: ExtentList | None = None
        self._scan = trio.Lock()
        self.store = _map.Store(fd, stat_.size, whole=True)

    async def check_identity(self) -> None:
        try:
            with _translated(self._path):
                now = await trio.to_thread.run_sync(os.stat, self._path)
        except SourceNotFound as exc:
            raise SourceChanged(f"{self._path}: was deleted; open it again") from exc
        if _identity(now) != self.stat.identity:
            raise SourceChanged(f"{self._path}: changed since it was opened; open it again")

    async def aclose(self) -> None:
        os.close(self.fd)

    async def _read(self, offset: int, length: int) -> bytes:
        with _translated(self._path):
            data = await trio.to_thread.run_sync(
                os.pread, self.fd, length, offset, abandon_on_cancel=True
            )
        if len(data) < length:
            await self.check_identity()
            raise ShortRead(f"{self._path}: ends at {offset + len(data)}, before its size")
        return data

    async def _extents(self, offset: int, length: int) -> ExtentList:
        async with self._scan:
            if self._known is None:
                self._known = await self._all_extents()
        return self._known.clip(offset, offset + length)

    async def _all_extents(self) -> ExtentList:
        if not self._want_extents or self.size == 0:
            return all_data(0, self.size)
        with _translated(self._path):
            ends, flags = await trio.to_thread.run_sync(_map.scan_file, self.fd, self.size)
        return ExtentList(0, ends, flags)


def _refuse_own(path: str) -> None:
    """Raises UsageError for a file that this process serves: it would wait for itself.

    Looked up, never opened: opening is what might wait.
    """
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if serves(os.fstat(fd).st_dev):
            raise UsageError(f"{path}: lies in this very mount")
    finally:
        os.close(fd)


def _open(path: str) -> tuple[int, os.stat_result, int]:
    _refuse_own(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        st = os.fstat(fd)
        if stat.S_ISDIR(st.st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a directory")
        if not (stat.S_ISREG(st.st_mode) or stat.S_ISBLK(st.st_mode)):
            raise NotAnImage(f"{path}: is neither a file nor a block device")
        return fd, st, os.lseek(fd, 0, os.SEEK_END)
    except BaseException:
        os.close(fd)
        raise


async def open_file(path: str, *, extents: bool = True) -> FileSource:
    """Open a local image read-only.

    Raises SourceNotFound, AccessDenied, NotAnImage, or UsageError when this process serves it
    itself.  The caller closes it with `aclose`.
    """
    path = str(Path(path).absolute())
    with _translated(path):
        fd, st, size = await trio.to_thread.run_sync(_open, path)
    found = SourceStat(
        size=size, mtime_ns=st.st_mtime_ns, mode=stat.S_IMODE(st.st_mode), identity=_identity(st)
    )
    return FileSource(path, fd, found, extents=extents)
