"""`imgfs snapshot check` reads all that snapshots are kept in, and says what is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imgfs.overlays.layer import Layer
from imgfs.overlays.store import SnapshotStore
from imgfs.url.shown import shown_source
from tests.mounts import MIB, imgfs
from tests.overlays.test_layer import BLOCK, _map, ranges


@pytest.fixture
def disk(tmp_path: Path, own_directories: None) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MIB))
    for name in ("a", "b"):
        assert imgfs("snapshot", "create", path, name).returncode == 0
    return path


def opened(store: SnapshotStore, name: str) -> Layer:
    (layer,) = store.open_layers((name,), writable=True)
    return layer


def write(store: SnapshotStore, name: str) -> Path:
    layer = opened(store, name)
    layer.store.write(BLOCK, os.urandom(9 * BLOCK))
    layer.commit(ranges((1, 9, _map.STORE)), layer.size)
    layer.close()
    return layer.path / "data"


def test_check(disk: Path) -> None:
    store = SnapshotStore(shown_source(str(disk)))
    data = write(store, "a")
    write(store, "b")
    done = imgfs("snapshot", "check", disk)
    assert (done.returncode, done.stdout, done.stderr) == (0, "   good  a\n   good  b\n", "")
    content = bytearray(data.read_bytes())
    for block in (3, 5, 6):
        content[block * BLOCK + 8] ^= 1
    data.write_bytes(content)
    disk.unlink()  # it is not needed
    done = imgfs("snapshot", "check", disk)
    assert (done.returncode, done.stdout) == (1, "damaged  a\n   good  b\n")
    first, more = done.stderr.splitlines()
    assert first.startswith(f"imgfs: {data}: the 4 KiB at byte {3 * BLOCK} do not fit")
    assert more == f"imgfs: {data}: and 2 blocks more"
    assert imgfs("snapshot", "check", disk, "b").returncode == 0
    assert imgfs("snapshot", "check", disk, "a").returncode == 1
    layer = opened(store, "b")
    done = imgfs("snapshot", "check", disk, "b")
    assert (done.returncode, done.stdout) == (1, " in use  b\n")
    assert "is open for writing in process" in done.stderr
    layer.close()
    done = imgfs("snapshot", "check", disk, "c")
    assert done.returncode == 1 and "has no snapshot c" in done.stderr
    (data.with_name("sums")).unlink()
    done = imgfs("snapshot", "check", disk, "a")
    assert done.returncode == 1 and "/sums: is missing" in done.stderr
