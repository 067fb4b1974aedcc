"""GUID partition tables, as sfdisk and sgdisk write and read them, whole and damaged."""

from __future__ import annotations

import itertools
import json
import random
import struct
import zlib
from pathlib import Path

import pytest

from imgfs.guest.disk import Guest
from tests.guest.tools import LONG, MIB, empty, look, loop, put, run

SIZE = 16 * MIB


def script(sector: int) -> str:
    """Three partitions; the second at byte 6144000."""
    return "\n".join(
        [
            "label: gpt",
            'size=2M, name="EFI System", type=uefi',
            f'start={6144000 // sector}, size=300, name="Grüße, 世界"',
            "size=3M, type=swap\n",
        ]
    )


def placed(guest: Guest, sector: int) -> dict[int, tuple[int, int, str, str]]:
    return {
        each.number: (each.start // sector, each.size // sector, each.type, each.name)
        for each in guest.partitions
        if each.is_there
    }


def as_sfdisk_says(disk: Path, sector: int) -> dict[int, tuple[int, int, str, str]]:
    with loop(disk, sector) as device:
        found = json.loads(run("sfdisk", "--json", device))
    return {
        int(each["node"].removeprefix(f"{device}p")): (
            each["start"],
            each["size"],
            each["type"].lower(),
            each.get("name", ""),
        )
        for each in found["partitiontable"]["partitions"]
    }


@pytest.fixture(params=[512, 4096])
def sector(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def disk(tmp_path: Path, sector: int) -> Path:
    path = empty(tmp_path / "disk", SIZE)
    with loop(path, sector) as device:
        run("sfdisk", "--quiet", device, stdin=script(sector))
    return path


def test_partitions(disk: Path, sector: int) -> None:
    guest = look(disk)
    assert (guest.table, guest.left_whole) == ("gpt", "")
    assert placed(guest, sector) == as_sfdisk_says(disk, sector)
    assert len(guest.partitions) == 3


def test_the_backup_when_the_first_is_bad(disk: Path, sector: int) -> None:
    before = placed(look(disk), sector)
    for start, length in ((sector, 8), (sector + 60, 1), (2 * sector, 1), (sector, 33 * sector)):
        raw = bytearray(disk.read_bytes())
        for at in range(start, start + length):
            raw[at] ^= 0x5A
        guest = look(raw)
        assert placed(guest, sector) == before
        assert not guest.left_whole
    raw[-sector + 60] ^= 1
    guest = look(raw)
    assert guest.partitions == ()
    assert "sector" in guest.left_whole
    assert "checksum" in guest.left_whole
    assert not guest.free


def test_a_larger_disk_has_its_backup_elsewhere(disk: Path, sector: int) -> None:
    before = look(disk).partitions
    with disk.open("r+b") as file:
        file.truncate(SIZE + 5 * MIB)
    assert look(disk).partitions == before


def test_a_cut_disk(disk: Path) -> None:
    with disk.open("r+b") as file:
        file.truncate(SIZE - MIB)
    guest = look(disk)
    assert "usable" in guest.left_whole
    assert not guest.free


@pytest.mark.parametrize("seed", range(60 if LONG else 3))
def test_random_tables(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    disk = empty(tmp_path / "disk", 256 * MIB)
    lines = []
    for number in rng.sample(range(1, 200), rng.randint(1, 60)):
        lines += ["-n", f"{number}:0:+{rng.randint(1, 4000)}K", "-c", f"{number}:part {number}"]
        lines += ["-t", f"{number}:{rng.choice(['8300', '8200', '0700', 'ef00', '8e00'])}"]
    run("sgdisk", "-S", str(rng.choice([128, 200, 256])), "-a", str(rng.choice([1, 8, 2048])), disk)
    run("sgdisk", "-S", "256", *lines, disk)
    guest = look(disk)
    assert not guest.left_whole
    assert placed(guest, 512) == as_sfdisk_says(disk, 512)


def sealed(raw: bytearray, at: int = 512, entries: bytes | None = None) -> bytearray:
    """The header with its checksums put right, and the backup destroyed."""
    if entries is not None:
        raw[1024 : 1024 + len(entries)] = entries
        raw[at + 88 : at + 92] = struct.pack("<I", zlib.crc32(entries))
    raw[at + 16 : at + 20] = bytes(4)
    raw[at + 16 : at + 20] = struct.pack("<I", zlib.crc32(raw[at : at + 92]))
    raw[-512:] = bytes(512)
    return raw


@pytest.fixture
def raw(tmp_path: Path) -> bytearray:
    path = empty(tmp_path / "disk", SIZE)
    run("sfdisk", "--quiet", path, stdin=script(512))
    return bytearray(path.read_bytes())


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        (8, struct.pack("<I", 0x20000), "revision"),
        (12, struct.pack("<I", 91), "its size is 91"),
        (12, struct.pack("<I", 513), "its size is 513"),
        (24, struct.pack("<Q", 2), "says that it is in sector 2"),
        (40, struct.pack("<Q", 1 << 63), "usable"),
        (48, struct.pack("<Q", 1 << 62), "usable"),
        (72, struct.pack("<Q", 1), "entries"),
        (72, struct.pack("<Q", 1 << 60), "entries"),
        (72, struct.pack("<Q", 9000), "among the partitions"),
        (80, struct.pack("<I", 0xFFFFFFFF), "4294967295 entries"),
        (80, struct.pack("<I", 0), "0 entries"),
        (84, struct.pack("<I", 64), "of 64 bytes"),
        (84, struct.pack("<I", 130), "of 130 bytes"),
        (88, bytes(4), "wrong checksum"),
    ],
)
def test_headers_that_lie(raw: bytearray, field: int, value: bytes, why: str) -> None:
    raw[512 + field : 512 + field + len(value)] = value
    guest = look(sealed(raw))
    assert why in guest.left_whole
    assert (guest.partitions, len(guest.free)) == ((), 0)


def changed_entry(raw: bytearray, index: int, first: int, last: int) -> bytes:
    entries = bytearray(raw[1024 : 1024 + 128 * 128])
    struct.pack_into("<QQ", entries, index * 128 + 32, first, last)
    return bytes(entries)


@pytest.mark.parametrize(
    ("first", "last", "why"),
    [
        (12000, 12000, "overlaps partition 2"),
        (32000, 1 << 40, "not in the usable ones"),
        (32000, 32767, "not in the usable ones"),
        (31000, 30999, "not in the usable ones"),
        ((1 << 64) - 1, (1 << 64) - 1, "not in the usable ones"),
    ],
)
def test_entries_that_lie(raw: bytearray, first: int, last: int, why: str) -> None:
    guest = look(sealed(raw, entries=changed_entry(raw, 2, first, last)))
    assert not guest.partitions[2].is_there
    assert why in guest.partitions[2].content.left_whole
    assert guest.partitions[0].is_there


def test_hybrid(tmp_path: Path) -> None:
    disk = empty(tmp_path / "disk", SIZE)
    run("sfdisk", "--quiet", disk, stdin=script(512))
    before = look(disk).partitions
    run("sgdisk", "--hybrid", "1:2", disk)
    guest = look(disk)
    assert (guest.table, guest.partitions, guest.left_whole) == ("gpt", before, "")
    mbr = bytearray(disk.read_bytes()[:512])
    entry = next(n for n in range(446, 510, 16) if mbr[n + 4] not in (0, 0xEE))
    struct.pack_into("<I", mbr, entry + 8, 77)
    put(disk, 0, bytes(mbr))
    guest = look(disk)
    assert guest.partitions == before
    assert "hybrid MBR, at sector 77" in guest.left_whole


def test_no_protective_mbr(raw: bytearray) -> None:
    raw[:512] = bytes(512)
    guest = look(raw)
    assert guest.table == "none"
    assert guest.whole is not None
    assert guest.whole.left_whole == "it has a partition table that nothing leads to"


def test_a_gpt_that_the_mbr_does_not_speak_of(raw: bytearray) -> None:
    struct.pack_into("<B3xB3xII", raw, 446, 0, 0x83, 12000, 300)
    guest = look(raw)
    assert (guest.table, len(guest.partitions)) == ("mbr", 1)
    assert "does not speak of" in guest.left_whole


def test_any_bytes_in_a_table(raw: bytearray) -> None:
    rng = random.Random(9)
    raw[-512:] = bytes(512)
    for _ in range(3000 if LONG else 300):
        at = rng.choice(
            [rng.randrange(512, 604), rng.randrange(1024, 1408), rng.randrange(446, 512)]
        )
        kept = bytes(raw[512:2048])
        before, raw[at] = raw[at], rng.randrange(256)
        if rng.random() < 0.8:
            sealed(raw, entries=bytes(raw[1024 : 1024 + 128 * 128]))
        guest = look(raw)
        ranges = sorted((p.start, p.start + p.size) for p in guest.partitions if p.is_there)
        assert all(0 < a < b <= len(raw) for a, b in ranges)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
        raw[at] = before
        raw[512:2048] = kept
