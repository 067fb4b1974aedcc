"""Run by test_power_loss_commit: a snapshot is written, and then committed into its base.

`python -m tests.overlays.committer ROOT MARKS` writes a line to MARKS after each thing that is to
be durable by then.  The base is ROOT/base.img; the snapshots are kept in ROOT/home/state/imgfs.
"""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path

from imgfs.overlays.commit import committing
from imgfs.overlays.rawpins import pin_raw
from imgfs.overlays.store import Base, SnapshotStore

from .writer import BLOCK, Disk

SIZE = 16 * BLOCK
OLD = b"old " * (SIZE // 4)
NEW = OLD[: 3 * BLOCK] + b"new " * (5 * BLOCK // 4) + OLD[8 * BLOCK :]
STATE = "home/state/imgfs"
X = ("x",)


def base_of(image: Path) -> Base:
    """What it looks like now: another identity for other bytes."""
    return Base("file:///d/base.img", SIZE, "raw", "stat", str(zlib.crc32(image.read_bytes())))


def store_of(root: Path) -> SnapshotStore:
    return SnapshotStore("file:///d/base.img", root / STATE)


def commit(root: Path) -> None:
    """As `imgfs snapshot commit` does it."""
    store, image = store_of(root), root / "base.img"
    store.check_childless(X)
    pin_raw(str(image))
    with committing(store, X, base_of(image)):
        layers = store.open_layers(X, writable=True)
        fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        for start, end, _ in zip(*layers[0].ranges(), strict=True):
            for at in range(start, end, BLOCK):
                os.pwrite(fd, layers[0].store.read(at, BLOCK), at)
        os.fsync(fd)
        os.close(fd)
        store.pin(base_of(image))
        for layer in layers:
            layer.close()
    store.delete(X)


def main() -> None:
    root, marks = Path(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT, 0o600)
    image = root / "base.img"
    fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.pwrite(fd, OLD, 0)
    os.fsync(fd)
    top = os.open(root, os.O_RDONLY)
    os.fsync(top)
    os.write(marks, b"base\n")
    store = store_of(root)
    store.create(X, base_of(image), SIZE)
    disk = Disk(store.open_layers(X, writable=True))
    assert disk.map.write(3 * BLOCK, NEW[3 * BLOCK : 8 * BLOCK])
    disk.commit()
    os.write(marks, b"written\n")
    disk.close()
    commit(root)
    os.write(marks, b"committed\n")


if __name__ == "__main__":
    main()
