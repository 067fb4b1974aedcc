"""Images on this machine: regular files and block devices, read and written.

A file that is not read has no descriptor for long, if many others are: see descriptors.py.  It is
opened again by its path, and is a changed source if that leads to another state by then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import trio

from imgfs._native import _map
from imgfs.daemon.mounts import serves
from imgfs.errors import (
    AccessDenied,
    NotAnImage,
    NotDurable,
    NotPermitted,
    ShortRead,
    SourceChanged,
    SourceNotFound,
    UnsupportedFeature,
    UsageError,
    is_out_of_files,
)
from imgfs.extents import ExtentList, all_data
from imgfs.image import Buffer
from imgfs.locks import Lock
from imgfs.sources.base import Identity, SourceStat, WritableSource
from imgfs.sources.local.descriptors import DESCRIPTORS
from imgfs.sources.local.errors import FILES, translated

ZEROES = 1 << 20  # bytes that are written at once where no hole can be made
SECTOR = 4096  # a device punches whole ones only; this is the longest that there are
MOST_SCANNED = 64 << 30  # bytes of a file whose extents are asked for when it is opened
CLOSE_S = 2.0  # how long closing waits for who reads


def _identity(st: os.stat_result) -> Identity:
    token = f"{st.st_dev}:{st.st_ino}:{st.st_size}:{st.st_mtime_ns}:{st.st_ctime_ns}"
    return Identity("stat", token)


Result = TypeVar("Result")


class Opened(NamedTuple):
    """A descriptor, and what it leads to."""

    fd: int
    stat: os.stat_result
    size: int
    extents: ExtentList | None = None


class FileSource(WritableSource):
    """A local file.  `store` has its only descriptor, which comes and goes."""

    def __init__(
        self, path: str, opened: Opened, *, extents: bool, write: bool, among_others: bool
    ) -> None:
        """The descriptor remains the caller's."""
        found = opened.stat
        super().__init__(Path(path).name, path, _source_stat(found, opened.size))
        self.is_writable = write
        self._is_device = stat.S_ISBLK(found.st_mode)
        self.is_resizable = not self._is_device
        self.can_punch = True
        #: does somebody need the descriptor itself, and no other of what is under the path then?
        self.is_needed: Callable[[], bool] = lambda: False
        self._file = found.st_dev, found.st_ino
        self._device = found.st_rdev if self._is_device else None
        self._path = path
        self._want_extents = extents
        self._known = opened.extents
        self._scan = Lock()
        self._waking = Lock()
        self._users = 0
        self._is_writing = among_others
        self._outlives_name = self._is_kept = False
        self._is_closed = False
        self._cut = opened.size  # what lies behind it may be away by our own doing
        self._seen = 0
        self._store = _map.Store(opened.fd, opened.size, whole=True)
        DESCRIPTORS.used(self)

    @property
    def store(self) -> _map.Store:
        """All of it, at its size now."""
        if self._store.size != self.size:
            self._store.resize(self.size)
        return self._store

    def is_same_file(self, other: FileSource) -> bool:
        """Do both lead to the same bytes, of a file or a device?"""
        if self._device is not None and other._device is not None:
            return self._device == other._device
        return self._file == other._file

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[int]:
        """The descriptor, for as long as the block runs.  Raises SourceChanged."""
        self._users += 1
        try:
            await self._wake()
            yield self._store.fileno()
        finally:
            self._users -= 1

    def rest(self, *, even_if_read: bool) -> bool:
        """Close the descriptor for now; False where it is needed."""
        served = self._store.bytes_served
        was_read, self._seen = served != self._seen, served
        if self._is_kept or self.is_nameless:
            return False  # its path leads elsewhere, or will
        if self._users or self._is_writing or self.is_needed() or (was_read and not even_if_read):
            return False
        return self._store.detach()

    async def _wake(self) -> None:
        """See that there is a descriptor.  Raises SourceChanged when the path leads elsewhere."""
        if self._store.fileno() < 0:
            async with self._waking:
                if self._is_closed:
                    raise SourceChanged(f"{self._path}: changed since it was opened; open it again")
                if self._store.fileno() < 0:
                    await self._open_again()
        DESCRIPTORS.used(self)

    async def _open_again(self) -> None:
        with self._gone_is_changed():
            opened = await _open_for_sure(self._path, write=self.is_writable)
        try:
            if _identity(opened.stat) != self.stat.identity or opened.size != self.size:
                raise SourceChanged(f"{self._path}: changed since it was opened; open it again")
            with translated(self._path, FILES):
                _for_sure(partial(self._store.attach, opened.fd))
        finally:
            os.close(opened.fd)

    @contextlib.contextmanager
    def _gone_is_changed(self) -> Iterator[None]:
        try:
            yield
        except SourceNotFound as exc:
            raise SourceChanged(f"{self._path}: was deleted; open it again") from exc

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
        return "{}:{}".format(*self._file)

    async def check_identity(self) -> None:
        known = self.stat
        now = None if self.is_nameless else await self._found()
        if now is None:
            async with self.opened() as fd:
                now = os.fstat(fd)
        # While this was asked writes of our own may have begun, or ended and been pinned.
        is_quiet = not self._is_writing and self.stat is known
        if is_quiet and self.is_nameless:
            self._forgive_ctime(now)
        if is_quiet and _identity(now) != self.stat.identity:
            raise SourceChanged(f"{self._path}: changed since it was opened; open it again")

    async def _found(self) -> os.stat_result | None:
        """What it is by its name; None: it has none any more, and goes on without.

        Raises SourceChanged if the name leads elsewhere, unless the file is open and outlives it.
        """
        path = self._path
        try:
            with self._gone_is_changed(), translated(path, FILES):
                found = await trio.to_thread.run_sync(os.stat, path)
            if (found.st_dev, found.st_ino) == self._file:
                return found
            raise SourceChanged(f"{path}: changed since it was opened; open it again")
        except SourceChanged:
            fd = self._store.fileno()
            if not self._outlives_name or fd < 0:
                raise
            if path == self._path and not self.is_nameless:
                await self.lost_name()
                self._forgive_ctime(os.fstat(fd))
            return None

    def _forgive_ctime(self, now: os.stat_result) -> None:
        """It is another one after the file was renamed, or a name of it removed."""
        if (now.st_size, now.st_mtime_ns) == (self.stat.size, self.stat.mtime_ns):
            self.stat = replace(self.stat, identity=_identity(now), ctime_ns=now.st_ctime_ns)

    def outlive_name(self) -> None:
        self._outlives_name = True

    async def keep(self) -> None:
        self._is_kept = True
        await self._wake()

    async def moved(self, url: str) -> None:
        self._path = self.url = url
        self.name = Path(url).name
        self.is_nameless = self._is_kept = False

    async def lost_name(self) -> None:
        self.is_nameless = True

    async def begin_writing(self) -> None:
        await self.check_identity()
        self._is_writing = True

    async def pin(self) -> None:
        await self.check_identity()
        async with self.opened() as fd:
            now = os.fstat(fd)
        if self.is_resizable and not self.knows_size:
            self.size, self.knows_size = now.st_size, True
        if self.is_resizable and now.st_size != self.size:
            said = f"has {now.st_size} bytes, and {self.size} were written"
            raise SourceChanged(f"{self._path}: {said}; open it again")
        self.stat = _source_stat(now, self.size)
        self._is_writing = False

    @property
    def keeps_mtime(self) -> bool:
        return self.is_resizable  # a device's node tells nothing of its bytes

    async def set_mtime(self, mtime_ns: int | None) -> None:
        def work(fd: int) -> None:
            if mtime_ns is None:
                os.utime(fd)
            else:
                os.utime(fd, ns=(os.fstat(fd).st_atime_ns, mtime_ns))

        try:
            async with self.opened() as fd:
                with translated(self._path, FILES):
                    await trio.to_thread.run_sync(work, fd)
        except AccessDenied as exc:
            raise NotPermitted(f"{self._path}: only its owner may set its times") from exc

    async def aclose(self) -> None:
        """Close it for good: who reads it still gets SourceChanged."""
        self._is_closed = True
        DESCRIPTORS.forget(self)
        if not self._store.detach():
            with trio.move_on_after(CLOSE_S):
                await trio.to_thread.run_sync(self._store.quiesce, abandon_on_cancel=True)
            self._store.detach()

    async def _read(self, offset: int, length: int) -> bytes:
        while True:
            await self._wake()
            try:
                return await trio.to_thread.run_sync(
                    self.store.read, offset, length, abandon_on_cancel=True
                )
            except OSError as exc:
                if self._store.fileno() < 0:
                    continue  # it was closed meanwhile
                self._refuse_cut(exc, offset + length)
                with translated(self._path, FILES):
                    raise

    def _refuse_cut(self, exc: OSError, end: int) -> None:
        """Raises SourceChanged when a read failed because somebody has cut the file."""
        if exc.errno != errno.EIO or self._is_device:
            return
        with contextlib.suppress(OSError):
            size = os.fstat(self._store.fileno()).st_size
            if size < min(end, self._cut):
                said = f"was cut to {size} bytes while it was open; open it again"
                raise SourceChanged(f"{self._path}: {said}")
            if size < end:
                raise ShortRead(f"{self._path}: ends at {size}, before its size")

    async def _write(self, offset: int, data: Buffer) -> None:
        self._known = None
        self._cut = max(self._cut, offset + len(data))
        async with self.opened() as fd:
            with translated(self._path, FILES):
                await trio.to_thread.run_sync(_pwrite, fd, data, offset)

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
                async with self.opened():
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
        self._cut = min(self._cut, size)
        async with self.opened() as fd:
            with translated(self._path, FILES):
                await trio.to_thread.run_sync(os.ftruncate, fd, size)
        self._cut = size

    async def _flush(self) -> None:
        async with self.opened() as fd:
            try:
                await trio.to_thread.run_sync(os.fdatasync, fd, abandon_on_cancel=True)
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
        known = self.stat
        async with self.opened() as fd:
            with translated(self._path, FILES):
                ends, flags, now = await trio.to_thread.run_sync(_scan, fd, self.size)
        # Behind the end of a file that was cut all seems to be a hole.
        is_quiet = not self._is_writing and self.stat is known
        is_cut = not self._is_device and now.st_size < min(self.size, self._cut)
        if is_cut or (is_quiet and _identity(now) != known.identity):
            raise SourceChanged(f"{self._path}: changed since it was opened; open it again")
        return ExtentList(0, ends, flags)


