"""Which snapshot is being written into its base: so that it can be gone on with after a crash.

From the first byte on the base is no longer what the snapshots were taken of; `committing` beside
them says whose doing that is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from imgfs.errors import Busy, SourceChanged
from imgfs.overlays.layer import replace_file, sync_directory
from imgfs.overlays.records import SnapshotPath
from imgfs.overlays.store import Base, SnapshotStore


@contextlib.contextmanager
def committing(store: SnapshotStore, path: SnapshotPath, base: Base) -> Iterator[None]:
    """Hold the right to write the snapshot into the base, which must be the one it was taken of,
    or one that an earlier attempt left half-way.

    When the block is left without an exception that attempt is over.  Raises SourceChanged, Busy
    when another process does it, and OSError.
    """
    marker = store.directory / "committing"
    name = "/".join(path).encode("utf-8", "surrogateescape")
    lock = os.open(store.directory / "commit-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{store.url}: another process commits a snapshot now") from None
        begun = marker.read_bytes() if marker.exists() else b""
        if begun and begun != name:
            raise SourceChanged(
                f"{store.url}: holds half of snapshot {begun.decode(errors='replace')}, whose "
                "commit was interrupted; commit that again first"
            )
        if not begun:
            store.check_base(base)
            replace_file(marker, name)
        yield
        marker.unlink()
        sync_directory(store.directory)
    finally:
        os.close(lock)
