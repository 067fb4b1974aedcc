"""Where the cache lives on disk: one directory a source, each locked by the process that uses it.

    ROOT/lock                       held while directories are made or swept
    ROOT/NAME-DIGEST/lock           held for as long as a process uses the directory
    ROOT/NAME-DIGEST/source         which source it is: its URL, its identity
    ROOT/NAME-DIGEST/blocks         the block store, a sparse file addressed by the source's offsets

A second process that wants the same source gets `NAME-DIGEST.2`, and so on: two never share one.
What a process that died has left is removed by the next `sweep`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pwd
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imgfs.errors import CacheError
from imgfs.sources.base import Source

_SHARE = 10  # by default at most this part of the free disk
_MOST = 10 << 30
_MOST_USERS = 1000


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
    """A directory that is ours until `close`; `blocks` is open for reading and writing."""

    path: Path
    blocks: int
    _lock: int

    def close(self) -> None:
        """Remove it and let it go.  What others still hold of the block store stays readable."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.blocks)
        os.close(self._lock)


def open_directory(root: Path, source: Source) -> CacheDirectory:
    """A directory for the source, with an empty block store of its size.

    Raises CacheError.
    """
    digest = hashlib.sha256(source.url.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    plain = (c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in source.name)
    try:
        with _root_lock(root):
            return _first_free(root, f"{''.join(plain)[:80]}-{digest}", source)
    except OSError as exc:
        raise CacheError(f"{root}: no cache for {source.name}: {exc.strerror}") from exc


def sweep(root: Path) -> None:
    """Remove the directories of processes that are gone.  Raises nothing."""
    with contextlib.suppress(OSError), _root_lock(root):
        for path in root.iterdir():
            with contextlib.suppress(OSError):
                lock = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(lock)


@contextlib.contextmanager
def _root_lock(root: Path) -> Iterator[None]:
    # Between making a directory and locking it a sweep would take it for a dead one's.
    fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _first_free(root: Path, base: str, source: Source) -> CacheDirectory:
    for number in range(1, _MOST_USERS):
        path = root / (base if number == 1 else f"{base}.{number}")
        path.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _fill(path, lock, source)
        except BaseException as exc:
            os.close(lock)
            if not isinstance(exc, BlockingIOError):
                raise
    raise OSError(errno.EBUSY, "too many processes use it")


def _fill(path: Path, lock: int, source: Source) -> CacheDirectory:
    identity = source.stat.identity
    about = {"url": source.url, "identity": identity and identity.token, "size": source.size}
    (path / "source").write_text(json.dumps(about) + "\n", encoding="utf-8")
    blocks = os.open(path / "blocks", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.truncate(blocks, source.size)
    except BaseException:
        os.close(blocks)
        raise
    return CacheDirectory(path, blocks, lock)
