"""Which snapshot is being written into its base: so that it can be gone on with after a crash.

From the first byte on the base is no longer what the snapshots were taken of; `committing` beside
them says whose doing that is.  While it is damaged no snapshot is committed: another one's bytes
over half of that one's would be nobody's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from imgfs.checksums import decode_document, encode_document, seed_of
from imgfs.errors import Busy, CorruptSnapshot, OtherVersion, SourceChanged
from imgfs.overlays.layer import replace_file
from imgfs.overlays.places import sync_directory
from imgfs.overlays.records import SnapshotPath
from imgfs.overlays.store import Base, SnapshotStore

VERSION = 2  # of the file `committing`


@contextlib.contextmanager
def committing(store: SnapshotStore, path: SnapshotPath, base: Base) -> Iterator[None]:
    """Hold the right to write the snapshot into the base, which must be the one it was taken of,
    or one that an earlier attempt left half-way.

    When the block is left without an exception that attempt is over.  Raises SourceChanged, Busy
    when another process does it, CorruptSnapshot, and OSError.
    """
    marker = store.directory / "committing"
    lock = os.open(store.directory / "commit-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{store.url}: another process commits a snapshot now") from None
        begun = _begun(marker, store.url)
        if begun is None:
            store.check_base(base)
            content = {"snapshot": path}
            replace_file(marker, encode_document(VERSION, content, _seed(store.url)))
        elif begun != path:
            name = "/".join(begun).encode(errors="backslashreplace").decode()
            raise SourceChanged(
                f"{store.url}: holds half of snapshot {name}, whose commit was interrupted; "
                "commit that again first"
            )
        yield
        marker.unlink()
        sync_directory(store.directory)
    finally:
        os.close(lock)


def _begun(marker: Path, url: str) -> SnapshotPath | None:
    """The snapshot of which the base holds a half."""
    try:
        data = marker.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return tuple(decode_document(data, VERSION, _seed(url), str(marker))["snapshot"])
    except OtherVersion:
        raise
    except CorruptSnapshot as exc:
        raise CorruptSnapshot(
            f"{exc}, so nothing tells of which snapshot {url} holds a half; bring the file back, "
            "or delete the snapshots, and that file, and bring the source back"
        ) from None


def _seed(url: str) -> int:
    return seed_of("committing", url)
