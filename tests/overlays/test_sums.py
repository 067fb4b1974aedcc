"""Whatever happens to a layer's files: right bytes, or an error that names the file; never others.

Layers are damaged while they are closed, as a disk does it, and then read.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs._native import _map
from imgfs.errors import CorruptSnapshot
from imgfs.overlays.layer import Layer, make_layer, open_layer
from imgfs.overlays.log import BLOCK, header
from imgfs.overlays.merge import begin_merge
from imgfs.overlays.store import SnapshotStore
from imgfs.overlays.sums import Trust

from .test_layer import ranges
from .test_store import BASE, SIZE, URL, opened

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
FLIPS = 10_000 if LONG else 300
MIB = 1 << 20
SMALL = 9 * BLOCK + 777
Seen = list[tuple[int, int, int, bytes]]


def written(path: Path, size: int, *blocks: tuple[int, bytes]) -> None:
    """Make a layer of these blocks, and one of zeroes at its end; closed."""
    make_layer(path, size)
    layer = open_layer(path, writable=True)
    for block, data in blocks:
        layer.store.write(block * BLOCK, data)
    kinds = [(block, len(data) // BLOCK, _map.STORE) for block, data in blocks]
    layer.commit(ranges(*kinds, (size // BLOCK - 1, 1, _map.ZERO)), size)
    layer.close()


def small(path: Path) -> None:
    written(path, SMALL, (1, os.urandom(2 * BLOCK)), (5, os.urandom(BLOCK)))


def seen(path: Path) -> Seen:
    """All that the layer says of the disk."""
    layer = open_layer(path)
    try:
        found = []
        for start, end, kind, _ in layer.state.segments(0, layer.size):
            data = layer.state.read(start, end - start) if kind == _map.STORE else b""
            found.append((start, end, kind, data or b""))
        return found
    finally:
        layer.close()


def is_noticed(path: Path, wanted: Seen, look: Callable[[Path], Seen] = seen) -> bool:
    """Is it an error, which says in which of the layer's files?  Else it must be right."""
    try:
        found = look(path)
    except CorruptSnapshot as exc:
        assert str(exc).startswith(f"{path}/") and "\n" not in str(exc)
        return True
    assert found == wanted
    return False


def flip(path: Path, at: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))


def test_every_byte_of_a_small_layer(tmp_path: Path) -> None:
    path, size = tmp_path / "layer", 2 * BLOCK + 777
    make_layer(path, size)
    layer = open_layer(path, writable=True)
    layer.store.write(BLOCK, os.urandom(size - BLOCK))
    stored = array("Q", [BLOCK]), array("Q", [size]), bytes([_map.STORE])
    layer.commit(stored, size)
    layer.close()
    wanted = seen(path)
    rng = random.Random(1)
    noticed = dict.fromkeys(("data", "sums", "log", "closed", "boot"), 0)
    for name in noticed:
        for at in range((path / name).stat().st_size):
            mask = 1 << rng.randrange(8)
            flip(path / name, at, mask)
            noticed[name] += is_noticed(path, wanted)
            flip(path / name, at, mask)
    assert noticed["data"] == size - BLOCK and noticed["sums"] == 2 * 4  # all that is the layer's
    assert noticed["log"] == (path / "log").stat().st_size
    assert seen(path) == wanted


def test_damage_when_it_is_written_again(tmp_path: Path) -> None:
    """What is damaged does not become good by closing the layer, nor by writing beside it."""
    path, keep = tmp_path / "layer", tmp_path / "keep"
    small(path)
    wanted = seen(path)
    shutil.copytree(path, keep)
    rng = random.Random(2)
    for name in ("data", "sums", "log", "closed"):
        size = (path / name).stat().st_size
        for at in sorted(rng.sample(range(size), min(size, 40))):
            flip(path / name, at, 1 << rng.randrange(8))
            try:
                layer = open_layer(path, writable=True)
                layer.commit(ranges(), layer.size)
                try:
                    layer.store.write(5 * BLOCK + 10, layer.store.read(5 * BLOCK + 10, 1))
                finally:
                    layer.close()
            except CorruptSnapshot as exc:
                assert str(exc).startswith(f"{path}/")
            is_noticed(path, wanted)
            shutil.rmtree(path)
            shutil.copytree(keep, path)


