"""NTFS is left whole where something is still to be done to it, or is damaged."""

from __future__ import annotations

import os
import random
import struct
import time
from pathlib import Path

import pytest

from imgfs.guest import ntfs
from imgfs.guest.space import Filesystem
from tests.drive import Files, size_of
from tests.guest.contents import churn
from tests.guest.ntfs_images import Image, make, mounted, non_resident, resident, restart_page

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
MIB = 1 << 20
LOGFILE, VOLUME, BITMAP = 2, 3, 6
VOLUME_INFORMATION, DATA = 0x70, 0x80
HEADER = 4096  # of a hibernation file


def look(image: Path | bytes | bytearray) -> Filesystem:
    return Files(image).run(ntfs.look(0, size_of(image)))


def check(found: Filesystem, why: str) -> None:
    """It is left whole for that reason; with none it is not."""
    assert why in found.left_whole
    assert bool(found.free) == (not found.left_whole) == (not why)


def free_bytes(found: Filesystem) -> set[int]:
    """The offsets of the free blocks of 512 bytes."""
    pairs = zip(found.free[::2], found.free[1::2], strict=True)
    return {at for start, end in pairs for at in range(start, end, 512)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With some files."""
    image = make(tmp_path_factory.mktemp("ntfs") / "base.img", 24 * MIB, "-L", "Grüße")
    with mounted(image) as root:
        churn(root, random.Random(1), 6 * MIB, steps=120)
    return image


@pytest.mark.parametrize(
    ("version", "flags", "why"),
    [
        ((3, 1), 0x8000, ""),
        ((3, 1), 0x80, ""),
        ((1, 2), 0, ""),
        ((3, 1), 1, "it is dirty: $Volume has flags 0x1"),
        ((3, 1), 0x8001, "it is dirty"),
        ((3, 1), 0x4000, "flags 0x4000"),
        ((3, 1), 4, "flags 0x4"),
        ((4, 0), 0, "version 4.0"),
    ],
)
def test_volume_information(base: Path, version: tuple[int, int], flags: int, why: str) -> None:
    image = Image(base)
    info = bytes(8) + struct.pack("<BBH", *version, flags)
    image.replace(VOLUME, VOLUME_INFORMATION, resident(VOLUME_INFORMATION, info))
    check(look(image.data), why)


@pytest.mark.parametrize(
    ("one", "two", "why"),
    [
        (restart_page(5, in_use=0xFFFF), restart_page(5, in_use=0xFFFF), ""),
        (restart_page(5, flags=2), restart_page(5, flags=2), ""),
        (restart_page(5), restart_page(9, in_use=0xFFFF), ""),
        (restart_page(5, page=512, flags=2), restart_page(9, page=512, flags=2), ""),
        (restart_page(9), restart_page(5, in_use=0xFFFF), "in use"),
        (restart_page(5, in_use=0xFFFF), restart_page(9), "in use"),
        (restart_page(5, in_use=0xFFFF), bytes(4096), "begins with"),
        (restart_page(5, flags=2), restart_page(5, flags=2)[:-2] + b"zz", "fixup"),
        (restart_page(5, flags=2, major=2), restart_page(5, flags=2, major=2), "version 2.1"),
        (b"CHKD" + restart_page(5, flags=2)[4:], restart_page(5, flags=2), "CHKD"),
        (bytes(4096), bytes(4096), "begins with"),
    ],
)
def test_log_file(base: Path, one: bytes, two: bytes, why: str) -> None:
    image = Image(base)
    image.put(image.clusters(LOGFILE, DATA)[0] * image.boot.cluster, one + two)
    check(look(image.data), why)


def test_log_file_with_pages_only_far_in(base: Path) -> None:
    image = Image(base)
    at = image.clusters(LOGFILE, DATA)[0] * image.boot.cluster
    image.put(at + MIB, restart_page(5))
    check(look(image.data), "$LogFile begins with b'\\xff\\xff\\xff\\xff'")


@pytest.mark.parametrize(
    ("content", "names", "why"),
    [
        (bytes(3 * HEADER), 0, ""),
        (bytes(HEADER) + b"\1", 400, ""),
        (b"hibr" + bytes(HEADER), 0, "b'hibr'"),
        (b"HIBR" + bytes(HEADER), 400, "b'HIBR'"),
        (bytes(HEADER - 1) + b"\1", 0, "hibernated"),
        (bytes(100), 0, "100 bytes"),
        (bytes(HEADER - 1), 0, "4095 bytes"),
    ],
)
def test_hibernated(tmp_path: Path, content: bytes, names: int, why: str) -> None:
    """Also in a directory that is a tree."""
    image = make(tmp_path / "a.img", 24 * MIB)
    with mounted(image) as root:
        for index in range(names):
            (root / f"{chr(ord('a') + index % 26)} {index} {'long' * 20}").touch()
        (root / "HiberFil.sys").write_bytes(content)
        (root / "folder").mkdir()
        (root / "folder" / "hiberfil.sys").write_bytes(b"hibr" * HEADER)
    check(look(image), why)


def test_shadow_copies(base: Path) -> None:
    """By libvshadow's description: a header in $Boot, and a catalog of blocks of 16 KiB."""
    identity = bytes.fromhex("6b87083876c1484eb7ae04046e6cc752")
    image = Image(base)
    at = look(base).free[-2]

    def put(catalog: int, kind: int, following: int = 0) -> Filesystem:
        head = struct.pack("<16sIIQQ8xQ", identity, 1, 1, 0x1E00, 0x1E00, catalog)
        image.put(0x1E00, head)
        block = struct.pack("<16sIIQQQ", identity, 1, 2, 0, at, following).ljust(6 * 128, b"\0")
        image.put(at, (block + struct.pack("<Q", kind)).ljust(16384, b"\0"))
        return look(image.data)

    check(put(0, 2), "")
    check(put(at, 1), "")
    check(put(at, 2), "volume shadow copies")
    check(put(at, 3), "volume shadow copies")
    check(put(at + 512, 3), "no catalog")
    check(put(1 << 60, 3), "catalog of its shadow copies is at")
    check(put(at, 1, at), "more than 256 blocks")


def damaged(base: Path, what: str) -> bytearray:
    image = Image(base)
    cluster, clusters = image.boot.cluster, image.boot.clusters
    first, count = image.clusters(BITMAP, DATA)
    size = -(-clusters // 64) * 8
    if what == "outside":
        attribute = non_resident(DATA, size, cluster, (count, clusters - count + 1))
        image.replace(BITMAP, DATA, attribute)
    elif what == "short":
        image.replace(BITMAP, DATA, non_resident(DATA, size - 8, cluster, (count, first)))
    elif what == "nowhere":
        image.replace(BITMAP, DATA, non_resident(DATA, size, cluster))
    elif what == "clear":
        image.put(first * cluster, bytes(size))
    elif what == "torn":
        image.data[image.boot.mft * cluster + BITMAP * image.boot.record + 510] ^= 1
    else:
        record = image.record(BITMAP)
        record[22] &= ~1
        image.put_record(BITMAP, record)
    return image.data


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("outside", "of 6143"),
        ("short", "bytes for 6143 clusters"),
        ("nowhere", "ends before"),
        ("clear", "calls free what $Boot has"),
        ("torn", "was not written whole"),
        ("unused", "not in use"),
    ],
)
def test_damaged_bitmap(base: Path, what: str, why: str) -> None:
    found = look(damaged(base, what))
    check(found, why)
    assert found.uuid == look(base).uuid


