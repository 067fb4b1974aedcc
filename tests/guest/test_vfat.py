"""The free space of FAT12, FAT16 and FAT32, against partclone, fsck.fat and mtools."""

from __future__ import annotations

import hashlib
import random
import re
import struct
import time
from pathlib import Path

import pytest

from imgfs.guest.space import Filesystem
from tests.guest.tools import LONG, MIB, domain_map, empty, free_of, look, put, run, zeroed


def filesystem(disk: Path | bytearray) -> Filesystem:
    guest = look(disk)
    assert guest.whole is not None
    assert guest.whole.filesystem is not None, guest.whole
    return guest.whole.filesystem


def head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def options(rng: random.Random) -> tuple[list[str], int]:
    """Of mkfs.fat, and a size for it."""
    bits = rng.choice([12, 16, 32])
    sector = rng.choice([512, 512, 1024, 4096])
    per_cluster = rng.choice([1, 2, 4, 8])
    low, high = {12: (100, 4000), 16: (4200, 65000), 32: (68000, 90000)}[bits]
    size = rng.randint(low, high) * sector * per_cluster + rng.choice([0, 512, 5000])
    while size > 300 * MIB:
        per_cluster, size = per_cluster // 2 or 1, size // 2
        if per_cluster == 1:
            sector, size = 512, min(size, 45 * MIB)
    words = ["-F", str(bits), "-s", str(per_cluster), "-S", str(sector)]
    words += ["-f", str(rng.choice([1, 2, 2])), "-i", "deadbeef", "-n", "LABEL X"]
    words += ["-R", str(rng.choice([32, 40, 128]))] if rng.random() < 0.5 else []
    words += ["-r", str(rng.choice([128, 512, 1024]))] if bits != 32 else []
    return [*words, *(["-a"] if rng.random() < 0.3 else [])], size


