"""What goes wrong with a snapshot's files, as errors of ours."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from imgfs.errors import ImgfsError, NoSpace, TooLarge, system_error

_ERRORS: dict[int, type[ImgfsError]] = {
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EFBIG: TooLarge,
}


@contextlib.contextmanager
def translated(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        kind = _ERRORS.get(exc.errno or 0)
        what = f"{name}: the snapshot's files"
        if kind is None:
            raise system_error(what, exc) from exc
        raise kind(f"{what}: {exc.strerror}") from exc
