"""DOS partition tables that count sectors of other sizes than 512 bytes: sfdisk and mkfs make them
on loop devices of such sectors."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from imgfs.guest.disk import Guest
from tests.guest.test_mbr import boot, entry
from tests.guest.tools import MIB, empty, look, loop, put, put_file, run

SIZES = [512, 2048, 4096]
SIZE = 128 * MIB


def table(disk: Path, sector: int, script: str) -> Path:
    with loop(disk, sector) as device:
        run("sfdisk", "--quiet", device, stdin=f"label: dos\n{script}")
    return disk


def places(guest: Guest) -> list[tuple[int, int]]:
    return [(each.start // MIB, each.size // MIB) for each in guest.partitions if each.is_there]


def commands(sector: int, at: int) -> list[str]:
    return [
        f"mkfs.fat -S {sector} -h {at // sector}",
        f"mkfs.xfs -q --unsupported -s size={max(sector, 512)}",
        "mkfs.ext4 -q -F -b 4096",
        f"mkntfs -q -F -f -s {sector} -p {at // sector} -H 255 -S 63",
        "mkfs.exfat",
        "mkswap -q",
        "mkfs.btrfs -q",
    ]


@pytest.mark.parametrize("sector", SIZES)
@pytest.mark.parametrize("which", range(7))
def test_what_is_in_it_tells(tmp_path: Path, sector: int, which: int) -> None:
    disk = table(empty(tmp_path / "disk", SIZE + 4 * MIB), sector, "start=1M,size=120M\n")
    part = empty(tmp_path / "part", 120 * MIB)
    run(*commands(sector, MIB)[which].split(), part)
    put_file(disk, MIB, part)
    guest = look(disk)
    assert (guest.table, guest.sector, guest.left_whole) == ("mbr", sector, "")
    assert places(guest) == [(1, 120)]
    assert guest.partitions[0].content.filesystem is not None
    assert guest.partitions[0].content.left_whole == ""


@pytest.mark.parametrize("sector", SIZES)
def test_logical_partitions(tmp_path: Path, sector: int) -> None:
    script = "size=8M\nsize=60M,type=5\nsize=20M\n" + "size=10M,type=82\n" * 2 + "size=12M\n"
    disk = table(empty(tmp_path / "disk", SIZE), sector, script)
    swap = empty(tmp_path / "swap", 10 * MIB)
    run("mkswap", "-q", swap)
    with loop(disk, sector) as device:
        dump = run("sfdisk", "--dump", device)
    lines = [line for line in dump.splitlines() if "start=" in line and "type=5" not in line]
    starts = [int(line.partition("start=")[2].split(",")[0]) * sector for line in lines]
    for at in starts:
        put_file(disk, at, swap)  # each is large enough but the first, for which it does not matter
    guest = look(disk)
    assert (guest.sector, guest.left_whole) == (sector, "")
    assert sorted(each.start for each in guest.partitions if each.is_there) == sorted(starts)


@pytest.mark.parametrize("sector", [2048, 4096])
def test_only_the_logical_ones_table_tells(tmp_path: Path, sector: int) -> None:
    disk = empty(tmp_path / "disk", SIZE)
    first = MIB // sector
    put(disk, 0, boot(entry(5, first, 100 * first)))
    put(disk, MIB, boot(entry(0x83, first, 20 * first), entry(5, 40 * first, 60 * first)))
    put(disk, 41 * MIB, boot(entry(0x83, first, 10 * first)))
    guest = look(disk)
    assert (guest.sector, guest.left_whole) == (sector, "")
    assert places(guest) == [(2, 20), (42, 10)]


@pytest.mark.parametrize("sector", [2048, 4096])
def test_a_partition_that_begins_where_another_one_would(tmp_path: Path, sector: int) -> None:
    """What is at 1 MiB is at the second one's place too, if it counts 512 bytes."""
    second = sector // 512  # MiB
    script = f"start=1M,size={second - 1}M\nstart={second}M,size=90M\n"
    disk = table(empty(tmp_path / "disk", SIZE), sector, script)
    for at, size in ((1, second - 1), (second, 90)):
        part = empty(tmp_path / "part", size * MIB)
        run("mkfs.ext4", "-q", "-F", part)
        put_file(disk, at * MIB, part)
    assert places(look(disk)) == [(1, second - 1), (second, 90)]