def test_larger_than_its_partition(base: Path) -> None:
    size = 24 * MIB - 4096
    check(Files(base).run(ntfs.look(0, size)), f"its partition {size} bytes")
    check(Files(base).run(ntfs.look(0, 4096)), "the partition has 4096 bytes")


def test_disk_that_ends_early(base: Path) -> None:
    for length in (0, 100, 8191, 8192, 17_000, 10 * MIB):
        data = base.read_bytes()[:length]
        check(Files(data).run(ntfs.look(0, 24 * MIB)), "ends before byte")


def test_boot_sector_with_absurd_fields(base: Path) -> None:
    """One that says that it is smaller can be right; but no more of it is free then."""
    data = bytearray(base.read_bytes())
    expected = free_bytes(look(base))
    for at in range(3, 80):
        original = data[at]
        for value in (0, 1, 0x7F, 0x80, 0xFF):
            data[at] = value
            found = look(data)
            assert found.left_whole or free_bytes(found) <= expected, (at, value)
        data[at] = original


def test_mutations(base: Path) -> None:
    """Anywhere in what is read: never an exception, and never slow."""
    image = Image(base)
    boot = image.boot
    places = [(0, 8192), (boot.mft * boot.cluster, 16 * boot.record)]
    for number, kind in ((LOGFILE, DATA), (BITMAP, DATA)):
        places.append((image.clusters(number, kind)[0] * boot.cluster, 4096))
    rng = random.Random(7)
    for _ in range(20_000 if LONG else 300):
        changes = []
        for _ in range(rng.randrange(1, 4)):
            start, length = rng.choice(places)
            at = start + rng.randrange(length)
            changes.append((at, image.data[at]))
            image.data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        began = time.monotonic()
        found = look(image.data)
        assert time.monotonic() - began < 1, changes
        assert found.left_whole or all(at <= 24 * MIB for at in found.free)
        for at, value in reversed(changes):
            image.data[at] = value
    assert look(image.data) == look(base)