def test_every_truncation_of_a_small_layer(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    small(path)
    wanted = seen(path)
    for name in ("data", "sums", "log", "closed", "boot"):
        good = (path / name).read_bytes()
        ends = range(len(good)) if len(good) < BLOCK else range(0, len(good), 97)
        for end in ends:
            os.truncate(path / name, end)
            is_wrong = is_noticed(path, wanted)
            assert is_wrong or name in ("closed", "boot")
            (path / name).write_bytes(good)
    assert not is_noticed(path, wanted)


@pytest.mark.parametrize("name", ["data", "sums", "log"])
def test_a_file_that_is_gone(tmp_path: Path, name: str) -> None:
    path = tmp_path / "layer"
    small(path)
    wanted = seen(path)
    (path / name).unlink()
    assert is_noticed(path, wanted)
    with pytest.raises(CorruptSnapshot, match=rf"/{name}: is missing"):
        open_layer(path, writable=True)


def swap(one: Path, at: int, other: Path, other_at: int, length: int = BLOCK) -> None:
    with one.open("r+b") as a, other.open("r+b") as b:
        first, second = os.pread(a.fileno(), length, at), os.pread(b.fileno(), length, other_at)
        os.pwrite(a.fileno(), second, at)
        os.pwrite(b.fileno(), first, other_at)


def test_swapped_blocks(tmp_path: Path) -> None:
    """In one file, and between files of two layers that look alike."""
    layers = [tmp_path / "one", tmp_path / "other"]
    size = 12 * MIB  # so that `sums` has three blocks
    for path in layers:
        places = (0, 1, 1024, 2048)
        written(path, size, *((block, os.urandom(BLOCK)) for block in places))
    one, other = layers
    wanted = [seen(path) for path in layers]

    def noticed() -> list[bool]:
        return [is_noticed(path, all) for path, all in zip(layers, wanted, strict=True)]

    for first, second in ((0, 1), (0, 1024), (1, 5)):
        swap(one / "data", first * BLOCK, one / "data", second * BLOCK)
        assert noticed() == [True, False]
        swap(one / "data", first * BLOCK, one / "data", second * BLOCK)
    swap(one / "sums", 0, one / "sums", BLOCK)
    assert noticed() == [True, False]
    swap(one / "sums", 0, one / "sums", BLOCK)
    for name in ("data", "sums"):
        swap(one / name, BLOCK, other / name, BLOCK)
        assert noticed() == [True, True]
        swap(one / name, BLOCK, other / name, BLOCK)
    assert noticed() == [False, False]


def test_whole_files_of_another_layer(tmp_path: Path) -> None:
    """Of the same size, and of other blocks, so that their logs differ in nothing else."""
    one, other = tmp_path / "one", tmp_path / "other"
    written(one, SMALL, (1, os.urandom(BLOCK)))
    written(other, SMALL, (2, os.urandom(BLOCK)))
    wanted = seen(one)
    for name in ("data", "sums", "log", "closed"):
        (one / name).rename(tmp_path / "kept")
        shutil.copy(other / name, one / name)
        assert is_noticed(one, wanted) or name == "closed"
        (tmp_path / "kept").rename(one / name)
    assert not is_noticed(one, wanted)


@pytest.mark.timeout(1200)
def test_random_bytes_of_a_large_layer(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    rng = random.Random(3)
    blocks = [(block, os.urandom(8 * BLOCK)) for block in range(0, 16384, 64)]
    blocks += [(2 * block + 40, os.urandom(BLOCK)) for block in range(0, 8000, 32)]
    written(path, 64 * MIB, *blocks)
    own = dict(sorted((block + n, data[n * BLOCK :][:BLOCK]) for block, data in blocks
                      for n in range(len(data) // BLOCK)))  # fmt: skip
    places = list(own)

    def look(block: int) -> Callable[[Path], Seen]:
        def read(path: Path) -> Seen:
            layer = open_layer(path)
            try:
                return [(block, 0, 0, layer.state.read(block * BLOCK, BLOCK) or b"")]
            finally:
                layer.close()

        return read

    for _ in range(FLIPS):
        name = rng.choice(("data", "data", "sums", "sums", "log"))
        block = rng.choice(places)
        size = (path / name).stat().st_size
        at = {"data": block * BLOCK + rng.randrange(BLOCK), "sums": block * 4 + rng.randrange(4)}
        where, mask = at.get(name, rng.randrange(size)), 1 << rng.randrange(8)
        flip(path / name, where, mask)
        assert is_noticed(path, [(block, 0, 0, own[block])], look(block))
        flip(path / name, where, mask)
        other = rng.choice(places)
        assert not is_noticed(path, [(other, 0, 0, own[other])], look(other))


def test_the_end_of_the_disk_moves(tmp_path: Path) -> None:
    """Inside of a block, to and fro, with what was sealed there."""
    path = tmp_path / "layer"
    small(path)
    rng = random.Random(4)
    size = SMALL
    for _ in range(60):
        layer = open_layer(path, writable=True)
        for _ in range(rng.randrange(3)):
            size = rng.randrange(1, 12 * BLOCK)
            layer.resize(size)
            layer.store.seal(0, 9)
            start = rng.randrange(size) // BLOCK * BLOCK
            length = min(BLOCK, size - start)
            layer.store.write(start, os.urandom(length))
            layer.store.seal(0, 9)
            stored = ranges((start // BLOCK, 1, _map.STORE))
            stored[1][0] = start + length
            layer.commit(stored, size)
        layer.close()
        seen(path)


KILLED = """
import os, signal, sys
from pathlib import Path
from imgfs._native import _map
from imgfs.overlays.layer import open_layer
from tests.overlays.test_layer import BLOCK, ranges
layer = open_layer(Path(sys.argv[1]), writable=True)
layer.store.write(2 * BLOCK, b"a" * 3 * BLOCK)
layer.commit(ranges((2, 3, _map.STORE)), layer.size)
while layer.store.seal(0, 9):
    pass
layer.store.write(3 * BLOCK + 5, b"b" * 10)
layer.store.write(7 * BLOCK, b"c" * BLOCK)
layer.commit(ranges((7, 1, _map.STORE)), layer.size)
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(path: Path) -> None:
    small(path)
    done = subprocess.run([sys.executable, "-c", KILLED, path], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


def test_after_a_kill(tmp_path: Path) -> None:
    """What has a sum is as safe as in a closed layer; what has none yet is good."""
    path = tmp_path / "layer"
    killed(path)
    wanted = seen(path)
    assert wanted[1][3][BLOCK:][:BLOCK] == b"a" * BLOCK
    for block, can_tell in ((1, True), (2, True), (3, False), (4, True), (5, True), (7, False)):
        for name in ("data", "sums"):
            if can_tell:
                at = block * (BLOCK if name == "data" else 4) + 1
                flip(path / name, at, 4)
                assert is_noticed(path, wanted)
                flip(path / name, at, 4)
    layer = open_layer(path, writable=True)
    assert layer.trust == Trust.KILLED
    layer.close()
    assert seen(path) == wanted
    for block in (1, 2, 3, 4, 5, 7):
        flip(path / "data", block * BLOCK, 4)
        assert is_noticed(path, wanted)
        flip(path / "data", block * BLOCK, 4)


def test_after_the_machine_went_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What disagrees is as good as can be told; from then on it is known again."""
    path = tmp_path / "layer"
    killed(path)
    flip(path / "data", 4 * BLOCK, 4)
    wanted = [
        (start, end, kind, data[: 3 * BLOCK] + bytes([data[3 * BLOCK] ^ 4]) + data[3 * BLOCK + 1 :])
        if start == BLOCK
        else (start, end, kind, data)
        for start, end, kind, data in seen_after(path, 4 * BLOCK)
    ]
    monkeypatch.setattr("imgfs.overlays.sums.boot_id", lambda: "the next one")
    assert seen(path) == wanted
    layer = open_layer(path, writable=True)
    assert layer.trust == Trust.DOUBT
    layer.unlock()  # and killed again: there is doubt still
    layer = open_layer(path, writable=True)
    assert layer.trust == Trust.DOUBT
    caplog.clear()
    layer.close()
    assert [record.getMessage().partition(":")[2].split()[0] for record in caplog.records] == ["1"]
    assert seen(path) == wanted
    flip(path / "data", 4 * BLOCK, 8)
    assert is_noticed(path, wanted)
    caplog.clear()


def seen_after(path: Path, flipped: int) -> Seen:
    flip(path / "data", flipped, 4)
    try:
        return seen(path)
    finally:
        flip(path / "data", flipped, 4)


def test_writing_onto_damage(tmp_path: Path) -> None:
    """A part of a damaged block cannot be written, nor zeroed; the whole block can."""
    path = tmp_path / "layer"
    small(path)
    flip(path / "data", BLOCK + 50, 1)
    layer = open_layer(path, writable=True)
    for offset, data in ((BLOCK, b"x"), (BLOCK + 90, b"x" * BLOCK), (0, b"x" * (BLOCK + 3))):
        with pytest.raises(CorruptSnapshot, match=r"/data: the 4 KiB at byte 4096 "):
            layer.store.write(offset, data)
    with pytest.raises(CorruptSnapshot, match=r"/data: "):
        layer.store.punch(BLOCK + 5, 10)
    with pytest.raises(CorruptSnapshot, match=r"/data: "):
        layer.store.read(BLOCK, 1)
    layer.close()
    assert is_noticed(path, [])
    layer = open_layer(path, writable=True)
    layer.store.write(BLOCK, b"y" * BLOCK)
    assert layer.store.read(BLOCK, BLOCK) == b"y" * BLOCK
    layer.close()
    assert seen(path)[1][3][:BLOCK] == b"y" * BLOCK


def test_a_hole_and_new_bytes(tmp_path: Path) -> None:
    """What was punched has no sum, in memory and in the file."""
    path = tmp_path / "layer"
    small(path)
    layer = open_layer(path, writable=True)
    layer.commit(ranges((1, 2, _map.ZERO)), layer.size)
    layer.store.punch(BLOCK, 2 * BLOCK)
    layer.close()
    assert (path / "sums").read_bytes()[4:12] == bytes(8)
    layer = open_layer(path, writable=True)
    layer.store.write(BLOCK, b"z" * 100)
    layer.store.write(BLOCK, b"z" * BLOCK)
    layer.commit(ranges((1, 1, _map.STORE)), layer.size)
    layer.close()
    assert seen(path)[1] == (BLOCK, 2 * BLOCK, _map.STORE, b"z" * BLOCK)


def test_a_layer_of_before_there_were_sums(tmp_path: Path) -> None:
    """Is read as it is, and covered once it has been written."""
    path = tmp_path / "layer"
    small(path)
    wanted = seen(path)
    old = struct.pack("<8sIIQ", b"imgfslog", 1, BLOCK, SMALL)
    with (path / "log").open("r+b") as file:
        file.write(old + struct.pack("<I", zlib.crc32(old)))
    assert len(header(SMALL)) == len(old) + 4
    number = b"%d" % (path / "log").stat().st_size
    (path / "closed").write_bytes(b"%s %08x\n" % (number, zlib.crc32(number)))
    (path / "sums").unlink()
    (path / "boot").unlink()
    assert seen(path) == wanted
    open_layer(path, writable=True).close()
    assert seen(path) == wanted
    for at in range(BLOCK, 3 * BLOCK, 500):
        flip(path / "data", at, 2)
        assert is_noticed(path, wanted)
        flip(path / "data", at, 2)


def test_a_large_empty_disk_costs_nothing(tmp_path: Path) -> None:
    size = 15 << 40
    make_layer(tmp_path / "layer", size)
    layer = open_layer(tmp_path / "layer", writable=True)
    for block in (0, size // BLOCK // 2, size // BLOCK - 1):
        layer.store.write(block * BLOCK, b"x" * BLOCK)
        layer.commit(ranges((block, 1, _map.STORE)), size)
    layer.store.punch(BLOCK, size - 2 * BLOCK)
    layer.commit(ranges((1, size // BLOCK - 2, _map.ZERO)), size)
    layer.close()
    assert (tmp_path / "layer/sums").stat().st_blocks * 512 < MIB
    layer = open_layer(tmp_path / "layer")
    assert layer.state.read(size - BLOCK, BLOCK) == b"x" * BLOCK
    layer.close()


def test_a_merge_copies_no_damage(tmp_path: Path) -> None:
    store = SnapshotStore(URL, tmp_path)
    store.create(("a",), BASE, SIZE)
    for number, block in enumerate((1, 2)):
        layers = opened(store, "a")
        layers[0].store.write(block * BLOCK, bytes([number + 1]) * BLOCK)
        layers[0].commit(ranges((block, 1, _map.STORE)), SIZE)
        fresh = store.freeze(("a",), SIZE, layers[0])
        for layer in (fresh, *layers):
            layer.close()
    _, upper, lower = (store.layer_path(name) for name in store.get(("a",)).layers)
    for path, block in ((upper, 2), (lower, 1)):  # whichever is copied
        flip(path / "data", block * BLOCK + 7, 1)
    before = {path: sums_of(path) for path in (upper, lower)}
    merge, _ = begin_merge(store, ())
    assert merge is not None
    with pytest.raises(CorruptSnapshot, match=r"/data: the 4 KiB at byte "):
        while not merge.step():
            pass
    merge.close()
    assert {path: sums_of(path) for path in (upper, lower)} == before
    layers = opened(store, "a", writable=False)
    for layer, block in zip(layers[1:], (2, 1), strict=True):
        with pytest.raises(CorruptSnapshot):
            layer.state.read(block * BLOCK, 1)
    for layer in layers:
        layer.close()


def sums_of(path: Path) -> bytes:
    return (path / "sums").read_bytes().rstrip(b"\0")


def test_each_layer_is_covered_while_it_is_merged(tmp_path: Path) -> None:
    """Who opens the merged one finds it strict, whatever of it was there before."""
    store = SnapshotStore(URL, tmp_path)
    store.create(("a",), BASE, SIZE)
    for block in (1, 2, 3):
        layers = opened(store, "a")
        layers[0].store.write(block * BLOCK, bytes([block]) * BLOCK)
        layers[0].commit(ranges((block, 1, _map.STORE)), SIZE)
        fresh = store.freeze(("a",), SIZE, layers[0])
        assert fresh is not None
        for layer in (fresh, *layers):
            layer.close()
    while True:
        merge, _ = begin_merge(store, ())
        if merge is None:
            break
        while not merge.step():
            pass
        assert merge.finish()
        kept = open_layer(store.layer_path(merge.pair.kept))
        assert kept.trust == Trust.STRICT and kept.closed is not None
        kept.close()
        merge.close()
    layers: list[Layer] = opened(store, "a", writable=False)
    assert len(layers) == 2
    for block in (1, 2, 3):
        assert layers[1].state.read(block * BLOCK, BLOCK) == bytes([block]) * BLOCK
    for layer in layers:
        layer.close()
