"""What goes wrong with the files that snapshots are kept in, as errors of ours."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from imgfs.errors import (
    AccessDenied,
    ImgfsError,
    NoSpace,
    NotPermitted,
    OverQuota,
    StateReadOnly,
    TooLarge,
    system_error,
)

#: errno -> the class that has it, and what to do; {} is the directory
_ERRORS: dict[int, tuple[type[ImgfsError], str]] = {
    errno.ENOSPC: (NoSpace, "free space in {}"),
    errno.EDQUOT: (OverQuota, "free space in {}, or raise the quota"),
    errno.EROFS: (StateReadOnly, "mount the filesystem of {} for writing"),
    errno.EACCES: (AccessDenied, "see whose {} is"),
    errno.EPERM: (NotPermitted, "see whose {} is"),
    errno.EFBIG: (TooLarge, "the filesystem of {}, or a limit of this process, allows no more"),
}


def error_of(exc: OSError, name: str, place: object = None) -> ImgfsError:
    """`name` is of what a person looks at, `place` of the directory that the files are in."""
    where = os.fspath(exc.filename) if isinstance(exc.filename, str | os.PathLike) else ""
    if exc.errno not in _ERRORS:
        return system_error(f"{name}: {where}" if where else name, exc)
    kind, advice = _ERRORS[exc.errno]
    said = f"{name}: {where}: " if where else f"{name}: "
    said += exc.strerror or str(exc)
    place = place or (Path(where).parent if where else None)
    return kind(f"{said}; {advice.format(place)}" if advice and place else said)


@contextlib.contextmanager
def translated(name: str, place: object = None) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise error_of(exc, name, place) from exc
