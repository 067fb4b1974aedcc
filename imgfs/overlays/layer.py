"""One layer: a sparse file of bytes, the log that says which are the layer's, and a lock."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path

from imgfs._native import _map
from imgfs.errors import CorruptSnapshot, StateGone
from imgfs.overlays.closing import mark_closed, punch_stray, was_closed
from imgfs.overlays.locks import LayerLock
from imgfs.overlays.log import Batch, Kind, decode, encode, has_sums, header, write_all
from imgfs.overlays.places import gone, sync_directory
from imgfs.overlays.sums import QUIET_MS, Trust, attach_sums, mark_boot, trust_after_crash
from imgfs.overlays.times import changed_ns, set_mtime

log = logging.getLogger(__name__)

_COMPACT = 1 << 20  # bytes of a log that are not worth it
_SLACK = 4  # times as long as it need be
_SEALED = 16  # regions of 4 MiB that are sealed at once

#: a record's kind -> a map's
_IN_MAP = bytes((_map.ASK, _map.STORE, _map.ZERO)).ljust(256, b"\xff")
#: what is not the layer's any more its state says nothing of
_IN_STATE = bytes.maketrans(bytes((_map.BELOW,)), bytes((_map.ASK,)))

#: starts, ends and kinds (_map.STORE, _map.ZERO or _map.BELOW, a byte each) of ranges in bytes
Ranges = tuple["array[int]", "array[int]", bytes]


def is_blank(map: _map.SegmentMap) -> bool:
    """Is all of it ASK?"""
    kinds = (kind for _, _, kind, _ in map.segments(0, map.size))
    return len(map) <= 1 and all(kind == _map.ASK for kind in kinds)


class Layer:
    """An open layer.  Its methods wait for the disk; one thread at a time, but for `store`.

    `state` says of each byte STORE (the layer's, in `store`), ZERO, or ASK (what is below says).
    """

    def __init__(self, path: Path, data: int, log: int, lock: LayerLock, *, writable: bool) -> None:
        """For `open_layer` only."""
        self.path = path
        self.data = data
        self.lock = lock
        self._file = log
        self._holders, self._guard = 1, threading.Lock()
        self._when_closed: Callable[[Layer], None] | None = None
        self._sealing = threading.Lock()
        content = path.joinpath("log").read_bytes()
        batches, end, size = decode(content, str(path / "log"))
        room, last = len(content), len(batches)
        longest = max((batch.size for batch in batches), default=0)
        self.store = _map.Store(data, max(size, longest), whole=True)
        self.state = _map.SegmentMap(size)
        self.is_writable = False
        self._cover(content, end, is_fresh=not batches, writable=writable)
        self._times = 0, 0
        self._least_mtime_ns = 0
        del content  # it is as large as all the rest
        batches.reverse()
        while batches:
            self._apply(batches.pop())
        #: native commits append to it; whoever changes the layer where these may come holds it
        self.log = _map.Log(log, self.store, self.state, end, room, last)
        if os.fstat(data).st_size < self.size:
            raise CorruptSnapshot(f"{path / 'data'}: is shorter than the disk of {self.size} bytes")
        self.store.resize(self.size)

    def _cover(self, content: bytes, end: int, *, is_fresh: bool, writable: bool) -> None:
        """Let what is read of `data` be compared with its sums."""
        self.closed = was_closed(self.path, content, end)
        self._had_sums = has_sums(content)
        size = None if self.closed is None else self.closed.sums_size
        if is_fresh or size is not None:
            self.trust = Trust.STRICT
        else:
            self.trust = trust_after_crash(self.path, had_sums=self._had_sums)
        if self._had_sums or writable:
            make = not self._had_sums
            attach_sums(self.path, self.store, self.trust, size=size, writable=writable, make=make)

    @property
    def size(self) -> int:
        """Bytes of the disk, as the log says."""
        return self.log.size

    @property
    def is_empty(self) -> bool:
        """Does it change nothing of what is below?"""
        return is_blank(self.state)

    @property
    def commits(self) -> int:
        """Another number after each of them."""
        return self.log.sequence

    def ranges(self) -> Ranges:
        """All that is the layer's."""
        return self.state.ranges()

    def times(self) -> tuple[int, int]:
        """When the disk changed last whose top this is, and the same as ctime; see times.py."""
        with self._guard:
            if self._holders:
                found = os.fstat(self.data)
                self._times = max(found.st_mtime_ns, self._least_mtime_ns), found.st_ctime_ns
            return self._times

    def set_mtime(self, mtime_ns: int | None) -> None:
        """None: now.  Raises OSError."""
        set_mtime(self.data, mtime_ns)

    def resize(self, size: int) -> None:
        """Make `data` as long, and drop what lies beyond.

        The log hears of growth at `commit`, and of shrinking before, so that `data` is never
        shorter than it says.
        """
        with self._sealing:
            is_cut = size < self.store.size
            if is_cut:
                self.store.before_cut(size)
            if size < self.size:
                self._append(size, (array("Q"), array("Q"), b""))
            self.store.resize(size)
            if is_cut:
                self.store.cut_sums(size)
            os.ftruncate(self.data, size)

    def commit(self, ranges: Ranges, size: int) -> None:
        """Make the ranges durable, whose bytes have been written: the fsync of a snapshot.

        Of those that are BELOW the bytes in `data` may be given back afterwards.

        Raises OSError; then nothing has changed that a later commit does not mend.
        """
        if self.log.is_lost:
            raise OSError(
                errno.EIO, "what was written may be lost since the disk failed; open it anew"
            )
        try:
            os.fdatasync(self.data)
        except OSError:
            # Linux tells of it once, and takes the pages for clean from then on.
            self.log.mark_lost()
            raise
        if ranges[0] or size != self.size:
            self._append(size, ranges)

    def drop(self, start: int, end: int) -> None:
        """The range is what is below from now on."""
        self._append(self.size, (array("Q", (start,)), array("Q", (end,)), bytes((_map.ASK,))))

    def check_place(self) -> None:
        """Raises StateGone when its files were removed, moved or replaced, and OSError."""
        for name, fd in (("data", self.data), ("log", self._file)):
            try:
                is_there = os.path.samestat((self.path / name).stat(), os.fstat(fd))
            except FileNotFoundError:
                raise gone(self.path, is_there=False) from None
            if not is_there:
                raise gone(self.path, is_there=True)

    def _is_in_place(self) -> bool:
        try:
            self.check_place()
        except StateGone:
            return False
        return True

    @property
    def is_removed(self) -> bool:
        """Has one of its files no name any more, and cannot come back?"""
        return not all(os.fstat(fd).st_nlink for fd in (self.data, self._file))

    def _append(self, size: int, ranges: Ranges) -> None:
        starts, ends, kinds = ranges
        self.log.append(size, starts, ends, kinds.translate(_IN_STATE))
        # A native commit leaves a log that is this long to us.
        is_long = self.log.end > _COMPACT and self.log.end > _SLACK * 24 * len(self.state)
        if is_long and self._is_in_place():
            try:
                self._compact()
            except OSError:
                # A full disk: it stays as long as it is.  If it was replaced, and only its name
                # could not be forced out, nobody knows which of the two a crash leaves.
                if self.path.joinpath("log").stat().st_ino != os.fstat(self._file).st_ino:
                    self.log.mark_lost()

    def _apply(self, batch: Batch) -> None:
        if self.state.size != batch.size:
            self.state.resize(batch.size)
        starts, ends, kinds = batch.columns()
        self.state.set_ranges(starts, ends, kinds.translate(_IN_MAP), self.store)

    def _compact(self) -> None:
        """Say all that the log says in one batch."""
        records = array("Q")
        for start, end, kind in zip(*self.ranges(), strict=True):
            records.extend((start, end, Kind.DATA if kind == _map.STORE else Kind.ZERO))
        content = header(self.size) + encode(Batch(1, self.size, records))
        fd = _write_new(self.path / "log", content)
        os.close(self._file)
        self._file = fd
        self.log.replace(fd, len(content))

    def seal_some(self, quiet_ms: int = QUIET_MS) -> bool:
        """Give sums to a part of what has not been written for a while; False: there is none.

        Nobody who writes is kept waiting.  Raises OSError.
        """
        with self._sealing:
            return self.is_writable and self.store.seal(quiet_ms, _SEALED) > 0

    def _seal(self) -> None:
        """Give sums to all that is the layer's, and make them durable."""
        with self._sealing:
            if self.trust != Trust.STRICT:
                for start, end, kind in zip(*self.ranges(), strict=True):
                    if kind == _map.STORE:
                        self.store.renew_sums(start, end - start)
            while self.store.seal(0, _SEALED):
                pass
            if not self.store.is_sealed:
                raise OSError(errno.EBUSY, "it is being written")
            self.store.sync_sums()

    def mark_closed(self, *, is_whole: bool = True) -> None:
        """Nothing is written to it any more: whether something was damaged later can be seen.

        Raises nothing: without this it is as good as after a kill.
        """
        self.is_writable = False
        with contextlib.suppress(OSError):
            self.log.cut()
        try:
            self.check_place()
            self._seal()
            os.fsync(self.data)  # what was sealed, and its mtime
            if not self._had_sums:
                self._compact()
            mark_closed(self.path, self._file, self.log.end, is_whole=is_whole)
            self.store.sums_done()
        except (StateGone, FileNotFoundError):
            pass  # it was deleted
        except (OSError, CorruptSnapshot) as exc:
            log.warning("%s: its checksums are not complete: %s", self.path, exc)
        if self.store.accepted:
            log.warning(
                "%s: %d blocks of 4 KiB do not fit their checksums; it was written when the "
                "machine went down, so they were taken as they are",
                self.path / "data",
                self.store.accepted,
            )

    def unlock(self) -> None:
        """Others may write it from now on."""
        self.lock.close()

    def hold(self) -> bool:
        """One more is to close it, of those who only read it.  False: it is closed, or its files
        are not what they were when it was opened."""
        with self._guard:
            if not self._holders or self.is_writable or self.log.is_lost or not self._is_current():
                return False
            self._holders += 1
            return True

    def when_closed(self, tell: Callable[[Layer], None]) -> bool:
        """`tell` is called when the last who holds it closes it; False: it is closed already."""
        with self._guard:
            self._when_closed = tell
            return self._holders > 0

    def _is_current(self) -> bool:
        if not self._is_in_place():
            return False
        # Another batch of a merge would stand there.
        return not os.pread(self._file, 8, self.log.end).strip(b"\0")

    def close(self, *, is_whole: bool = True) -> None:
        """Not whole: there are bytes that the log does not tell of, and the next opening is to give
        back their space."""
        with self._guard:
            self._holders -= 1
            if self._holders:
                return
            tell = self._when_closed
        if tell is not None:
            tell(self)
        if self.is_writable and not self.log.is_lost:
            self.mark_closed(is_whole=is_whole)
        os.close(self.data)
        os.close(self._file)
        self.lock.close()


def stored_bytes(path: Path) -> int:
    """What the layer's bytes take on disk."""
    return (path / "data").stat().st_blocks * 512


def make_layer(path: Path, size: int, mtime_ns: int | None = None) -> None:
    """A new one that changes nothing of a disk of `size` bytes, whose mtime is that, or now.

    As durable as `layer_files` are.
    """
    path.mkdir(mode=0o700)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    for name, content in (("data", b""), ("sums", b""), ("log", header(size))):
        fd = os.open(path / name, flags, 0o600)
        try:
            write_all(fd, content, 0)
            if name == "data":
                os.ftruncate(fd, size)
                set_mtime(fd, mtime_ns)
        finally:
            os.close(fd)


def layer_files(path: Path) -> list[Path]:
    """What of a new layer is to be forced out: of what is empty its name is enough."""
    return [path / "data", path / "log", path]


def open_layer(path: Path, *, writable: bool = False, alone: bool = True) -> Layer:
    """With `alone` nobody else may have open what is writable, nor write what is not.

    Raises CorruptSnapshot, Busy when another has it open so, and OSError.
    """
    data = batches = -1
    lock = LayerLock(path, writes=writable and alone)
    try:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        try:
            data = os.open(path / "data", flags)
            batches = os.open(path / "log", flags)
        except FileNotFoundError as exc:
            raise CorruptSnapshot(f"{exc.filename}: is missing") from None
        layer = Layer(path, data, batches, lock, writable=writable)
        changed = changed_ns(path)
        layer._least_mtime_ns = changed  # another one than the file's after a power loss
        if writable:
            layer.log.cut()  # a torn batch is not to be read with a next one behind
            if layer.trust != Trust.DOUBT:
                mark_boot(path)
            if layer.closed is not None:
                (path / "closed").unlink()
                sync_directory(path)  # what it says is not so any more
            else:
                os.utime(path)  # times.py: it is open from now on
            if layer.closed is None or not layer.closed.is_whole:
                punch_stray(data, layer.state, layer.store)
            if os.fstat(data).st_size > layer.size:
                os.ftruncate(data, layer.size)  # if it grows these bytes are not to be seen
            if os.fstat(data).st_mtime_ns != changed:
                layer.set_mtime(changed)
            layer._least_mtime_ns = 0
            layer.is_writable = True
        return layer
    except BaseException:
        for fd in (data, batches):
            if fd >= 0:
                os.close(fd)
        lock.close()
        raise


def _write_new(path: Path, content: bytes, others: Iterable[Path] = ()) -> int:
    """Put a file of this content in the place of what is there; durable, and the others before.

    Returns it, open.
    """
    fresh = path.with_name(path.name + ".new")
    fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, content, 0)
        _sync(fd, others)
        fresh.rename(path)
        sync_directory(path.parent)
    except BaseException:
        os.close(fd)
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    return fd


def _sync(fd: int, others: Iterable[Path]) -> None:
    """Force out this file, and those files and directories."""
    with contextlib.ExitStack() as stack:
        fds = [fd]
        for path in others:
            fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            stack.callback(os.close, fds[-1])
        for each in fds:
            # Begins to write: so the file system's journal has all in one turn, not in many.
            os.posix_fadvise(each, 0, 0, os.POSIX_FADV_DONTNEED)
        for each in fds:
            os.fsync(each)


def replace_file(path: Path, content: bytes, others: Iterable[Path] = ()) -> None:
    """As `_write_new`, closed."""
    os.close(_write_new(path, content, others))
