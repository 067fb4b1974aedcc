"""Who may have a layer open beside whom: in this process, and in another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imgfs.errors import Busy
from imgfs.overlays.locks import LayerLock
from imgfs.overlays.store import SnapshotStore

from .test_store import BASE, SIZE, URL, close, opened, put


@contextmanager
def elsewhere(path: Path, *, writes: bool) -> Iterator[int]:
    """Another process holds it; its id."""
    code = f"""
import sys
from pathlib import Path
from imgfs.overlays.locks import LayerLock
lock = LayerLock(Path({str(path)!r}), writes={writes})
print("held", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process.pid
        finally:
            process.kill()


def test_one_writer_or_many_readers(tmp_path: Path) -> None:
    first, second = LayerLock(tmp_path, writes=False), LayerLock(tmp_path, writes=False)
    with pytest.raises(Busy, match=f"is open for reading in process {os.getpid()}"):
        LayerLock(tmp_path, writes=True)
    first.close()
    first.close()  # no other's is taken away by that
    with pytest.raises(Busy):
        LayerLock(tmp_path, writes=True)
    second.close()
    writer = LayerLock(tmp_path, writes=True)
    for writes in (False, True):
        with pytest.raises(Busy, match=f"is open for writing in process {os.getpid()}"):
            LayerLock(tmp_path, writes=writes)
    writer.only_read()
    LayerLock(tmp_path, writes=False).close()
    with elsewhere(tmp_path, writes=False):
        pass
    writer.close()
    LayerLock(tmp_path, writes=True).close()


def test_other_processes(tmp_path: Path) -> None:
    with elsewhere(tmp_path, writes=True) as pid:
        for writes in (False, True):
            with pytest.raises(Busy, match=f"is open for writing in process {pid}"):
                LayerLock(tmp_path, writes=writes)
    with elsewhere(tmp_path, writes=False) as pid:
        with pytest.raises(Busy, match=f"is open for reading in process {pid}"):
            LayerLock(tmp_path, writes=True)
        mine = LayerLock(tmp_path, writes=False)
        assert not mine.is_ours_alone()
    assert mine.is_ours_alone()
    mine.close()


def test_what_is_read_elsewhere_is_not_deleted(tmp_path: Path) -> None:
    store = SnapshotStore(URL, tmp_path)
    store.create(("a",), BASE, SIZE)
    layers = opened(store, "a")
    put(layers[0], 0, b"1")
    close(layers)
    with elsewhere(layers[0].path, writes=False) as pid:
        for use in (lambda: store.delete(("a",)), lambda: opened(store, "a")):
            with pytest.raises(Busy, match=f"is open for reading in process {pid}"):
                use()
        close(opened(store, "a", writable=False))
        store.create(("a", "b"), BASE, SIZE)  # what is read stays as it is
    store.delete(("a", "b"))
    store.delete(("a",))


def test_what_was_frozen_can_be_read_elsewhere(tmp_path: Path) -> None:
    store = SnapshotStore(URL, tmp_path)
    store.create(("a",), BASE, SIZE)
    layers = opened(store, "a")
    put(layers[0], 0, b"1")
    fresh = store.create(("a", "b"), BASE, SIZE, layers[0])
    assert fresh is not None
    with elsewhere(layers[0].path, writes=False):
        pass
    with pytest.raises(Busy):
        LayerLock(fresh.path, writes=False)
    close([fresh, *layers])
