"""Which sources are raw, whatever their first bytes look like by now, across mounts.

What is written to a raw disk is a guest's.  If it begins with another format's header, and the
source were probed again, the next mount would follow what that header says, to other files as
well (CVE-2008-2004 of qemu).  So a source that was raw when imgfs began to write to it is raw
until a person says otherwise by format=.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from imgfs.overlays.layer import replace_file, sync_directory
from imgfs.overlays.store import state_root
from imgfs.url.source import parse

log = logging.getLogger(__name__)


def is_pinned_raw(text: str) -> bool:
    """[blocks] Is the source, as a person names it, to stay raw?"""
    return _path(text).exists()


def pin_raw(text: str) -> None:
    """[blocks] From now on, also after a crash.  Raises nothing."""
    path = _path(text)
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(path, b"")
            sync_directory(path.parent)
    except OSError as exc:
        log.warning("%s: its format cannot be kept for the next mount: %s", path, exc.strerror)


def unpin_raw(text: str) -> None:
    """[blocks] A person has said that it is something else.  Raises nothing."""
    try:
        _path(text).unlink(missing_ok=True)
    except OSError as exc:
        log.warning("%s: %s", exc.filename, exc.strerror)


def _path(text: str) -> Path:
    """Named by a digest: there may be secrets in a command's arguments."""
    where = parse(text)
    plain = os.path.realpath(where) if isinstance(where, str) else where.text
    digest = hashlib.sha256(plain.encode("utf-8", "surrogateescape")).hexdigest()
    return state_root() / "raw" / digest