def _source_stat(found: os.stat_result, size: int) -> SourceStat:
    mode = stat.S_IMODE(found.st_mode)
    return SourceStat(size, found.st_mtime_ns, mode, _identity(found), found.st_ctime_ns)


def _scan(fd: int, size: int) -> tuple[array[int], bytes, os.stat_result]:
    """[blocks] The extents, and what the file was after they had been looked at."""
    ends, flags = _map.scan_file(fd, size)
    return ends, flags, os.fstat(fd)


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


def _open(path: str, access: int, scan: bool) -> Opened:
    _refuse_own(path)
    fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        st = os.fstat(fd)
        if stat.S_ISDIR(st.st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a directory")
        if not (stat.S_ISREG(st.st_mode) or stat.S_ISBLK(st.st_mode)):
            raise NotAnImage(f"{path}: is neither a file nor a block device")
        size, extents = os.lseek(fd, 0, os.SEEK_END), None
        if scan and 0 < size <= MOST_SCANNED and stat.S_ISREG(st.st_mode):
            # All of it is asked for next, and two turns of a thread would cost more.
            ends, flags, after = _scan(fd, size)
            if _identity(after) == _identity(st):
                extents = ExtentList(0, ends, flags)
        return Opened(fd, st, size, extents)
    except BaseException:
        os.close(fd)
        raise


def _for_sure(take: Callable[[], Result]) -> Result:
    """Do what takes a descriptor, if need be in place of one that was not used for longest."""
    try:
        return take()
    except OSError as exc:
        if not is_out_of_files(exc) or not DESCRIPTORS.spare():
            raise
        return take()


async def _open_for_sure(path: str, *, write: bool, scan: bool = False) -> Opened:
    """Open it, if need be in place of what was not used for longest."""
    access = os.O_RDWR if write else os.O_RDONLY
    with translated(path, FILES):
        try:
            return await trio.to_thread.run_sync(_open, path, access, scan)
        except OSError as exc:
            if not is_out_of_files(exc) or not DESCRIPTORS.spare():
                raise
            return await trio.to_thread.run_sync(_open, path, access, scan)


async def open_file(
    path: str, *, extents: bool = True, write: bool = False, among_others: bool = False
) -> FileSource:
    """Open a local image, read-only unless `write`; `among_others`: who write it meanwhile.

    Raises SourceNotFound, AccessDenied, ReadOnlyView, NotAnImage, or UsageError when this process
    serves it itself.  The caller closes it with `aclose`.
    """
    path = str(Path(path).absolute())
    opened = await _open_for_sure(path, write=write, scan=extents and not write)
    try:
        with translated(path, FILES):
            make = partial(
                FileSource, path, opened, extents=extents, write=write, among_others=among_others
            )
            return _for_sure(make)
    finally:
        os.close(opened.fd)
