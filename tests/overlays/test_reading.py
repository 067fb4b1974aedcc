"""Layers that are only read are open once, whoever stands on them."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest

from imgfs._native import _map
from imgfs.errors import LayerHeld
from imgfs.overlays import reading
from imgfs.overlays.layer import Layer
from imgfs.overlays.locks import LayerLock
from imgfs.overlays.log import BLOCK
from imgfs.overlays.merge import begin_merge
from imgfs.overlays.reading import open_to_read
from imgfs.overlays.store import Base, SnapshotStore

SIZE = 8 * BLOCK
BASE = Base("file:///d/disk.img", SIZE, "raw", "stat", "1")


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(BASE.url, tmp_path)


def put(layer: Layer, block: int, fill: bytes) -> None:
    layer.store.write(block * BLOCK, fill * BLOCK)
    start = block * BLOCK
    stored = bytes([_map.STORE])
    layer.commit((array("Q", [start]), array("Q", [start + BLOCK]), stored), layer.size)


def open_files(store: SnapshotStore) -> int:
    """Of this store: what other tests have left goes when the collector comes."""
    links = [str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return sum(link.startswith(str(store.directory)) for link in links)


def close(*chains: list[Layer]) -> None:
    for layers in chains:
        for layer in layers:
            layer.close()


def test_who_stands_on_the_same_layer_shares_it(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    a = store.open_layers(("a",), writable=True)
    put(a[0], 0, b"1")
    fresh = store.create(("a", "b"), BASE, SIZE, a[0])
    assert fresh is not None
    b = store.open_layers(("a", "b"), writable=True)
    assert b[1] is a[0]  # what its writer froze, too
    c = open_to_read(a[0].path)
    close([fresh, *a], [c])
    assert b[1].store.read(0, 1) == b"1"
    with pytest.raises(LayerHeld):
        LayerLock(b[1].path, writes=True)
    close(b)
    LayerLock(b[1].path, writes=True).close()
    again = open_to_read(b[1].path)
    assert again is not b[1]
    close([again])


def test_what_is_closed_is_not_given_whoever_refers_to_it(store: SnapshotStore) -> None:
    """A layer is known until it is closed, not until the collector comes."""
    store.create(("a",), BASE, SIZE)
    top = store.open_layers(("a",), writable=True)
    path = top[0].path
    close(top)
    kept = [open_to_read(path)]
    for _ in range(3):
        assert open_to_read(path) is kept[-1]
        kept[-1].close()
        assert path in reading._open
        kept[-1].close()
        assert path not in reading._open
        kept.append(open_to_read(path))
        assert kept[-1] not in kept[:-1]
    close(kept[-1:])


def test_a_layer_that_cannot_be_held_gives_its_place(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    top = store.open_layers(("a",), writable=True)
    path = top[0].path
    close(top)
    old = open_to_read(path)
    (path / "log").write_bytes((path / "log").read_bytes())
    (path / "data").rename(path / "old")
    (path / "data").write_bytes((path / "old").read_bytes())
    fresh = open_to_read(path)
    assert fresh is not old
    close([old])
    assert open_to_read(path) is fresh  # the old one took nobody's name but its own
    close([fresh, fresh])
    assert path not in reading._open


def test_descriptors_of_a_hundred_deep(store: SnapshotStore) -> None:
    """Each has the layers of all those above it."""
    chains: list[list[Layer]] = []
    for depth in range(1, 101):
        path = tuple(f"s{number}" for number in range(depth))
        fresh = store.create(path, BASE, SIZE, chains[-1][0] if chains else None)
        if fresh is not None:
            chains[-1].insert(0, fresh)
        chains.append(store.open_layers(path, writable=True))
        put(chains[-1][0], depth % 8, b"x")
    opened = open_files(store)
    assert sum(map(len, chains)) == 100 * 101 // 2 + 99
    assert opened < 100 * 2 * 6, opened
    close(*chains)
    chains.clear()
    del fresh
    assert open_files(store) == 0


def test_what_was_changed_by_a_merge_is_opened_anew(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    for block, fill in ((0, b"1"), (1, b"2")):
        layers = store.open_layers(("a",), writable=True)
        put(layers[0], block, fill)
        close([store.freeze(("a",), SIZE, layers[0])], layers)
    before = store.open_layers(("a",), writable=True)
    merge, _ = begin_merge(store, [{layer.path.name for layer in before}])
    assert merge is not None
    while not merge.step():
        pass
    known = {layer.path.name: layer for layer in before}
    during = open_to_read(store.layer_path(merge.pair.kept))
    assert during is not known[merge.pair.kept]
    assert [during.store.read(block * BLOCK, 1) for block in (0, 1)] == [b"1", b"2"]
    assert len(during.state) == 2  # both blocks, and what is below
    assert merge.finish()
    merge.close()
    after = store.get(("a",)).layers
    assert after == (before[0].path.name, merge.pair.kept)
    later = open_to_read(store.layer_path(merge.pair.kept))
    assert later is during
    close(before, [during, later])


def test_what_was_replaced_is_opened_anew(store: SnapshotStore) -> None:
    store.create(("a",), BASE, SIZE)
    path = store.layer_path(store.get(("a",)).layers[0])
    first = open_to_read(path)
    for name in ("data", "log"):
        content = (path / name).read_bytes()
        (path / "fresh").write_bytes(content)
        (path / "fresh").rename(path / name)
        second = open_to_read(path)
        assert second is not first
        close([first])
        first = second
    close([first])
