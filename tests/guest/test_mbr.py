"""DOS partition tables, as sfdisk writes and reads them, and such as nobody would write."""

from __future__ import annotations

import itertools
import json
import random
import struct
from pathlib import Path

import pytest

from imgfs.guest.disk import Guest
from tests.guest.tools import LONG, MIB, empty, look, put, run

SECTOR = 512


def sectors(guest: Guest) -> dict[int, tuple[int, int, str]]:
    return {
        each.number: (each.start // SECTOR, each.size // SECTOR, each.type)
        for each in guest.partitions
        if each.is_there
    }


def as_sfdisk_says(disk: Path) -> dict[int, tuple[int, int, str]]:
    table = json.loads(run("sfdisk", "--json", disk))["partitiontable"]
    found = {}
    for each in table.get("partitions", []):
        number = int(each["node"].removeprefix(str(disk)))
        if each["type"] not in ("5", "f", "85"):
            found[number] = (each["start"], each["size"], f"0x{int(each['type'], 16):02x}")
    return found


def table(disk: Path, script: str) -> Path:
    run("sfdisk", "--quiet", "--force", disk, stdin=f"label: dos\n{script}")
    return disk


def entry(kind: int, first: int, count: int) -> bytes:
    return struct.pack("<B3xB3xII", 0, kind, first, count)


def boot(*entries: bytes) -> bytes:
    return bytes(446) + b"".join(entries).ljust(64, b"\0") + b"\x55\xaa"


LOGICAL = (
    "size=4M\nsize=5M,type=82\nsize=20M,type=5\nsize=6M\n" + "size=2M\n" * 4 + "size=3M,type=c\n"
)


def test_primary_and_logical(tmp_path: Path) -> None:
    disk = table(empty(tmp_path / "disk", 56 * MIB), LOGICAL)
    guest = look(disk)
    assert (guest.table, guest.left_whole) == ("mbr", "")
    assert sectors(guest) == as_sfdisk_says(disk)
    assert list(sectors(guest)) == [1, 2, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("seed", range(100 if LONG else 6))
def test_random_tables(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    kinds = ["83", "82", "7", "c", "8e", "fd", "ef"]
    lines = [
        f"size={rng.randint(1, 9)}M,type={rng.choice(kinds)}" for _ in range(rng.randint(0, 4))
    ]
    if lines and rng.random() < 0.7:
        lines[rng.randrange(len(lines))] = f"size=60M,type={rng.choice(['5', 'f', '85'])}"
        logical = [f"size={rng.randint(1, 5)}M,type={rng.choice(kinds)}" for _ in range(8)]
        lines = lines[:4] + ([""] * (4 - len(lines)) if len(lines) < 4 else []) + logical
    script = "\n".join(line for line in lines if line) + "\n"
    disk = empty(tmp_path / "disk", 200 * MIB)
    try:
        table(disk, script)
    except AssertionError:  # sfdisk has no room for some of it
        return
    guest = look(disk)
    assert not guest.left_whole
    assert sectors(guest) == as_sfdisk_says(disk)


def test_more_than_one_partition_has_the_same_bytes(tmp_path: Path) -> None:
    disk = empty(tmp_path / "disk", 64 * MIB)
    put(disk, 0, boot(entry(0x83, 2048, 4096), entry(0x83, 4096, 4096), entry(0x83, 8192, 100)))
    guest = look(disk)
    assert list(sectors(guest)) == [3]
    why = [each.content.left_whole for each in guest.partitions]
    assert why[0] == f"it overlaps partition 2 at byte {4096 * SECTOR}"
    assert why[1] == f"it overlaps partition 1 at byte {4096 * SECTOR}"


def test_one_that_hides_others(tmp_path: Path) -> None:
    disk = empty(tmp_path / "disk", 64 * MIB)
    entries = (entry(0x83, 100, 10), entry(0x83, 50, 9000), entry(0x83, 200, 9), entry(7, 9050, 1))
    put(disk, 0, boot(*entries))
    assert list(sectors(look(disk))) == [4]


def test_outside_of_the_disk_and_on_the_table(tmp_path: Path) -> None:
    disk = empty(tmp_path / "disk", 1 * MIB)
    put(disk, 0, boot(entry(0x83, 100, 2048), entry(0x83, 0, 10), entry(0x83, 50, 50)))
    guest = look(disk)
    assert list(sectors(guest)) == [3]
    assert "behind the disk of 1048576 bytes" in guest.partitions[0].content.left_whole
    assert "overlaps the partition table" in guest.partitions[1].content.left_whole


def test_extended_partitions_that_go_round(tmp_path: Path) -> None:
    disk = empty(tmp_path / "disk", 8 * MIB)
    put(disk, 0, boot(entry(5, 100, 10000)))
    put(disk, 100 * SECTOR, boot(entry(0x83, 10, 10), entry(5, 200, 100)))
    put(disk, 300 * SECTOR, boot(entry(0x83, 10, 10), entry(5, 0, 100)))
    guest = look(disk)
    assert list(sectors(guest)) == [5, 6]
    assert "go round in a circle at sector 100" in guest.left_whole


def test_extended_partitions_without_end(tmp_path: Path) -> None:
    disk = empty(tmp_path / "disk", 8 * MIB)
    put(disk, 0, boot(entry(5, 1, 16000)))
    for n in range(1000):
        put(disk, (1 + 4 * n) * SECTOR, boot(entry(0x83, 1, 1), entry(5, 4 * n + 4, 4)))
    assert "more than 128" in look(disk).left_whole


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (boot(entry(0x83, 1, 9), entry(5, 99999, 9)), "outside of it"),
        (boot(entry(0x83, 1, 9), entry(5, 9000, 9)), "no partition table at sector 9100"),
        (boot(entry(0x83, 1, 9), entry(0x83, 100, 9)), "more than a partition"),
        (bytes(512), "no partition table at sector 100"),
    ],
)
def test_bad_extended_tables(tmp_path: Path, second: bytes, why: str) -> None:
    disk = empty(tmp_path / "disk", 8 * MIB)
    put(disk, 0, boot(entry(5, 100, 10000)))
    put(disk, 100 * SECTOR, second)
    assert why in look(disk).left_whole


def test_a_logical_partition_outside_and_on_a_table(tmp_path: Path) -> None:
    disk = empty(tmp_path / "disk", 8 * MIB)
    put(disk, 0, boot(entry(5, 100, 1000), entry(0x83, 1050, 100)))
    put(disk, 100 * SECTOR, boot(entry(0x83, 10, 2000), entry(5, 500, 100)))
    put(disk, 600 * SECTOR, boot(entry(0x83, 0, 10)))
    guest = look(disk)
    assert sectors(guest) == {}
    why = {each.number: each.content.left_whole for each in guest.partitions}
    assert "not in the extended partition" in why[5]
    assert "overlaps" in why[6]
    assert "overlaps the extended partition" in why[2]


def test_no_table(tmp_path: Path) -> None:
    for content in (b"", boot(), bytes(510) + b"\x55\xaa", b"\xff" * 510 + b"\x55\xaa"):
        disk = empty(tmp_path / "disk", MIB)
        put(disk, 0, content)
        guest = look(disk)
        assert (guest.table, guest.partitions) == ("none", ())
        assert guest.whole is not None
        assert "nothing is known" in guest.whole.left_whole


def test_any_bytes_in_a_table(tmp_path: Path) -> None:
    disk = table(empty(tmp_path / "disk", 56 * MIB), LOGICAL)
    raw = bytearray(disk.read_bytes())
    places = [446 + n for n in range(64)]
    for start in (each.start for each in look(disk).partitions if each.number > 4):
        before = start - MIB
        places += [before + 446 + n for n in range(32)] if before > 0 else []
    rng = random.Random(4)
    for _ in range(3000 if LONG else 300):
        changed = {rng.choice(places): rng.randrange(256) for _ in range(rng.randint(1, 6))}
        kept = {at: raw[at] for at in changed}
        for at, value in changed.items():
            raw[at] = value
        guest = look(raw)
        ranges = sorted((p.start, p.start + p.size) for p in guest.partitions if p.is_there)
        assert all(0 < a < b <= len(raw) for a, b in ranges), changed
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges)), changed
        for at, value in kept.items():
            raw[at] = value
