"""Ranges of a store that are in memory: found, read, counted, and let go."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from imgfs._native import _map

BLOCK = 4096
BLOCKS = 16


class Owned(bytearray):
    """Something whose end can be seen."""


def make(path: Path) -> tuple[_map.Store, _map.SegmentMap]:
    path.write_bytes(b"f" * (BLOCKS * BLOCK))
    with path.open("r+b") as file:
        store = _map.Store(file.fileno(), BLOCKS * BLOCK, BLOCK)
    m = _map.SegmentMap(BLOCKS * BLOCK)
    m.set_store(0, BLOCKS * BLOCK, store, 0)
    return store, m


def test_it_is_read_where_the_file_has_nothing(tmp_path: Path) -> None:
    store, m = make(tmp_path / "s")
    store.set_present(0, 2)
    assert store.hold(2 * BLOCK, b"h" * (3 * BLOCK))
    store.set_present(5, 1)
    assert m.read(0, 6 * BLOCK) == b"f" * 2 * BLOCK + b"h" * 3 * BLOCK + b"f" * BLOCK
    assert store.missing(0, BLOCKS * BLOCK) == [(6, 10)]
    assert store.present == 3  # of the file
    assert m.read(6 * BLOCK, 1) is None
    assert not store.unhold(2 * BLOCK, BLOCK)
    assert store.unhold(2 * BLOCK, 3 * BLOCK) and not store.unhold(2 * BLOCK, 3 * BLOCK)
    assert m.read(2 * BLOCK, 1) is None
    assert store.missing(0, 3 * BLOCK) == [(2, 1)]


def test_a_part_of_a_block_is_no_more_than_that(tmp_path: Path) -> None:
    store, m = make(tmp_path / "s")
    assert store.hold(BLOCK, b"h" * 100)
    assert m.read(BLOCK, 100) == b"h" * 100
    assert m.read(BLOCK, 101) is None
    assert store.missing(BLOCK, 100) == []
    assert store.missing(BLOCK, 101) == [(1, 1)]


def test_what_is_left_to_be_read(tmp_path: Path) -> None:
    store, m = make(tmp_path / "s")
    assert store.hold(BLOCK, b"h" * (2 * BLOCK))
    assert store.held_left(BLOCK, 2 * BLOCK) == 2 * BLOCK
    m.read(BLOCK, 1000)
    assert store.held_left(BLOCK, 2 * BLOCK) == 2 * BLOCK - 1000
    for _ in range(3):
        m.read(2 * BLOCK, BLOCK)
    assert store.held_left(BLOCK, 2 * BLOCK) == 0
    assert store.held_left(5 * BLOCK, BLOCK) == 0
    assert store.bytes_served == 1000 + 3 * BLOCK


def test_it_lives_until_it_is_let_go(tmp_path: Path) -> None:
    store, m = make(tmp_path / "s")
    data = Owned(b"h" * BLOCK)
    seen = weakref.ref(data)
    assert store.hold(0, data) and store.hold(BLOCK, Owned(BLOCK))
    del data
    gc.collect()
    assert seen() is not None and m.read(0, BLOCK) == b"h" * BLOCK
    store.unhold(0, BLOCK)
    assert seen() is None


def test_a_map_outlives_it(tmp_path: Path) -> None:
    """The map keeps the store itself; the memory goes with the Store that was given it."""
    store, m = make(tmp_path / "s")
    data = Owned(b"h" * BLOCK)
    seen = weakref.ref(data)
    assert store.hold(0, data)
    del data, store
    gc.collect()
    assert seen() is None and m.read(0, BLOCK) is None


def test_bad_ranges(tmp_path: Path) -> None:
    store, _ = make(tmp_path / "s")
    for offset, data in ((0, b""), (BLOCKS * BLOCK, b"x"), (2**64 - 1, b"x")):
        with pytest.raises(ValueError, match="outside"):
            store.hold(offset, data)
    held = 0
    while store.hold(held, b"x"):
        held += 1
    assert 64 <= held < BLOCK
    assert store.unhold(7, 1) and store.hold(7, b"x")


def test_zeroes_are_found_without_writing(tmp_path: Path) -> None:
    store, _ = make(tmp_path / "s")
    data = b"x" * BLOCK + bytes(2 * BLOCK) + b"x"
    assert store.find_nonzero(BLOCK, data) == ([(1, 1), (4, 1)], [(2 * BLOCK, 4 * BLOCK)])
    assert (tmp_path / "s").read_bytes() == b"f" * (BLOCKS * BLOCK)
