"""Which sources are raw, whatever their first bytes look like by now, across mounts.

What is written to a raw disk is a guest's.  If it begins with another format's header, and the
source were probed again, the next mount would follow what that header says, to other files as
well (CVE-2008-2004 of qemu).  So a source that was raw when imgfs began to write to it is raw
until a person says otherwise by format=.

That a pin is there is what it says: its content has a checksum, but a source whose pin is damaged,
cut off or emptied stays raw all the same.  What no content tells is that a pin is gone: so each
stands in two directories, and counts while it is in one of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from imgfs.checksums import decode_document, encode_document, seed_of
from imgfs.errors import AccessDenied, CorruptSnapshot, OtherVersion
from imgfs.overlays.layer import replace_file
from imgfs.overlays.places import make_directories
from imgfs.overlays.store import state_root
from imgfs.url.source import parse

log = logging.getLogger(__name__)

VERSION = 2  # version 1 was empty
_DIRECTORIES = ("raw", "raw.copy")


def is_pinned_raw(text: str) -> bool:
    """[blocks] Is the source, as a person names it, to stay raw?

    Raises OtherVersion for a pin that may say something else, and AccessDenied where nobody can
    tell.
    """
    return any(_counts(path) for path in _paths(text))


def pin_raw(text: str) -> None:
    """[blocks] From now on, also after a crash.  Raises nothing."""
    for path in _paths(text):
        try:
            if not _is_whole(path):
                make_directories(path.parent)
                content = encode_document(VERSION, {"format": "raw"}, _seed(path))
                replace_file(path, content)
        except OSError as exc:
            log.warning("%s: its format cannot be kept for the next mount: %s", path, exc.strerror)


def unpin_raw(text: str) -> None:
    """[blocks] A person has said that it is something else.  Raises nothing."""
    for path in _paths(text):
        try:
            path.unlink(missing_ok=True)
        except OSError as exc:
            log.warning("%s: %s", exc.filename, exc.strerror)


def _counts(path: Path) -> bool:
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError as exc:
        raise AccessDenied(
            f"{path}: {exc.strerror}, so nothing tells whether it is raw; say so by -o format="
        ) from exc
    except OSError as exc:
        log.warning("%s: cannot be read (%s); what it is of stays raw", path, exc.strerror)
        return True
    if data:
        _check(path, data)
    return True


def _check(path: Path, data: bytes) -> None:
    try:
        decode_document(data, VERSION, _seed(path), str(path))
    except OtherVersion:
        raise
    except CorruptSnapshot as exc:
        log.warning("%s; what it is of stays raw", exc)


def _is_whole(path: Path) -> bool:
    try:
        decode_document(path.read_bytes(), VERSION, _seed(path), str(path))
    except (OSError, CorruptSnapshot):
        return False
    return True


def _seed(path: Path) -> int:
    return seed_of("pin", path.name)


def _paths(text: str) -> list[Path]:
    """Named by a digest: there may be secrets in a command's arguments."""
    where = parse(text)
    plain = os.path.realpath(where) if isinstance(where, str) else where.text
    digest = hashlib.sha256(plain.encode("utf-8", "surrogateescape")).hexdigest()
    return [state_root() / directory / digest for directory in _DIRECTORIES]