def make(path: Path, rng: random.Random) -> Path:
    """A filesystem that was filled, emptied in part, and filled again."""
    while True:
        words, size = options(rng)
        empty(path, size)
        try:
            run("mkfs.fat", *words, path)
            break
        except AssertionError:  # a combination that it refuses
            continue
    names: list[str] = []
    for turn in range(3):
        for number in range(rng.randint(3, 12)):
            file = path.with_name(f"t{turn}n{number}.dat")
            file.write_bytes(rng.randbytes(rng.randint(0, size // 60)))
            run("mcopy", "-i", path, file, "::/")
            names.append(file.name)
            file.unlink()
        for name in rng.sample(names, len(names) // 3):
            run("mdel", "-i", path, f"::/{name}")
            names.remove(name)
    return path


def checksums(path: Path, to: Path) -> dict[str, str]:
    to.mkdir()
    run("mcopy", "-s", "-i", path, "::/*", to)
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in to.iterdir()}


def clusters(path: Path, free: list[tuple[int, int]]) -> set[int]:
    """Of these ranges, as minfo says where clusters are."""
    boot = head(path)
    sector, per_cluster, reserved, tables, entries = struct.unpack_from("<HBHBH", boot, 11)
    table = struct.unpack_from("<H", boot, 22)[0] or struct.unpack_from("<I", boot, 36)[0]
    data = (reserved + tables * table) * sector + entries * 32
    cluster = sector * per_cluster
    assert all((start - data) % cluster == (end - data) % cluster == 0 for start, end in free)
    return {
        number + 2
        for start, end in free
        for number in range((start - data) // cluster, (end - data) // cluster)
    }


def root_chain(path: Path) -> set[int]:
    """The clusters of the root directory of FAT32, which mshowfat does not show."""
    boot = head(path)
    sector, _, reserved = struct.unpack_from("<HBH", boot, 11)
    (cluster,) = struct.unpack_from("<I", boot, 44)
    found = set[int]()
    with path.open("rb") as file:
        while cluster < 0x0FFFFFF8 and cluster not in found:
            found.add(cluster)
            file.seek(reserved * sector + 4 * cluster)
            cluster = int.from_bytes(file.read(4), "little") & 0x0FFFFFFF
    return found


def unused(path: Path) -> set[int]:
    """The clusters that no file has, as mtools and fsck.fat see it."""
    said = run("fsck.fat", "-n", "-v", path)
    count = int(re.search(r"(\d+) data clusters", said)[1])
    used = int(re.search(r"(\d+)/\d+ clusters", said)[1])
    taken = set[int]()
    names = run("mdir", "-b", "-i", path, "::/").split("\n")
    for chain in run("mshowfat", "-i", path, *filter(None, names)).split("<")[1:]:
        first, _, last = chain.split(">")[0].partition("-")
        taken |= set(range(int(first), int(last or first) + 1))
    if b"FAT32" in head(path):
        taken |= root_chain(path)
    assert len(taken) == used
    return set(range(2, count + 2)) - taken


@pytest.mark.parametrize("seed", range(120 if LONG else 8))
def test_what_is_free(tmp_path: Path, seed: int) -> None:
    path = make(tmp_path / "disk", random.Random(seed))
    found = filesystem(path)
    assert (found.kind, found.left_whole, found.uuid) == ("vfat", "", "DEAD-BEEF")
    assert found.label == "LABEL X"
    free = free_of(look(path))
    assert clusters(path, free) == unused(path)
    if b"FAT12" not in head(path):  # partclone does not read its tables right
        assert free == domain_map("vfat", path)
    before = checksums(path, tmp_path / "before")
    copy = zeroed(path, free, tmp_path / "copy")
    run("fsck.fat", "-n", copy)
    assert checksums(copy, tmp_path / "after") == before
    assert len(before) > 2


@pytest.fixture(params=[12, 16, 32])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    size = {12: 2, 16: 10, 32: 40}[request.param] * MIB
    path = empty(tmp_path / "disk", size)
    run("mkfs.fat", "-F", str(request.param), "-s", "1", path)
    return path


def bits(disk: Path) -> int:
    return {2: 12, 10: 16, 40: 32}[disk.stat().st_size // MIB]


def test_dirty_ones_are_left_whole(disk: Path) -> None:
    raw = disk.read_bytes()
    assert not filesystem(disk).left_whole
    state = 65 if bits(disk) == 32 else 37
    for flag in (1, 2, 3):
        put(disk, state, bytes([flag]))
        assert "was not unmounted" in filesystem(disk).left_whole
        put(disk, state, raw[state : state + 1])
    if bits(disk) == 12:
        return
    (reserved,) = struct.unpack_from("<H", raw, 14)
    width = bits(disk) // 8
    entry = reserved * 512 + 2 * width - 1  # the highest byte of entry 1
    (sectors,) = struct.unpack_from("<H" if width == 2 else "<I", raw, 22 if width == 2 else 36)
    clean = 0x80 if width == 2 else 0x08
    for bit, why in ((clean, "was not unmounted"), (clean >> 1, "it had errors")):
        for table in (0, 1):
            put(disk, entry + table * sectors * 512, bytes([raw[entry] & ~bit]))
        found = filesystem(disk)
        assert why in found.left_whole
        assert not found.free
        for table in (0, 1):
            put(disk, entry + table * sectors * 512, raw[entry : entry + 1])


def test_copies_of_the_table_that_differ(disk: Path) -> None:
    raw = disk.read_bytes()
    (reserved,) = struct.unpack_from("<H", raw, 14)
    put(disk, reserved * 512 + 400, b"\1")
    assert "tables differ" in filesystem(disk).left_whole


def test_bad_clusters_stay(disk: Path) -> None:
    if bits(disk) != 16:
        return
    raw = disk.read_bytes()
    (reserved,) = struct.unpack_from("<H", raw, 14)
    (sectors,) = struct.unpack_from("<H", raw, 22)
    for table in (0, 1):
        put(disk, (reserved + table * sectors) * 512 + 2 * 100, b"\xf7\xff")
    free = free_of(look(disk))
    assert [b - a for a, b in free] == [98 * 512, free[1][1] - free[1][0]]
    assert free[1][0] == free[0][1] + 512


@pytest.mark.parametrize(
    ("offset", "data", "why"),
    [
        (11, struct.pack("<H", 4095), ""),
        (13, b"\3", ""),
        (14, bytes(2), ""),
        (16, bytes(1), ""),
        (16, b"\xff", "255 tables"),
        (32, b"\xff\xff\xff\xff", "its partition"),
        (36, b"\xff\xff\xff\x7f", "clusters"),
        (36, b"\1\0\0\0", "clusters"),
        (40, b"\x81\0", "flags 0x81"),
        (42, b"\1\0", "version 0x1"),
        (44, b"\0\0\0\0", "root directory is in cluster 0"),
        (44, b"\xff\xff\xff\xff", "root directory is in cluster"),
        (17, b"\1\0", "1 entries"),
    ],
)
def test_headers_that_lie(tmp_path: Path, offset: int, data: bytes, why: str) -> None:
    path = empty(tmp_path / "disk", 40 * MIB)
    run("mkfs.fat", "-F", "32", "-s", "1", path)
    put(path, offset, data)
    guest = look(path)
    assert guest.whole is not None
    assert not guest.free
    assert why in guest.whole.left_whole
    assert guest.whole.left_whole


def test_larger_than_its_partition(disk: Path) -> None:
    with disk.open("r+b") as file:
        file.truncate(disk.stat().st_size - 4096)
    assert "its partition" in filesystem(disk).left_whole


def test_any_bytes_in_the_header_and_the_tables(tmp_path: Path) -> None:
    rng = random.Random(1)
    for seed in range(3):
        raw = bytearray(make(tmp_path / "disk", random.Random(seed)).read_bytes())
        for _ in range(1000 if LONG else 100):
            places = [rng.randrange(90) if rng.random() < 0.7 else rng.randrange(60000)]
            places += [rng.randrange(11, 48) for _ in range(rng.randint(0, 2))]
            kept = {at: raw[at] for at in places}
            for at in places:
                raw[at] = rng.randrange(256)
            start = time.monotonic()
            guest = look(raw)
            assert time.monotonic() - start < 5
            free = free_of(guest)
            assert all(0 < a < b <= len(raw) for a, b in free)
            for at, value in kept.items():
                raw[at] = value


def test_millions_of_clusters_are_quick(tmp_path: Path) -> None:
    path = empty(tmp_path / "disk", 64 << 30)
    run("mkfs.fat", "-F", "32", "-s", "32", path)
    raw = head(path)
    (reserved,) = struct.unpack_from("<H", raw, 14)
    (sectors,) = struct.unpack_from("<I", raw, 36)
    chain = struct.pack("<1000I", *range(1001, 2001))
    for table in (0, 1):
        put(path, (reserved + table * sectors) * 512 + 4000, chain)
    start = time.monotonic()
    found = filesystem(path)
    assert time.monotonic() - start < 3
    assert len(found.free) == 4
    assert found.used == 1001 * 16384
