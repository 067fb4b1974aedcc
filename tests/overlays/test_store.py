"""Snapshots on disk: names, layers, locks, and what damage and other processes do to them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from imgfs._native import _map
from imgfs.errors import (
    AlreadyThere,
    Busy,
    CorruptSnapshot,
    NotEmpty,
    NotPermitted,
    SnapshotNotFound,
    SourceChanged,
)
from imgfs.overlays.layer import Layer
from imgfs.overlays.log import BLOCK, decode
from imgfs.overlays.store import Base, SnapshotStore, base_of, state_root, stores
from imgfs.sources.base import Identity

SIZE = 16 * BLOCK
URL = "ssh://host/vm/disk.img"
BASE = Base(URL, SIZE, "raw", "stat", "1:2:3")


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(URL, tmp_path)


def names(store: SnapshotStore) -> list[str]:
    return ["/".join(each.path) for each in store.snapshots()]


def opened(store: SnapshotStore, *path: str, writable: bool = True) -> list[Layer]:
    return store.open_layers(path, writable=writable)


def put(layer: Layer, block: int, fill: bytes) -> None:
    layer.store.write(block * BLOCK, fill * BLOCK)
    start = block * BLOCK
    kinds = bytes([_map.STORE])
    layer.commit((array("Q", [start]), array("Q", [start + BLOCK]), kinds), layer.size)


def blocks(layers: list[Layer]) -> str:
    """What each block is made of, from the top down; `.` where it is the base's."""
    found = ""
    for block in range(SIZE // BLOCK):
        kinds = [each.state.segments(block * BLOCK, BLOCK)[0][2] for each in layers]
        top = next((i for i, kind in enumerate(kinds) if kind != _map.ASK), None)
        if top is None:
            found += "."
        elif kinds[top] == _map.ZERO:
            found += "0"
        else:
            found += os.pread(layers[top].data, 1, block * BLOCK).decode()
    return found


def close(layers: list[Layer]) -> None:
    for layer in layers:
        layer.close()


def test_create_rename_delete(store: SnapshotStore) -> None:
    assert names(store) == []
    assert store.base() is None
    store.create(("b",), BASE, SIZE)
    store.create(("a",), BASE, SIZE)
    assert names(store) == ["a", "b"]
    assert store.base() == BASE
    with pytest.raises(AlreadyThere):
        store.create(("a",), BASE, SIZE)
    store.rename(("a",), "c")
    with pytest.raises(AlreadyThere):
        store.rename(("c",), "b")
    with pytest.raises(SnapshotNotFound):
        store.rename(("a",), "d")
    assert names(store) == ["b", "c"]
    store.delete(("b",))
    with pytest.raises(SnapshotNotFound):
        store.delete(("b",))
    assert names(store) == ["c"]
    assert len(list((store.directory / "layers").iterdir())) == 1
    assert [each.url for each in stores(store.directory.parent)] == [URL]
    assert store.directory.stat().st_mode & 0o777 == 0o700


def test_what_was_committed_is_there_again(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    layers = opened(store, "a")
    put(layers[0], 1, b"x")
    put(layers[0], 3, b"y")
    layers[0].commit((array("Q", [0]), array("Q", [BLOCK]), bytes([_map.ZERO])), SIZE)
    close(layers)
    layers = opened(store, "a")
    assert blocks(layers) == "0x.y............"
    close(layers)


def test_a_snapshot_of_a_snapshot(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    parent = opened(store, "a")
    put(parent[0], 0, b"1")
    fresh = store.create(("a", "b"), BASE, SIZE, parent[0])
    assert fresh is not None
    put(fresh, 0, b"2")
    put(fresh, 1, b"2")
    child = opened(store, "a", "b")
    put(child[0], 2, b"3")
    assert blocks([fresh, *parent]) == "22.............."
    assert blocks(child) == "1.3............."
    with pytest.raises(NotEmpty):
        store.delete(("a",))
    close([fresh, *parent, *child])
    store.rename(("a",), "z")
    assert names(store) == ["z", "z/b"]
    store.delete(("z", "b"))
    layers = opened(store, "z")
    assert blocks(layers) == "22.............."
    close(layers)
    store.delete(("z",))
    assert list((store.directory / "layers").iterdir()) == []


def test_nothing_written_is_no_layer_more(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    layers = opened(store, "a")
    assert store.create(("a", "b"), BASE, SIZE, layers[0]) is None
    assert len(store.get(("a", "b")).layers) == 1
    close(layers)


def test_a_parent_nobody_has_open(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    layers = opened(store, "a")
    put(layers[0], 0, b"1")
    with pytest.raises(Busy, match=f"process {os.getpid()}"):
        store.create(("a", "b"), BASE, SIZE)
    close(layers)
    store.create(("a", "b"), BASE, SIZE)
    layers = opened(store, "a", "b")
    assert blocks(layers) == "1..............."
    close(layers)
    with pytest.raises(SnapshotNotFound):
        store.create(("x", "y"), BASE, SIZE)


def test_another_base(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    for other in (replace(BASE, token="1:2:4"), replace(BASE, size=5), replace(BASE, format="vdi")):
        with pytest.raises(SourceChanged, match="is not what its snapshots were taken of"):
            store.check_base(other)
        with pytest.raises(SourceChanged):
            store.create(("b",), other, SIZE)
    store.check_base(BASE)
    store.pin(replace(BASE, token="9"))
    store.check_base(replace(BASE, token="9"))


def test_without_snapshots_any_base_will_do(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    store.delete(("a",))
    assert store.base() is None
    store.create(("a",), replace(BASE, token="9"), SIZE)
    store.check_base(replace(BASE, token="9"))


def test_a_lost_list_takes_no_layers_with_it(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    (store.directory / "snapshots").unlink()
    for use in (store.snapshots, lambda: store.create(("b",), BASE, SIZE)):
        with pytest.raises(CorruptSnapshot, match="snapshots: is missing"):
            use()
    assert len(list((store.directory / "layers").iterdir())) == 1


def test_no_snapshot_whose_base_is_forgotten_is_put_on_another(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    (store.directory / "base").unlink()  # as a crash in the midst of `delete` leaves it
    other = replace(BASE, token="9")
    for use in (lambda: store.check_base(other), lambda: store.create(("b",), other, SIZE)):
        with pytest.raises(CorruptSnapshot, match="base: is missing"):
            use()
    assert names(store) == ["a"]
    store.delete(("a",))
    assert names(store) == []
    store.create(("b",), other, SIZE)
    assert names(store) == ["b"]


def test_the_last_one_can_be_deleted_on_a_full_disk(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(full)]
    subprocess.run(command, check=True, timeout=20)
    try:
        store = SnapshotStore(URL, full)
        store.create(("a",), BASE, SIZE)
        with (full / "ballast").open("wb", buffering=0) as file:
            with pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
            close(opened(store, "a"))
            # The space of an unlinked file must not help.
            keep = os.open(store.directory / "base", os.O_RDONLY)
            try:
                store.delete(("a",))
            finally:
                os.close(keep)
        assert (names(store), store.base()) == ([], None)
    finally:
        subprocess.run(["umount", "-l", str(full)], check=True, timeout=20)


def test_a_base_needs_an_identity() -> None:
    assert base_of(URL, SIZE, "raw", Identity("stat", "1:2:3")) == BASE
    with pytest.raises(NotPermitted, match="-o identity="):
        base_of(URL, SIZE, "raw", None)


def test_two_processes(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    code = f"""
import sys
from pathlib import Path
from imgfs.overlays.store import SnapshotStore
store = SnapshotStore({URL!r}, Path({str(store.directory.parent)!r}))
layers = store.open_layers(("a",), writable=True)
print("open", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(Busy, match=f"process {process.pid}"):
            opened(store, "a")
        with pytest.raises(Busy):
            store.delete(("a",))
        with pytest.raises(Busy, match=f"open for writing in process {process.pid}"):
            opened(store, "a", writable=False)
        process.kill()
    close(opened(store, "a"))
    store.delete(("a",))


def test_what_others_did_is_seen(store: SnapshotStore, tmp_path: Path) -> None:
    """The list is not read again while its file is the same."""
    other = SnapshotStore(URL, tmp_path)
    for number in range(20):
        (store, other)[number % 2].create((f"{number:02}",), BASE, SIZE)
        assert names(store) == names(other) == [f"{each:02}" for each in range(number + 1)]
    other.rename(("07",), "70")
    assert names(store)[-1] == "70"
    path = store.directory / "snapshots"
    path.write_bytes(path.read_bytes().replace(b'"70"', b'"77"'))
    assert names(store) == names(other) == [f"{n:02}" for n in range(20) if n != 7]
    assert store.damage() is not None


def test_a_damaged_base_file(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    path = store.directory / "base"
    good = path.read_bytes()
    for at in range(len(good)):
        for damaged in (good[:at], good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]):
            path.write_bytes(damaged)
            if damaged != good[:-1]:
                with pytest.raises(CorruptSnapshot, match="base: "):
                    store.base()


def test_a_damaged_layer_harms_no_other(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    store.create(("b",), BASE, SIZE)
    path = store.directory / "layers" / store.get(("a",)).layers[0]
    (path / "log").write_bytes(b"x" * 100)
    with pytest.raises(CorruptSnapshot, match=f"{path}/log: the header is damaged"):
        opened(store, "a")
    close(opened(store, "b"))
    store.delete(("a",))
    store.create(("a",), BASE, SIZE)
    path = store.directory / "layers" / store.get(("a",)).layers[0]
    os.truncate(path / "data", BLOCK)
    with pytest.raises(CorruptSnapshot, match=f"{path}/data: is shorter"):
        opened(store, "a")
    (path / "data").unlink()
    with pytest.raises(CorruptSnapshot, match=f"{path}/data: is missing"):
        opened(store, "a")


def test_a_torn_batch_is_written_over(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    layers = opened(store, "a")
    put(layers[0], 0, b"1")
    content = (layers[0].path / "log").read_bytes()
    good = content[: decode(content, "log")[1]]
    put(layers[0], 1, b"2")
    close(layers)
    log = layers[0].path / "log"
    log.write_bytes(log.read_bytes()[:-7])
    (layers[0].path / "closed").unlink()  # it was a crash
    layers = opened(store, "a")
    assert blocks(layers) == "1..............."
    assert log.read_bytes() == good
    put(layers[0], 2, b"3")
    close(layers)
    layers = opened(store, "a")
    assert blocks(layers) == "1.3............."
    close(layers)


def test_long_logs_are_compacted(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgfs.overlays.layer._COMPACT", 4096)
    store.create(("a",), BASE, SIZE)
    layers = opened(store, "a")
    for i in range(500):
        put(layers[0], i * 7 % 16, bytes([97 + i % 16]))
    wanted = blocks(layers)
    close(layers)
    assert (layers[0].path / "log").stat().st_size < 8192
    layers = opened(store, "a")
    assert blocks(layers) == wanted
    put(layers[0], 0, b"!")
    close(layers)
    layers = opened(store, "a")
    assert blocks(layers) == "!" + wanted[1:]
    close(layers)


def test_a_full_disk(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(full)]
    subprocess.run(command, check=True, timeout=20)
    try:
        store = SnapshotStore(URL, full)
        store.create(("a",), BASE, SIZE)
        layers = opened(store, "a")
        put(layers[0], 0, b"1")
        ballast = full / "ballast"
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        with pytest.raises(OSError, match="No space") as caught:
            for block in range(1, 16):
                put(layers[0], block, b"2")
            for _ in range(400):
                layers[0].drop(5 * BLOCK, 6 * BLOCK)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match="No space"):
            store.create(("b",), BASE, SIZE)
        assert names(store) == ["a"]
        ballast.unlink()
        put(layers[0], 9, b"3")
        assert blocks(layers)[9] == "3"
        close(layers)
        layers = opened(store, "a")
        assert (blocks(layers)[0], blocks(layers)[9]) == ("1", "3")
        close(layers)
        store.create(("b",), BASE, SIZE)
    finally:
        subprocess.run(["umount", "-l", str(full)], check=True, timeout=20)


def test_where_the_state_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/s")
    assert state_root() == Path("/s/imgfs")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert state_root() == Path("/home/me/.local/state/imgfs")
    monkeypatch.delenv("HOME")
    assert state_root().parts[-3:] == (".local", "state", "imgfs")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/imgfs:/x")
    assert state_root() == Path("/var/lib/imgfs")


def test_without_snapshots_nothing_takes_space(store: SnapshotStore) -> None:
    store.create(("x",), BASE, SIZE)
    assert (store.directory / "spare").stat().st_size > 0  # for a disk that is full one day
    store.delete(("x",))
    left = [path for path in store.directory.rglob("*") if path.is_file() and path.stat().st_size]
    assert left == []
