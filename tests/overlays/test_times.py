"""A layer's file keeps the time at which the disk over it changed last."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from imgfs.overlays.layer import Layer, make_layer, open_layer
from imgfs.overlays.log import BLOCK
from imgfs.overlays.store import Base, SnapshotStore
from imgfs.overlays.times import changed_ns, is_certain

SIZE = 16 * BLOCK
WHEN = 1_234_567_890_123_456_789
BASE = Base("ssh://host/disk.raw", SIZE, "raw", "stat", "token")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_layer(tmp_path / "layer", SIZE, WHEN)
    return tmp_path / "layer"


def left_open(layer: Layer) -> None:
    """As by a kill: nothing says that it was closed."""
    layer.is_writable = False
    layer.close()


def put(layer: Layer) -> None:
    layer.store.write(0, b"x" * BLOCK)


def as_before_this_boot(path: Path) -> None:
    os.utime(path / "data", ns=(0, WHEN))
    os.utime(path, ns=(0, WHEN))


def test_a_new_layer_has_the_time_that_it_is_given(path: Path) -> None:
    assert changed_ns(path) == WHEN
    layer = open_layer(path, writable=True)
    assert layer.times()[0] == WHEN
    assert abs(layer.times()[1] / 1e9 - time.time()) < 60
    layer.close()
    assert changed_ns(path) == WHEN


def test_what_is_written_and_what_is_set(path: Path) -> None:
    layer = open_layer(path, writable=True)
    put(layer)
    written = layer.times()[0]
    assert abs(written / 1e9 - time.time()) < 60
    layer.close()
    layer = open_layer(path, writable=True)
    assert layer.times()[0] == written
    layer.set_mtime(WHEN + 1)
    assert layer.times()[0] == WHEN + 1
    layer.set_mtime(None)
    assert abs(layer.times()[0] / 1e9 - time.time()) < 60
    last = layer.times()
    layer.close()
    assert layer.times() == last  # of a closed one: what it was


def test_a_kill_keeps_it_though_what_is_not_the_layers_is_punched(path: Path) -> None:
    layer = open_layer(path, writable=True)
    put(layer)
    written = layer.times()[0]
    left_open(layer)
    assert is_certain(path)
    layer = open_layer(path, writable=True)
    assert os.fstat(layer.data).st_blocks == 0
    assert layer.times()[0] == written
    left_open(layer)


def test_after_a_power_loss_it_is_now(path: Path) -> None:
    layer = open_layer(path, writable=True)
    put(layer)
    left_open(layer)
    as_before_this_boot(path)
    assert not is_certain(path)
    began = time.time_ns()
    reader = open_layer(path)
    assert reader.times()[0] >= began
    reader.close()
    layer = open_layer(path, writable=True)
    shown = layer.times()[0]
    assert shown >= began
    left_open(layer)
    assert changed_ns(path) == shown  # killed this time


def test_a_layer_that_was_closed_or_never_written_is_certain(path: Path) -> None:
    as_before_this_boot(path)
    assert changed_ns(path) == WHEN
    layer = open_layer(path, writable=True)
    put(layer)
    layer.commit(layer.ranges(), SIZE)
    layer.set_mtime(WHEN)
    layer.close()
    as_before_this_boot(path)
    assert changed_ns(path) == WHEN


def test_snapshots_have_the_time_of_what_they_are_taken_of(tmp_path: Path) -> None:
    store = SnapshotStore(BASE.url, tmp_path)
    store.create(("a",), BASE, SIZE, mtime_ns=WHEN)

    def time_of(*names: str) -> int:
        return changed_ns(store.layer_path(store.get(names).layers[0]))

    assert time_of("a") == WHEN
    layers = store.open_layers(("a",), writable=True)
    put(layers[0])
    written = layers[0].times()[0]
    fresh = store.freeze(("a",), SIZE, layers[0])
    assert fresh.times()[0] == written
    store.create(("a", "b"), BASE, SIZE, fresh)
    assert time_of("a", "b") == written
    for layer in (fresh, *layers):
        layer.close()
    store.create(("a", "c"), BASE, SIZE)
    assert time_of("a", "c") == time_of("a") == written