def test_what_is_at_both_places(tmp_path: Path) -> None:
    disk = empty(tmp_path / "disk", SIZE)
    put(disk, 0, boot(entry(0x83, 2048, 4096)))
    small = empty(tmp_path / "small", 2 * MIB)
    run("mkfs.ext4", "-q", "-F", small)
    put_file(disk, MIB, small)
    assert look(disk).sector == 512
    put_file(disk, 8 * MIB, small)
    guest = look(disk)  # of one partition what is at the place in 512 bytes counts
    assert (guest.sector, places(guest)) == (512, [(1, 2)])
    put(disk, 0, boot(entry(0x83, 2048, 4096), entry(0x83, 6144, 4096)))
    put_file(disk, 24 * MIB, small)
    guest = look(disk)
    assert "cannot be told whether its sectors are of 512 or of 4096 bytes" in guest.left_whole
    assert places(guest) == []
    assert not guest.free


def test_a_partition_of_unknown_content_before_another(tmp_path: Path) -> None:
    """A boot loader at 1 MiB and a filesystem at eight times that, on a disk that is full."""
    disk = empty(tmp_path / "disk", 64 * MIB)
    put(disk, 0, boot(entry(0xA2, 2048, 14336), entry(0x83, 16384, 100 * 1024)))
    put(disk, MIB, b"boot loader")
    part = empty(tmp_path / "part", 50 * MIB)
    run("mkfs.ext4", "-q", "-F", part)
    put_file(disk, 8 * MIB, part)
    assert places(look(disk)) == [(1, 7), (8, 50)]


@pytest.mark.parametrize("sector", [2048, 4096])
def test_only_the_end_of_the_disk_tells(tmp_path: Path, sector: int) -> None:
    disk = empty(tmp_path / "disk", SIZE)
    put(disk, 0, boot(entry(0x83, MIB // sector, (SIZE - MIB) // sector)))
    guest = look(disk)
    assert f"its sectors have {sector} bytes" in guest.left_whole
    assert places(guest) == []
    put(disk, 0, boot(entry(0x83, 2048, (SIZE - MIB) // 512)))
    assert places(look(disk)) == [(1, SIZE // MIB - 1)]


def test_the_beginning_of_a_medium(tmp_path: Path) -> None:
    disk = table(empty(tmp_path / "disk", SIZE), 4096, "start=1M,size=10M\nsize=100M\n")
    part = empty(tmp_path / "part", 10 * MIB)
    run("mkfs.fat", "-S", "4096", "-h", "256", part)
    put_file(disk, MIB, part)
    with disk.open("r+b") as file:
        file.truncate(40 * MIB)
    guest = look(disk)
    assert (guest.sector, places(guest)) == (4096, [(1, 10)])
    assert "behind the disk" in guest.partitions[1].content.left_whole


def test_a_filesystem_with_larger_sectors_where_512_count(tmp_path: Path) -> None:
    disk = table(empty(tmp_path / "disk", SIZE), 512, "start=1M,size=60M\n")
    part = empty(tmp_path / "part", 60 * MIB)
    run("mkfs.fat", "-S", "4096", "-h", "2048", part)
    put_file(disk, MIB, part)
    guest = look(disk)
    assert (guest.sector, places(guest)) == (512, [(1, 60)])


def test_a_hybrid_of_iso_and_disk(tmp_path: Path) -> None:
    """As isohybrid writes it: a partition over all of the ISO, and one for EFI, counting 512."""
    disk = empty(tmp_path / "disk", 40 * MIB)
    put(disk, 32768, b"\1CD001\1")
    fat = empty(tmp_path / "fat", 2 * MIB)
    run("mkfs.fat", fat)
    put_file(disk, 4 * MIB, fat)
    put(disk, 0, boot(entry(0x17, 64, 80000), entry(0xEF, 8192, 4096)))
    guest = look(disk)
    assert (guest.table, guest.sector) == ("mbr", 512)
    assert "ISO 9660" in guest.left_whole
    assert not guest.free


def test_a_gpt_in_sectors_of_2048(tmp_path: Path) -> None:
    disk = empty(tmp_path / "disk", SIZE)
    with loop(disk, 2048) as device:
        run("sfdisk", "--quiet", device, stdin="label: gpt\nsize=10M\n")
    guest = look(disk)
    assert (guest.table, guest.sector, guest.left_whole) == ("gpt", 2048, "")
    assert [each.size for each in guest.partitions] == [10 * MIB]
    assert struct.unpack_from("<I", disk.read_bytes(), 446 + 8) == (1,)
