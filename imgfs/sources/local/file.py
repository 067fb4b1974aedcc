"""Images on this machine: regular files and block devices, read and written."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import trio

from imgfs._native import _map
from imgfs.daemon.mounts import serves
from imgfs.errors import (
    NotAnImage,
    NotDurable,
    ShortRead,
    SourceChanged,
    SourceNotFound,
    UnsupportedFeature,
    UsageError,
)
from imgfs.extents import ExtentList, all_data
from imgfs.image import Buffer
from imgfs.sources.base import Identity, SourceStat, WritableSource
from imgfs.sources.local.errors import FILES, translated

ZEROES = 1 << 20  # bytes that are written at once where no hole can be made
SECTOR = 4096  # a device punches whole ones only; this is the longest that there are


def _identity(st: os.stat_result) -> Identity:
    token = f"{st.st_dev}:{st.st_ino}:{st.st_size}:{st.st_mtime_ns}:{st.st_ctime_ns}"
    return Identity("stat", token)


class FileSource(WritableSource):
    """An open local file.  `fd` is this source's own."""

    def __init__(
        self,
        path: str,
        fd: int,
        stat_: SourceStat,
        *,
        extents: bool,
        write: bool,
        among_others: bool,
        is_device: bool,
    ) -> None:
        super().__init__(Path(path).name, path, stat_)
        self.fd = fd
        self.is_writable = write
        self.is_resizable = not is_device
        self.can_punch = True
        self._path = path
        self._want_extents = extents
        self._known: ExtentList | None = None
        self._scan = trio.Lock()
        self._is_writing = among_others
        self._store = _map.Store(fd, stat_.size, whole=True)

    @property
    def store(self) -> _map.Store:
        """All of it, at its size now."""
        if self._store.size != self.size:
            self._store = _map.Store(self.fd, self.size, whole=True)
        return self._store

    def is_same_file(self, other: FileSource) -> bool:
        """Do both lead to the same bytes, of a file or a device?"""
        one, two = os.fstat(self.fd), os.fstat(other.fd)
        if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(two.st_mode):
            return one.st_rdev == two.st_rdev
        return os.path.samestat(one, two)

    @property
    def identity_anywhere(self) -> Identity | None:
        # A filesystem that several machines share has another device number on each.
        identity = self.stat.identity
        return identity and Identity(identity.kind, identity.token.partition(":")[2])

    @property
    def takes_several(self) -> bool:
        """A device is this machine's own, as far as is known."""
        return self.is_resizable

    @property
    def file_token(self) -> str:
        found = os.fstat(self.fd)
        return f"{found.st_dev}:{found.st_ino}"

    async def check_identity(self) -> None:
        known = self.stat
        try:
            with translated(self._path, FILES):
                now = await trio.to_thread.run_sync(os.stat, self._path)
        except SourceNotFound as exc:
            raise SourceChanged(f"{self._path}: was deleted; open it again") from exc
        is_other = not os.path.samestat(now, os.fstat(self.fd))
        # While this was asked writes of our own may have begun, or ended and been pinned.
        is_quiet = not self._is_writing and self.stat is known
        if is_other or (is_quiet and _identity(now) != known.identity):
            raise SourceChanged(f"{self._path}: changed since it was opened; open it again")

    async def begin_writing(self) -> None:
        await self.check_identity()
        self._is_writing = True

    async def pin(self) -> None:
        await self.check_identity()
        now = os.fstat(self.fd)
        if self.is_resizable and not self.knows_size:
            self.size, self.knows_size = now.st_size, True
        if self.is_resizable and now.st_size != self.size:
            said = f"has {now.st_size} bytes, and {self.size} were written"
            raise SourceChanged(f"{self._path}: {said}; open it again")
        mode = stat.S_IMODE(now.st_mode)
        self.stat = SourceStat(self.size, now.st_mtime_ns, mode, _identity(now))
        self._is_writing = False

    async def aclose(self) -> None:
        os.close(self.fd)

    async def _read(self, offset: int, length: int) -> bytes:
        with translated(self._path, FILES):
            data = await trio.to_thread.run_sync(
                os.pread, self.fd, length, offset, abandon_on_cancel=True
            )
        if len(data) < length:
            await self.check_identity()
            raise ShortRead(f"{self._path}: ends at {offset + len(data)}, before its size")
        return data

    async def _write(self, offset: int, data: Buffer) -> None:
        self._known = None
        with translated(self._path, FILES):
            await trio.to_thread.run_sync(_pwrite, self.fd, data, offset)

    async def _zero(self, offset: int, length: int) -> None:
        self._known = None
        end = offset + length
        start, stop = offset, end
        if not self.is_resizable:
            start, stop = offset + -offset % SECTOR, end - end % SECTOR
            if start >= stop:
                start = stop = end
        await self._write_zeroes(offset, start)
        if start < stop:
            try:
                await trio.to_thread.run_sync(self.store.punch, start, stop - start)
            except OSError as exc:
                # Not every filesystem has holes, and not every device.
                if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    with translated(self._path, FILES):
                        raise
                await self._write_zeroes(start, stop)
        await self._write_zeroes(stop, end)

    async def _write_zeroes(self, start: int, end: int) -> None:
        zeroes = memoryview(bytes(min(end - start, ZEROES)))
        for at in range(start, end, ZEROES):
            await self._write(at, zeroes[: end - at])

    async def _resize(self, size: int) -> None:
        if not self.is_resizable:
            raise UnsupportedFeature(f"{self._path}: a device's size cannot be changed")
        self._known = None
        with translated(self._path, FILES):
            await trio.to_thread.run_sync(os.ftruncate, self.fd, size)

    async def _flush(self) -> None:
        try:
            await trio.to_thread.run_sync(os.fdatasync, self.fd, abandon_on_cancel=True)
        except OSError as exc:
            raise NotDurable(f"{self._path}: cannot be synced: {exc.strerror}") from exc

    async def _extents(self, offset: int, length: int) -> ExtentList:
        async with self._scan:
            if self._known is None:
                self._known = await self._all_extents()
        return self._known.clip(offset, offset + length)

    async def _all_extents(self) -> ExtentList:
        if not self._want_extents or self.size == 0:
            return all_data(0, self.size)
        with translated(self._path, FILES):
            ends, flags = await trio.to_thread.run_sync(_map.scan_file, self.fd, self.size)
        return ExtentList(0, ends, flags)


def _pwrite(fd: int, data: Buffer, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        if done == 0:
            raise OSError(errno.ENOSPC, "the end of the device")
        view, offset = view[done:], offset + done


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


def _open(path: str, access: int) -> tuple[int, os.stat_result, int]:
    _refuse_own(path)
    fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
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


async def open_file(
    path: str, *, extents: bool = True, write: bool = False, among_others: bool = False
) -> FileSource:
    """Open a local image, read-only unless `write`; `among_others`: who write it meanwhile.

    Raises SourceNotFound, AccessDenied, ReadOnlyView, NotAnImage, or UsageError when this process
    serves it itself.  The caller closes it with `aclose`.
    """
    path = str(Path(path).absolute())
    with translated(path, FILES):
        fd, st, size = await trio.to_thread.run_sync(
            _open, path, os.O_RDWR if write else os.O_RDONLY
        )
    found = SourceStat(
        size=size, mtime_ns=st.st_mtime_ns, mode=stat.S_IMODE(st.st_mode), identity=_identity(st)
    )
    is_device = stat.S_ISBLK(st.st_mode)
    return FileSource(
        path,
        fd,
        found,
        extents=extents,
        write=write,
        among_others=among_others,
        is_device=is_device,
    )
