"""Commits as a native fsync makes them: into the layer's log, without Python."""

from __future__ import annotations

import threading
from array import array
from pathlib import Path

import pytest

from imgfs._native import _map
from imgfs.overlays.layer import Layer, make_layer, open_layer
from imgfs.overlays.log import BLOCK, Batch, Kind, decode, encode, header
from tests.overlays.test_layer import SIZE, failing, ranges

#: `dirty` and a map whose target is `layer`, in a program of `failing`'s.
MAP = """
dirty = _map.SegmentMap(layer.size)
map = _map.SegmentMap(layer.size)
map.set_target(layer.store, dirty, layer.log)
"""


def written(layer: Layer) -> tuple[_map.SegmentMap, _map.SegmentMap]:
    """A map over the layer, and its account of what is dirty."""
    dirty, over = _map.SegmentMap(layer.size), _map.SegmentMap(layer.size)
    over.set_target(layer.store, dirty, layer.log)
    return over, dirty


def test_the_log_is_what_python_would_have_written(tmp_path: Path) -> None:
    make_layer(tmp_path / "layer", SIZE)
    layer = open_layer(tmp_path / "layer", writable=True)
    over, dirty = written(layer)
    assert over.write(3 * BLOCK, b"x" * (2 * BLOCK)) and over.zero(9 * BLOCK, 10 * BLOCK)
    assert over.sync() and layer.log.native_commits == 1
    assert dirty.ranges() == ranges()
    assert over.write(0, b"y" * BLOCK) and over.sync()
    layer.close()
    first = (3 * BLOCK, 5 * BLOCK, Kind.DATA, 9 * BLOCK, 10 * BLOCK, Kind.ZERO)
    batches = [Batch(1, SIZE, array("Q", first))]
    batches.append(Batch(2, SIZE, array("Q", (0, BLOCK, Kind.DATA))))
    wanted = header(SIZE) + b"".join(encode(each) for each in batches)
    assert (tmp_path / "layer" / "log").read_bytes() == wanted
    assert decode(wanted, "the log")[0] == batches
    layer = open_layer(tmp_path / "layer")
    assert layer.ranges() == (
        array("Q", (0, 3 * BLOCK, 9 * BLOCK)),
        array("Q", (BLOCK, 5 * BLOCK, 10 * BLOCK)),
        bytes((_map.STORE, _map.STORE, _map.ZERO)),
    )
    layer.close()


def test_what_only_python_can_do_is_left_to_it(tmp_path: Path) -> None:
    make_layer(tmp_path / "layer", SIZE)
    layer = open_layer(tmp_path / "layer", writable=True)
    over, dirty = written(layer)
    over.write(0, b"x" * BLOCK)
    layer.log.hold()
    assert not over.sync()
    layer.log.release()
    layer.resize(2 * SIZE)
    over.resize(2 * SIZE)
    assert not over.sync()  # the log does not know of the size
    layer.commit(dirty.take(), 2 * SIZE)
    assert not over.sync()  # and who took it has not said that all is well
    dirty.settle()
    assert over.sync() and layer.log.native_commits == 0
    over.write(BLOCK, b"x" * BLOCK)
    assert over.sync() and layer.log.native_commits == 1
    layer.close()


def test_what_is_below_again_is_left_to_python(tmp_path: Path) -> None:
    make_layer(tmp_path / "layer", SIZE)
    layer = open_layer(tmp_path / "layer", writable=True)
    over, dirty = written(layer)
    below = _map.SegmentMap(SIZE)
    below.set_zero(0, SIZE)
    over.write(0, b"x" * (2 * BLOCK))
    assert over.sync()
    assert over.below(0, BLOCK, below)
    over.write(4 * BLOCK, b"x" * BLOCK)
    assert not over.sync()
    taken = dirty.take()
    assert taken[2] == bytes((_map.BELOW, _map.STORE))  # nothing of it was taken, and put back
    layer.commit(taken, SIZE)
    dirty.settle()
    assert layer.ranges() == ranges((1, 1, _map.STORE), (4, 1, _map.STORE))
    over.write(5 * BLOCK, b"x" * BLOCK)
    assert over.sync() and layer.log.native_commits == 2
    layer.close()
    layer = open_layer(tmp_path / "layer")
    assert layer.ranges() == ranges((1, 1, _map.STORE), (4, 2, _map.STORE))
    layer.close()


def test_a_long_log_is_left_to_python_to_compact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_layer(tmp_path / "layer", SIZE)
    layer = open_layer(tmp_path / "layer", writable=True)
    over, dirty = written(layer)
    with monkeypatch.context() as patch:
        patch.setattr("imgfs.overlays.layer._COMPACT", 1 << 40)
        while layer.log.end <= 1 << 20:
            layer.commit(ranges(*[(1, 1, _map.ZERO)] * 10000), SIZE)
    over.write(0, b"y" * BLOCK)
    assert not over.sync()
    layer.commit(dirty.take(), SIZE)
    dirty.settle()
    assert layer.log.end < 4096
    over.write(BLOCK, b"y" * BLOCK)
    assert over.sync()
    layer.close()
    layer = open_layer(tmp_path / "layer")
    assert layer.ranges() == ranges((0, 2, _map.STORE))
    layer.close()


def test_many_at_once(tmp_path: Path) -> None:
    """Each that has returned covers what its thread had written by then."""
    make_layer(tmp_path / "layer", SIZE)
    layer = open_layer(tmp_path / "layer", writable=True)
    over, _ = written(layer)
    missing: list[int] = []

    def work(first: int) -> None:
        for block in range(first, SIZE // BLOCK, 4):
            over.write(block * BLOCK, b"%04d" % block * (BLOCK // 4))
            if not over.sync() or layer.state.segments(block * BLOCK, 1)[0][2] != _map.STORE:
                missing.append(block)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert missing == []
    layer.close()
    layer = open_layer(tmp_path / "layer")
    assert layer.ranges() == ranges((0, SIZE // BLOCK, _map.STORE))
    layer.close()


def test_a_disk_that_lost_data_once(tmp_path: Path) -> None:
    code = """
map.write(0, b"x" * 4096)
print(map.sync(), map.sync(), end=" ")
commit((0, 1, _map.STORE))
print(map.sync())
"""
    assert failing("fdatasync", "1", MAP + code, tmp_path / "layer") == "False False 5 False"


def test_a_disk_that_lost_data_of_blocks_that_were_written_before(tmp_path: Path) -> None:
    """The log needs to hear nothing of them: the first two are its commit."""
    code = """
map.write(0, b"x" * 4096)
print(map.sync(), end=" ")
map.write(0, b"y" * 4096)
print(map.sync(), map.sync(), end=" ")
commit()
"""
    assert failing("fdatasync", "3", MAP + code, tmp_path / "layer") == "True False False 5"


def test_a_log_that_could_not_be_appended_to(tmp_path: Path) -> None:
    code = """
map.write(4096, b"x" * 4096)
print(map.sync(), map.sync(), end=" ")
layer.commit(dirty.take(), layer.size)
dirty.settle()
map.write(0, b"x" * 4096)
print(map.sync())
layer.close()
"""
    assert failing("fdatasync", "2", MAP + code, tmp_path / "layer") == "False False True"
    layer = open_layer(tmp_path / "layer")
    assert layer.ranges() == ranges((0, 2, _map.STORE))
    layer.close()
