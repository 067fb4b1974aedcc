"""The free space of exFAT, against partclone and fsck.exfat; filled through the FUSE driver."""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imgfs.guest.space import Filesystem
from tests.guest.tools import LONG, MIB, domain_map, empty, free_of, look, loop, run, zeroed


def filesystem(disk: Path | bytearray) -> Filesystem:
    guest = look(disk)
    assert guest.whole is not None
    assert guest.whole.filesystem is not None, guest.whole
    return guest.whole.filesystem


@contextmanager
def mounted(path: Path, point: Path) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    with loop(path) as device:
        daemon = subprocess.Popen(
            ["mount.exfat-fuse", "-d", device, point],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            until = time.monotonic() + 20
            while not point.is_mount() and time.monotonic() < until:
                time.sleep(0.02)
            assert point.is_mount()
            yield point
        finally:
            subprocess.run(["umount", point], timeout=30, check=False)
            daemon.wait(30)


def fill(point: Path, rng: random.Random, size: int) -> None:
    names: list[Path] = []
    for turn in range(3):
        for number in range(rng.randint(3, 12)):
            names.append(point / f"file {turn} {number}")
            names[-1].write_bytes(rng.randbytes(rng.randint(0, size // 60)))
        for name in rng.sample(names, len(names) // 3):
            name.unlink()
            names.remove(name)


def checksums(point: Path) -> dict[str, str]:
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in point.iterdir()}


def make(path: Path, rng: random.Random) -> int:
    size = rng.randint(4 * MIB, 64 * MIB) // 512 * 512
    empty(path, size)
    cluster = 512 << rng.randint(0, 7)
    words = ["-c", str(cluster), "-L", "Größe", "-b", rng.choice(["64K", "256K", "1M"])]
    run("mkfs.exfat", *words, path)
    return size


def heap_end(path: Path) -> int:
    with path.open("rb") as file:
        heap, count = struct.unpack_from("<II", file.read(120), 88)
        file.seek(108)
        sector, cluster = file.read(2)
    return int((heap << sector) + (count << sector << cluster))


@pytest.mark.parametrize("seed", range(100 if LONG else 6))
def test_what_is_free(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "disk"
    size = make(path, rng)
    with mounted(path, tmp_path / "mnt") as point:
        fill(point, rng, size)
        before = checksums(point)
    found = filesystem(path)
    assert (found.kind, found.left_whole, found.label) == ("exfat", "", "Größe")
    free = free_of(look(path))
    # What is behind the last cluster stays; partclone calls it unused.
    end = heap_end(path)
    assert free == [(a, min(b, end)) for a, b in domain_map("exfat", path)]
    copy = zeroed(path, free, tmp_path / "copy")
    run("fsck.exfat", "-n", copy)
    with mounted(copy, tmp_path / "mnt") as point:
        assert checksums(point) == before
    assert len(before) > 2


def test_while_it_is_mounted(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    make(path, random.Random(3))
    with mounted(path, tmp_path / "mnt") as point:
        (point / "file").write_bytes(bytes(1000))
        run("sync", "-f", point / "file")
        guest = look(path)
    assert guest.whole is not None
    assert "was not unmounted" in guest.whole.left_whole
    assert not guest.free


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = empty(tmp_path / "disk", 8 * MIB)
    run("mkfs.exfat", "-c", "4096", path)
    return path


def checked(raw: bytearray) -> bytearray:
    """With the boot region's checksum put right."""
    checksum = 0
    for at in range(11 * 512):
        if at not in (106, 107, 112):
            checksum = ((checksum >> 1 | checksum << 31) + raw[at]) & 0xFFFFFFFF
    raw[11 * 512 : 12 * 512] = struct.pack("<I", checksum) * 128
    return raw


@pytest.mark.parametrize(
    ("offset", "data", "why"),
    [
        (72, struct.pack("<Q", 1 << 60), "its partition"),
        (72, struct.pack("<Q", 100), "clusters from sector"),
        (80, struct.pack("<I", 3), "its table"),
        (84, struct.pack("<I", 1), "in a table of 1 sectors"),
        (84, b"\xff\xff\xff\xff", "its table"),
        (88, struct.pack("<I", 1 << 30), "clusters from sector"),
        (92, bytes(4), "0 clusters"),
        (92, b"\xff\xff\xff\xff", "4294967295 clusters"),
        (96, bytes(4), "cluster 0"),
        (96, b"\xff\xff\xff\xff", "cluster 4294967295"),
        (105, b"\2", "revision 0x200"),
        (106, b"\1", "VolumeFlags 0x1"),
        (106, b"\2", "was not unmounted"),
        (106, b"\4", "it had errors"),
        (108, b"\x08", "sectors of 2^8"),
        (109, b"\x30", "2^48 sectors"),
        (110, b"\2", "with 2 tables"),
    ],
)
def test_headers_that_lie(disk: Path, offset: int, data: bytes, why: str) -> None:
    raw = bytearray(disk.read_bytes())
    raw[offset : offset + len(data)] = data
    found = filesystem(checked(raw))
    assert why in found.left_whole
    assert not found.free


def test_a_wrong_checksum(disk: Path) -> None:
    for offset in (300, 11 * 512 + 100):
        raw = bytearray(disk.read_bytes())
        raw[offset] ^= 1
        assert "wrong checksum" in filesystem(raw).left_whole


def root_of(raw: bytes) -> int:
    _, _, heap, _, root = struct.unpack_from("<5I", raw, 80)
    return heap * 512 + (root - 2) * 4096


def test_bitmaps_that_lie(disk: Path) -> None:
    raw = bytearray(disk.read_bytes())
    root = root_of(raw)
    entry = next(root + n for n in range(0, 4096, 32) if raw[root + n] == 0x81)
    for offset, data, why in (
        (0, b"\x01", "0 bitmaps"),
        (20, b"\0\0\0\0", "cluster 0"),
        (20, b"\xff\xff\0\0", "cluster 65535"),
        (24, struct.pack("<Q", 10), "a bitmap of 10 bytes"),
        (24, struct.pack("<Q", 1 << 60), "a bitmap of"),
    ):
        changed = bytearray(raw)
        changed[entry + offset : entry + offset + len(data)] = data
        assert why in filesystem(changed).left_whole
    changed = bytearray(raw)
    spare = root + 5 * 32
    changed[spare : spare + 32] = raw[entry : entry + 32]
    for n in range(root, spare, 32):
        changed[n] = changed[n] or 0x05
    assert "2 bitmaps" in filesystem(changed).left_whole


def test_a_bitmap_in_two_places(tmp_path: Path) -> None:
    path = empty(tmp_path / "disk", 8 * MIB)
    run("mkfs.exfat", "-c", "512", path)  # its bitmap is larger than a cluster
    raw = bytearray(path.read_bytes())
    assert not filesystem(raw).left_whole
    (table,) = struct.unpack_from("<I", raw, 80)
    struct.pack_into("<I", raw, table * 512 + 2 * 4, 1000)
    assert "its bitmap goes on in cluster 1000" in filesystem(raw).left_whole


def test_any_bytes_anywhere(disk: Path) -> None:
    raw = bytearray(disk.read_bytes())
    rng = random.Random(2)
    root = root_of(raw)
    for _ in range(2000 if LONG else 200):
        at = rng.choice([rng.randrange(64, 120), rng.randrange(root, root + 128)])
        kept, raw[at] = raw[at], rng.randrange(256)
        free = free_of(look(checked(raw)))
        assert all(0 < a < b <= len(raw) for a, b in free)
        raw[at] = kept


def test_a_large_one_is_quick(tmp_path: Path) -> None:
    path = empty(tmp_path / "disk", 1 << 40)
    run("mkfs.exfat", "-c", "32K", path)
    start = time.monotonic()
    found = filesystem(path)
    assert time.monotonic() - start < 3
    assert not found.left_whole
    assert len(found.free) == 2
