"""Layers of which nobody needs the lower one by itself become one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import pytest
import trio

from imgfs._native import _map
from imgfs.overlays.layer import Layer, open_layer, stored_bytes
from imgfs.overlays.log import BLOCK
from imgfs.overlays.merge import begin_merge
from imgfs.overlays.store import Base, SnapshotStore
from imgfs.tree.snapshots import BaseDisk, Snapshots
from imgfs.views.view import View

from .test_locks import elsewhere
from .test_store import BASE, SIZE, URL, blocks, close, opened, put
from .writer import Disk

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
MANY = 100 if LONG else 12


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(URL, tmp_path)


def merge_all(store: SnapshotStore, views: Collection[Collection[str]] = ()) -> int:
    """How many merges there were."""
    for count in range(1000):
        merge, _ = begin_merge(store, views)
        if merge is None:
            return count
        try:
            while not merge.step():
                pass
            assert merge.finish()
        finally:
            merge.close()
    raise AssertionError("no end")


def seen(store: SnapshotStore, *path: str) -> str:
    layers = opened(store, *path, writable=False)
    try:
        return blocks(layers)
    finally:
        close(layers)


def frozen(store: SnapshotStore, path: tuple[str, ...], *writes: tuple[int, bytes]) -> None:
    """Write to the snapshot, and freeze that; b"0" stands for zeroes."""
    layers = opened(store, *path)
    for block, fill in writes:
        if fill == b"0":
            disk = Disk(layers)
            assert disk.map.zero(block * BLOCK, (block + 1) * BLOCK)
            disk.commit()
            disk.map.set_target(None)
        else:
            put(layers[0], block, fill)
    fresh = store.freeze(path, layers[0].size, layers[0])
    close([fresh, *layers])


def left(store: SnapshotStore) -> int:
    return len(list((store.directory / "layers").iterdir()))


def in_file(path: Path) -> int:
    """Bytes of its `data` that are no hole; a file system has blocks of its own beside them."""
    with (path / "data").open("rb") as file:
        ends, flags = _map.scan_file(file.fileno(), SIZE)
    found = zip([0, *ends[:-1]], ends, flags, strict=True)
    return sum(end - start for start, end, is_hole in found if not is_hole)


def test_all_that_was_frozen_becomes_one(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    frozen(store, ("a",), *((block, b"1") for block in range(8)))
    frozen(store, ("a",), (0, b"2"), (9, b"2"), (1, b"0"))
    frozen(store, ("a",), (9, b"3"), (2, b"0"), (1, b"4"))
    assert seen(store, "a") == "24011111.3......"
    wanted = seen(store, "a")
    assert merge_all(store) == 2
    assert seen(store, "a") == wanted
    top, only = store.get(("a",)).layers
    assert left(store) == 2
    assert in_file(store.layer_path(only)) == 8 * BLOCK  # the zeroes take none
    assert stored_bytes(store.layer_path(top)) == 0


@pytest.mark.parametrize("into_lower", [True, False])
def test_the_larger_one_is_kept(store: SnapshotStore, into_lower: bool) -> None:
    store.create(("a",), BASE, SIZE)
    large = tuple((block, b"L") for block in range(9))
    frozen(store, ("a",), *(large if into_lower else [(0, b"s"), (12, b"s")]))
    frozen(store, ("a",), *([(0, b"s"), (12, b"s")] if into_lower else large))
    upper, lower = store.get(("a",)).layers[1:]
    wanted = seen(store, "a")
    assert merge_all(store) == 1
    assert store.get(("a",)).layers[1:] == (lower if into_lower else upper,)
    assert seen(store, "a") == wanted


def test_what_others_stand_on_is_left_alone(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    frozen(store, ("a",), (0, b"1"))
    store.create(("a", "b"), BASE, SIZE)  # stands on the first one only
    frozen(store, ("a",), (0, b"2"))
    frozen(store, ("a",), (1, b"3"))
    merge_all(store)
    assert len(store.get(("a",)).layers) == 3
    assert seen(store, "a") == "23.............."
    assert seen(store, "a", "b") == "1..............."
    store.delete(("a", "b"))
    assert merge_all(store) == 1
    assert seen(store, "a") == "23.............."
    assert left(store) == 2


def test_snapshots_that_share_both(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    frozen(store, ("a",), (0, b"1"))
    frozen(store, ("a",), (1, b"2"))
    for name in "bcd":
        store.create(("a", name), BASE, SIZE)
        layers = opened(store, "a", name)
        put(layers[0], 5, name.encode())
        close(layers)
    before = [seen(store, "a", name) for name in "bcd"]
    assert before[2] == "12...d.........."
    assert merge_all(store)
    assert [seen(store, "a", name) for name in "bcd"] == before
    assert len(store.get(("a", "d")).layers) == 2 + 2  # the tops of a at those moments are empty


def test_sizes(store: SnapshotStore) -> None:
    """Cut and made longer again it is zeroes there, whichever is kept."""
    for name, first, last in (("a", 9, 1), ("b", 1, 4)):
        store.create((name,), BASE, SIZE)
        frozen(store, (name,), *((block, b"1") for block in range(7, 7 + first)))
        layers = opened(store, name)
        disk = Disk(layers)
        disk.resize(8 * BLOCK)
        disk.commit()
        disk.resize(SIZE)
        disk.commit()
        disk.map.set_target(None)
        for block in range(last):
            put(layers[0], block, b"2")
        close([store.freeze((name,), SIZE, layers[0]), *layers])
        wanted = "2" * last + "." * (7 - last) + "1" + "0" * 8
        assert seen(store, name) == wanted
        assert merge_all(store) == 1
        assert seen(store, name) == wanted


def test_many_deep(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    path: tuple[str, ...] = ("a",)
    for number in range(MANY):
        layers = opened(store, *path)
        put(layers[0], number % 16, bytes([65 + number % 26]))
        close(layers)
        path = (*path, "n")
        store.create(path, BASE, SIZE)
    assert len(store.get(path).layers) == MANY + 1
    assert merge_all(store) == 0  # each is what another snapshot was taken of
    wanted = seen(store, "a")
    while len(path) > 1:
        store.delete(path)
        path = path[:-1]
    merge_all(store)
    assert seen(store, "a") == wanted
    assert len(store.get(("a",)).layers) == left(store) == 2


def test_many_beside_each_other(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    for number in range(MANY):
        layers = opened(store, "a")
        put(layers[0], number % 7, bytes([65 + number % 26]))
        close(layers)
        store.create(("a", str(number)), BASE, SIZE)
    wanted = seen(store, "a")
    kept = seen(store, "a", "5")
    for number in range(MANY):
        if number != 5:
            store.delete(("a", str(number)))
    merge_all(store)
    assert (seen(store, "a"), seen(store, "a", "5")) == (wanted, kept)
    assert len(store.get(("a",)).layers) == 3
    store.delete(("a", "5"))
    merge_all(store)
    layers = list((store.directory / "layers").iterdir())
    # A file system may need one more block for where they are.
    assert sum(map(stored_bytes, layers)) in (7 * BLOCK, 8 * BLOCK)
    assert len(layers) == 2


def test_what_a_view_holds_is_not_changed(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    frozen(store, ("a",), *((block, b"1") for block in range(8)))
    top, *held = opened(store, "a", writable=False)
    top.close()
    frozen(store, ("a",), (0, b"2"))
    names = {layer.path.name for layer in held}
    merge, may_be = begin_merge(store, [names])
    assert (merge, may_be) == (None, True)
    assert blocks(held) == "11111111........"
    with elsewhere(held[0].path, writes=False):
        assert begin_merge(store, [])[0] is None
    upper = store.get(("a",)).layers[1]
    assert merge_all(store, [{upper, *names}]) == 1
    close(held)


def test_the_smaller_one_is_unlinked_under_a_reader(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    frozen(store, ("a",), (0, b"1"), (1, b"1"))
    top, *held = opened(store, "a", writable=False)
    top.close()
    frozen(store, ("a",), *((block, b"2") for block in range(5)))
    assert merge_all(store, [{layer.path.name for layer in held}]) == 1
    assert blocks(held) == "11.............."
    close(held)
    assert left(store) == 2


def test_one_merge_at_a_time(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    frozen(store, ("a",), (0, b"1"))
    frozen(store, ("a",), (1, b"2"))
    first, _ = begin_merge(store, [])
    assert first is not None
    assert begin_merge(store, []) == (None, True)
    store.delete(("a",))
    while not first.step():
        pass
    assert not first.finish()  # there is nobody who wants it
    first.close()
    assert left(store) == 0


def test_damaged_records_stop_merging(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    store.create(("b",), BASE, SIZE)
    frozen(store, ("a",), (0, b"1"))
    frozen(store, ("a",), (1, b"2"))
    file = store.directory / "snapshots"
    file.write_bytes(file.read_bytes().replace(b'["b"]', b'["B"]'))
    assert merge_all(store) == 0
    assert len(store.get(("a",)).layers) == 3


def test_a_full_disk(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(full)]
    subprocess.run(command, check=True, timeout=20)
    try:
        store = SnapshotStore(URL, full)
        store.create(("a",), BASE, SIZE)
        frozen(store, ("a",), *((block, b"1") for block in range(8)))
        frozen(store, ("a",), *((block, b"2") for block in range(6, 13)))
        wanted = seen(store, "a")
        lower = store.get(("a",)).layers[2]
        with (full / "ballast").open("wb", buffering=0) as file:
            with pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
            file.truncate(file.tell() - 2 * BLOCK)
            with pytest.raises(OSError, match="No space"):
                merge_all(store)
        assert in_file(store.layer_path(lower)) == 8 * BLOCK
        assert seen(store, "a") == wanted
        (full / "ballast").unlink()
        assert merge_all(store) == 1
        assert seen(store, "a") == wanted
    finally:
        subprocess.run(["umount", "-l", str(full)], check=True, timeout=20)


KILLED = """
import sys
from pathlib import Path
from imgfs.overlays.merge import begin_merge
from imgfs.overlays.store import SnapshotStore
store = SnapshotStore({url!r}, Path(sys.argv[1]))
print("begun", flush=True)
while (merge := begin_merge(store, [])[0]) is not None:
    while not merge.step():
        pass
    merge.finish()
    merge.close()
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Whatever is left has the same bytes, and is merged the next time."""
    rng = random.Random(7)
    size = 16 << 20
    store = SnapshotStore(URL, tmp_path)
    store.create(("a",), BASE, size)
    model = bytearray(size)
    for number in range(8):
        layers = opened(store, "a")
        disk = Disk(layers)
        for _ in range(60):
            at, length = rng.randrange(size // BLOCK - 64) * BLOCK, rng.randrange(1, 64) * BLOCK
            if rng.random() < 0.2:
                assert disk.map.zero(at, at + length)
                model[at : at + length] = bytes(length)
            else:
                data = bytes([number + 1]) * length
                assert disk.map.write(at, data)
                model[at : at + length] = data
        disk.commit()
        disk.map.set_target(None)
        close([store.freeze(("a",), size, layers[0]), *layers])
    killed = 0
    for _ in range(100 if LONG else 4):
        code = KILLED.format(url=URL)
        command = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            time.sleep(rng.random() * 0.02)
            process.kill()
        killed += process.returncode == -signal.SIGKILL
        assert disk_of(opened(store, "a", writable=False)) == model
    assert killed
    merge_all(store)
    assert disk_of(opened(store, "a", writable=False)) == model
    assert left(store) == 2


def disk_of(layers: list[Layer]) -> bytes:
    held = _map.SegmentMap(layers[0].size)
    for layer in layers:
        held.fill(*layer.ranges(), layer.store)
    held.fill_zero(0, held.size)
    found = held.read(0, held.size)
    close(layers)
    assert found is not None
    return found


def test_under_a_disk_that_is_written(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    disk = Disk(opened(store, "a"))
    for fill in b"123":
        assert disk.map.write((fill - 49) * BLOCK, bytes([fill]) * BLOCK)
        disk.commit()
        disk.put_over(store.freeze(("a",), SIZE, disk.layers[0]))
    assert disk.map.write(3 * BLOCK, b"4" * BLOCK)
    merge, _ = begin_merge(store, [{layer.path.name for layer in disk.layers}])
    assert merge is not None
    while not merge.step():
        assert disk.map.write(0, b"5" * BLOCK)
    assert merge.finish()
    disk.join(merge.pair.upper, merge.pair.lower, store.layer_path(merge.pair.kept))
    merge.close()
    assert len(disk.layers) == 3
    assert disk.map.read(0, 4 * BLOCK) == b"".join(bytes([fill]) * BLOCK for fill in b"5234")
    disk.commit()
    disk.close()
    assert seen(store, "a") == "5234............"
    close([open_layer(store.layer_path(name)) for name in store.get(("a",)).layers])


def test_a_bug_in_merging_ends_no_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a bug")

    async def nobody() -> tuple[View, Base]:
        raise AssertionError("is not opened for that")

    async def main() -> None:
        snapshots = Snapshots(BaseDisk("disk", URL, nobody, lambda: None), tmp_path)
        snapshots.store.create(("a",), BASE, SIZE)
        for _ in range(2):
            await snapshots.merge()

    monkeypatch.setattr("imgfs.tree.snapshots.begin_merge", fail)
    trio.run(main)
    assert [record.message for record in caplog.records] == [
        "disk: a merge of layers failed: this is a bug in imgfs"
    ]
