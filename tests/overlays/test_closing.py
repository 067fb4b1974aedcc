"""What a crash leaves in a layer takes no space, and what is cut off of a closed one is noticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imgfs._native import _map
from imgfs.errors import CorruptSnapshot
from imgfs.overlays.layer import make_layer, open_layer, stored_bytes
from imgfs.overlays.log import BLOCK

from .test_layer import SIZE, ranges


def test_a_log_that_was_cut_since_it_was_closed(tmp_path: Path) -> None:
    make_layer(tmp_path / "layer", SIZE)
    log = tmp_path / "layer/log"
    ends = []
    for block in range(3):
        layer = open_layer(tmp_path / "layer", writable=True)
        layer.commit(ranges((block, 1, _map.ZERO)), SIZE)
        layer.close()
        ends.append(log.stat().st_size)
    good = log.read_bytes()
    for end in reversed(range(len(good))):
        os.truncate(log, end)
        for writable in (False, True):
            with pytest.raises(CorruptSnapshot, match=r"^[^ ]*/log: "):
                open_layer(tmp_path / "layer", writable=writable)
    log.write_bytes(good)
    open_layer(tmp_path / "layer", writable=True).close()


def test_what_a_crash_leaves_of_the_mark(tmp_path: Path) -> None:
    make_layer(tmp_path / "layer", SIZE)
    open_layer(tmp_path / "layer", writable=True).close()
    mark = tmp_path / "layer/closed"
    good = mark.read_bytes()
    for end in range(len(good) - 1):
        mark.write_bytes(good[:end])
        open_layer(tmp_path / "layer").close()


def test_a_compacted_log_may_be_shorter(tmp_path: Path) -> None:
    make_layer(tmp_path / "layer", SIZE)
    layer = open_layer(tmp_path / "layer", writable=True)
    for _ in range(50):
        layer.commit(ranges((0, 1, _map.ZERO)), SIZE)
    layer.close()
    layer = open_layer(tmp_path / "layer", writable=True)
    layer._compact()
    layer.unlock()
    again = open_layer(tmp_path / "layer", writable=True)  # as after a kill
    assert again.state.segments(0, BLOCK)[0][2] == _map.ZERO
    again.close()


def test_stray_bytes_take_no_space(tmp_path: Path) -> None:
    make_layer(tmp_path / "layer", SIZE)
    layer = open_layer(tmp_path / "layer", writable=True)
    layer.store.write(0, b"x" * 20 * BLOCK)
    layer.commit(ranges((2, 3, _map.STORE), (8, 2, _map.ZERO), (19, 1, _map.STORE)), SIZE)
    layer.unlock()  # and no more: a crash
    assert stored_bytes(layer.path) >= 20 * BLOCK
    again = open_layer(tmp_path / "layer", writable=True)
    assert stored_bytes(layer.path) in (4 * BLOCK, 5 * BLOCK)
    for block in (2, 3, 4, 19):
        assert again.store.read(block * BLOCK, BLOCK) == b"x" * BLOCK
    again.close()
