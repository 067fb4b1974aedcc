"""Where the cache lives on disk: one directory a source, each locked by the process that uses it.

    ROOT/lock                       held while directories are made or removed
    ROOT/NAME-DIGEST/lock           held for as long as a process uses the directory
    ROOT/NAME-DIGEST/source         JSON: of which source, in which state, all the rest is; the
                                    identity is null when it is of no use to a later mount;
                                    `checksum` is of all else in it
    ROOT/NAME-DIGEST/blocks         the block store, a sparse file addressed by the source's offsets
    ROOT/NAME-DIGEST/checks         what is known of each block (kept.py)
    ROOT/NAME-DIGEST/extents        the source's extent map (kept.py)

A second process that wants the same source gets `NAME-DIGEST.2`, and so on: two never share one.
Only the first is kept, and only for a source that has an identity; `source` is written when all
else is empty, so that what is under another identity is never taken for this one's.  And all
checksums of the other files depend on what `source` says (`_key_of`): what is another directory's,
or of another state of the source, is good for nothing here.

A directory whose `source` is damaged, or of another version, is emptied when it is used next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import pwd
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgfs.cache.entries import SIZE as ENTRY_SIZE
from imgfs.checksums import seed_of
from imgfs.errors import CacheError
from imgfs.sources.base import Source, WritableSource

log = logging.getLogger(__name__)

VERSION = 2
BLOCK = 64 << 10  #: bytes
_SHARE = 10  # by default at most this part of the free disk
_MOST = 10 << 30
_MOST_USERS = 1000
_FILES = ("source", "extents", "checks", "blocks")  # the first says of what the rest is
# What may be made of whole seconds: many web servers' ETags are.
_IN_SECONDS = frozenset({"sftp", "modified", "etag", "weak-etag"})
_AGE_S = 2


def cache_root() -> Path:
    """$CACHE_DIRECTORY (systemd's), $XDG_CACHE_HOME/imgfs or ~/.cache/imgfs; not made yet."""
    given = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    home = os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
    return Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache") / "imgfs"


def make_root() -> Path:
    """The root, made 0700 when it is not there.  Raises CacheError."""
    root = cache_root()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise CacheError(f"{root}: the cache cannot be kept there: {exc.strerror}") from exc
    return root


def default_limit(root: Path) -> int:
    """Bytes: 10 GiB or a tenth of the free disk, the less."""
    disk = os.statvfs(root)
    return min(_MOST, disk.f_bavail * disk.f_frsize // _SHARE)


@dataclass(frozen=True, slots=True)
class CacheDirectory:
    """A directory that is ours until `close`.  `blocks` and `checks` are open for both ways.

    `key` is of what `source` says (64 bits), and in the checksums of all else.
    """

    path: Path
    key: int
    blocks: int
    checks: int
    is_kept: bool  #: whether a later mount may use what is in it
    _lock: int
    _used_ns: int | None = None  #: when it was used last, if we do not use it but look at it

    def close(self) -> None:
        """Let it go, and remove it when it is not kept."""
        if self.is_kept:
            used_ns = time.time_ns() if self._used_ns is None else self._used_ns
            with contextlib.suppress(OSError):
                os.utime(self.path, ns=(used_ns, used_ns))  # what goes first is told by it
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        for fd in (self.blocks, self.checks, self._lock):
            os.close(fd)


def directory_name(source: Source) -> str:
    """Of its directory below the root, when nobody else has that."""
    digest = hashlib.sha256(source.url.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    plain = (c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in source.name)
    return f"{''.join(plain)[:80]}-{digest}"


def open_directory(root: Path, source: Source, *, is_kept: bool | None = None) -> CacheDirectory:
    """A directory for the source; what is in it is of this source in this state.

    `is_kept` is what `is_exact` said when the source was opened; None: it was opened just now.
    Raises CacheError.
    """
    if is_kept is None:
        is_kept = is_exact(source)
    try:
        with _root_lock(root):
            return _first_free(root, directory_name(source), source, is_kept)
    except OSError as exc:
        raise CacheError(f"{root}: no cache for {source.name}: {exc.strerror}") from exc


@dataclass(frozen=True, slots=True)
class Entry:
    """A directory as `list_entries` finds it."""

    path: Path
    about: dict[str, Any]  #: what `source` says; nothing when it is damaged
    used: int  #: bytes on disk
    last_used: float  #: seconds since the epoch; of one in use: now
    in_use: bool


def list_entries(root: Path) -> list[Entry]:
    """All directories below the root, the one used last first.  Raises nothing."""
    entries = []
    with contextlib.suppress(OSError):
        for path in root.iterdir():
            with contextlib.suppress(OSError):
                lock = _lock(path / "lock", make=False)
                if lock is not None:
                    os.close(lock)
                used = sum(each.stat().st_blocks * 512 for each in path.iterdir())
                last = path.stat().st_mtime if lock is not None else time.time()
                entries.append(Entry(path, _about(path), used, last, lock is None))
    return sorted(entries, key=lambda entry: -entry.last_used)


def open_existing(entry: Entry) -> CacheDirectory | None:
    """The directory as it is, for looking at, which is not using it; None when a process uses it.

    Raises OSError.
    """
    lock = _lock(entry.path / "lock", make=False)
    if lock is None:
        return None
    fds = [lock]
    try:
        used_ns = entry.path.stat().st_mtime_ns
        for name in ("blocks", "checks"):
            fds.append(os.open(entry.path / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return CacheDirectory(entry.path, _key_of(entry.about), fds[1], fds[2], True, lock, used_ns)


def remove(root: Path, path: Path) -> bool:
    """Remove a directory of the cache; False when a process uses it.  Raises OSError."""
    with _root_lock(root):
        lock = _lock(path / "lock", make=False)
        if lock is None:
            return False
        try:
            shutil.rmtree(path)
        finally:
            os.close(lock)
    return True


def sweep(root: Path) -> None:
    """Remove what processes that are gone have left and nobody can use.  Raises nothing."""
    for entry in list_entries(root):
        if not entry.in_use and not _may_be_used(entry):
            with contextlib.suppress(OSError):
                remove(root, entry.path)


def _may_be_used(entry: Entry) -> bool:
    return bool(entry.about) and entry.about["identity"] is not None


def _about(path: Path) -> dict[str, Any]:
    """What `source` says; nothing when that is damaged, or of another version."""
    try:
        data = (path / "source").read_bytes()
        found = json.loads(data)
        del found["checksum"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if data == _encode(found) and found["version"] == VERSION else {}


def _encode(about: dict[str, Any]) -> bytes:
    return json.dumps({**about, "checksum": f"{_key_of(about):016x}"}).encode() + b"\n"


def _key_of(about: dict[str, Any]) -> int:
    return seed_of("cache", json.dumps(about))


def _lock(path: Path, *, make: bool) -> int | None:
    """An fd that holds the lock; None when somebody else does.  Raises OSError."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
    fd = os.open(path, flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def _root_lock(root: Path) -> Iterator[None]:
    # Between making a directory and locking it a sweep would take it for a dead one's.
    fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _first_free(root: Path, base: str, source: Source, is_kept: bool) -> CacheDirectory:
    for number in range(1, _MOST_USERS):
        path = root / (base if number == 1 else f"{base}.{number}")
        path.mkdir(mode=0o700, exist_ok=True)
        lock = _lock(path / "lock", make=True)
        if lock is None:
            continue
        if number > 1:
            log.warning("%s: another process has its cache; this one is not kept", source.name)
        try:
            return _opened(path, lock, source, is_kept=is_kept and number == 1)
        except BaseException:
            os.close(lock)
            raise
    raise OSError(errno.EBUSY, "too many processes use it")


def _opened(path: Path, lock: int, source: Source, *, is_kept: bool) -> CacheDirectory:
    identity = source.stat.identity if is_kept else None
    about = {
        "version": VERSION,
        "url": source.url,
        "identity": identity and [identity.kind, identity.token],
        "size": source.size,
        "block": BLOCK,
    }
    fds: list[int] = []
    try:
        is_new = not any((path / name).exists() for name in _FILES)
        if not is_kept or _about(path) != about:
            for name in _FILES:
                (path / name).unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        for name, size in (
            ("blocks", source.size),
            ("checks", ENTRY_SIZE * -(-source.size // BLOCK)),
        ):
            fds.append(os.open(path / name, flags, 0o600))
            os.truncate(fds[-1], size)
        if not (path / "source").exists():
            # Nothing that was there before can come back with a crash where nothing was.
            _write(path / "source", _encode(about), synced=not is_new)
        return CacheDirectory(path, _key_of(about), fds[0], fds[1], is_kept, lock)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def is_exact(source: Source) -> bool:
    """Can two states of the source be told apart?  Whole seconds cannot while they last.

    Of one that we write ourselves nothing is kept: what is recorded would have to be taken back,
    durably, before each write.
    """
    if isinstance(source, WritableSource) and source.is_writable:
        return False
    identity = source.stat.identity
    if identity is None:
        return False
    age_s = time.time() - source.stat.mtime_ns / 1e9
    return identity.kind not in _IN_SECONDS or age_s >= _AGE_S


def _write(path: Path, data: bytes, *, synced: bool) -> None:
    """The file is there whole or not at all, and, if synced, not before what is beside it now."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        if synced:
            os.fsync(file.fileno())
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    new.replace(path)
