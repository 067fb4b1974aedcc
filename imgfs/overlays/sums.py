"""Checksums of a layer's `data`, in the file `sums` beside it: how far they can be trusted.

imgfs/_native/store/sums.h says what is in that file, and when a sum is written.  What one that is 0
or disagrees means depends on how the layer was left:

- closed: every block that is the layer's has a sum, and all agree; anything else is damage;
- by a kill of the process, in this boot of the machine: what has no sum was not sealed yet, all
  others agree, since the kernel had both files;
- by a crash of the machine: data and sums of what was being written reached the disk in any order.
  A block that disagrees cannot be told from a damaged one.  It is accepted, counted, and gets a new
  sum; a line in the log tells of it when the layer is closed.

`boot` says in which boot the layer was opened for writing last.  While there is doubt it stays what
it was, until all has been compared and the layer was closed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from enum import IntEnum
from pathlib import Path

from imgfs._native import _map
from imgfs.errors import CorruptSnapshot
from imgfs.overlays.log import write_all

QUIET_MS = 5000  # what was not written for so long is sealed


class Trust(IntEnum):
    STRICT = 0
    KILLED = 1
    DOUBT = 2


def boot_id() -> str:
    """Another one whenever the machine was started; empty: this kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def boot_of(path: Path) -> str | None:
    """In which boot the layer was opened for writing; None: never."""
    try:
        return (path / "boot").read_text(errors="replace").strip()
    except FileNotFoundError:
        return None


def mark_boot(path: Path) -> None:
    """It is written in this boot.  Need not be durable: after a crash the boot is another one.

    Raises nothing: on a full disk it is as good as after a crash.
    """
    with contextlib.suppress(OSError):
        if boot_of(path) != boot_id():
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            fd = os.open(path / "boot", flags, 0o600)
            try:
                write_all(fd, boot_id().encode() + b"\n", 0)
            finally:
                os.close(fd)


def trust_after_crash(path: Path, *, had_sums: bool) -> Trust:
    """Of a layer that was not closed; `had_sums`: it was made with them."""
    known = boot_of(path)
    if known is None and not had_sums:
        return Trust.KILLED  # none of it has one
    return Trust.KILLED if known and known == boot_id() else Trust.DOUBT


def attach_sums(
    path: Path, store: _map.Store, trust: Trust, *, size: int | None, writable: bool, make: bool
) -> None:
    """Cover the store by the layer's sums.

    `size` is what that file must have, if that is known; `make` it if there is none.  Raises
    CorruptSnapshot and OSError.
    """
    sums = path / "sums"
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
    try:
        fd = os.open(sums, flags | (os.O_CREAT if make else 0), 0o600)
    except FileNotFoundError:
        raise CorruptSnapshot(f"{sums}: is missing; bring the file back") from None
    try:
        found = os.fstat(fd).st_size
        if size is not None and found != size:
            raise CorruptSnapshot(
                f"{sums}: has {found} bytes, and had {size} when it was closed; bring the file back"
            )
        names = str(path / "data"), str(path / "closed")
        store.attach_sums(fd, _key(path), *names, int(trust), writable)
    finally:
        os.close(fd)


def _key(path: Path) -> int:
    """So that another layer's file in its place is noticed."""
    digest = hashlib.sha256(path.name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little")
