"""The errnos of local files as imgfs's errors: literal tables, used where they enter."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from imgfs.errors import (
    AccessDenied,
    AlreadyThere,
    ImgfsError,
    NoSpace,
    NotAnImage,
    ReadOnlyView,
    SourceNotFound,
    TooLarge,
    system_error,
)

Table = dict[int, tuple[type[ImgfsError], str]]

_ALL: Table = {
    errno.ENOENT: (SourceNotFound, "no such file"),
    errno.EACCES: (AccessDenied, "permission denied"),
    errno.EPERM: (AccessDenied, "permission denied"),
    errno.EROFS: (ReadOnlyView, "lies on a read-only filesystem"),
    errno.ENOSPC: (NoSpace, "no space is left on its disk"),
    errno.EDQUOT: (NoSpace, "the disk quota is used up"),
    errno.ELOOP: (SourceNotFound, "is a link that leads back to itself"),
    errno.ENAMETOOLONG: (SourceNotFound, "no such file: its name is too long"),
}

#: Of opening, reading and writing a file.
FILES: Table = _ALL | {
    errno.ENOTDIR: (SourceNotFound, "no such file"),
    errno.EISDIR: (NotAnImage, "is a directory; for all images in it write a / at its end"),
    errno.EFBIG: (TooLarge, "its filesystem allows no file as long as that"),
}

#: Of listing a directory.
DIRECTORIES: Table = _ALL | {
    errno.ENOENT: (SourceNotFound, "no such directory"),
    errno.ENOTDIR: (NotAnImage, "is not a directory"),
}

#: Of creating, renaming and removing a name in a directory.
CHANGES: Table = _ALL | {
    errno.EEXIST: (AlreadyThere, "is there already"),
}


@contextlib.contextmanager
def translated(path: str, table: Table) -> Iterator[None]:
    """Raises what the table makes of an OSError, as said of the path."""
    try:
        yield
    except OSError as exc:
        known = table.get(exc.errno or 0)
        if known is None:
            raise system_error(path, exc) from exc
        raise known[0](f"{path}: {known[1]}") from exc
