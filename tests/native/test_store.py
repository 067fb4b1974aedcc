"""Block stores: present bits, age, and readers against eviction."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from pathlib import Path

import pytest

from imgfs._native import _map

BLOCK = 4096


def make(path: Path, blocks: int) -> _map.Store:
    with path.open("w+b") as file:
        file.truncate(blocks * BLOCK)
        return _map.Store(file.fileno(), blocks * BLOCK, BLOCK)


def test_present_missing_and_oldest(tmp_path: Path) -> None:
    store = make(tmp_path / "s", 300)
    assert store.missing(0, 300 * BLOCK) == [(0, 300)]
    assert store.oldest(5) == [] and store.oldest_age() == -1
    assert store.set_present(10, 5) == 5
    assert store.set_present(12, 5) == 2
    assert store.missing(9 * BLOCK + 1, 10 * BLOCK) == [(9, 1), (17, 3)]
    assert store.present == 7
    time.sleep(0.1)
    assert store.is_present(10 * BLOCK, BLOCK)  # makes 10 the youngest
    assert store.oldest(6) == [(11, 6)]
    assert store.clear_present(0, 300) == 7
    with pytest.raises(ValueError, match="outside"):
        store.set_present(299, 2)


def test_short_file_is_an_error_not_zeroes(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(b"a" * 100)
    with path.open("rb") as file:
        store = _map.Store(file.fileno(), 200, whole=True)
    m = _map.SegmentMap(200)
    m.set_store(0, 200, store, 0)
    assert m.read(0, 100) == b"a" * 100
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        m.read(50, 100)


@pytest.mark.parametrize("size", [5 * 65536, 5 * 65536 - 1, 4 * 65536 + 5000, 1])
def test_punched_to_the_end_takes_no_room(tmp_path: Path, size: int) -> None:
    path = tmp_path / "s"
    path.write_bytes(b"a" * size)
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        store = _map.Store(file.fileno(), size)
    assert path.stat().st_blocks
    store.punch(0, size)
    assert (path.stat().st_blocks, path.read_bytes()) == (0, bytes(size))


def test_what_is_written_behind_a_whole_store_stays(tmp_path: Path) -> None:
    size = 5 * 65536 - 1000
    path = tmp_path / "s"
    path.write_bytes(b"a" * size)
    with path.open("r+b") as file:
        store = _map.Store(file.fileno(), size, whole=True)
        os.pwrite(file.fileno(), b"b" * 500, size)
    store.punch(0, size)
    assert path.read_bytes() == bytes(size) + b"b" * 500


def test_readers_never_see_an_evicted_block(tmp_path: Path) -> None:
    """A reader gets the block's own bytes or nothing, while blocks are filled and punched."""
    blocks = 64
    store = make(tmp_path / "s", blocks)
    m = _map.SegmentMap(blocks * BLOCK)
    m.set_store(0, blocks * BLOCK, store, 0)
    content = [bytes([i + 1]) * BLOCK for i in range(blocks)]
    stop = threading.Event()
    wrong: list[int] = []
    hits = [0]

    def read() -> None:
        rng = random.Random(threading.get_ident())
        while not stop.is_set():
            i = rng.randrange(blocks)
            data = m.read(i * BLOCK, BLOCK)
            if data is not None:
                hits[0] += 1
                if data != content[i]:
                    wrong.append(i)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    rng = random.Random(1)
    deadline = time.monotonic() + (20 if os.environ.get("IMGFS_TEST_LONG") else 2)
    while time.monotonic() < deadline:
        i = rng.randrange(blocks)
        if store.clear_present(i, 1):
            store.quiesce()
            store.punch(i * BLOCK, BLOCK)
        else:
            store.write(i * BLOCK, content[i])
            store.set_present(i, 1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert hits[0] > 0
