"""A whole disk: what is in which partition, what is free on all of it, and in how few reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgfs.guest.disk import look_at_disk
from tests.drive import Files
from tests.guest.lvm2 import physical
from tests.guest.tools import MIB, domain_map, empty, free_of, look, put, put_file, run

SCRIPT = "".join(
    [
        "label: gpt\n",
        'start=2048, size=40M, name="boot"\n',
        "size=16M, type=swap\n",
        "size=48M, type=lvm\n",
        "size=20M\n",
        "size=20M\n",
    ]
)
BOOT, SWAP, GROUP, EXFAT, LAST = (n * MIB for n in (1, 41, 57, 105, 125))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """FAT, swap, a volume with swap in a group, exFAT, and nothing."""
    path = empty(tmp_path / "disk", 150 * MIB)
    run("sfdisk", "--quiet", path, stdin=SCRIPT)
    fat = empty(tmp_path / "fat", 40 * MIB)
    run("mkfs.fat", "-F", "32", "-s", "1", "-n", "BOOT", fat)
    swap = empty(tmp_path / "swap", 16 * MIB)
    run("mkswap", "-q", swap)
    exfat = empty(tmp_path / "exfat", 20 * MIB)
    run("mkfs.exfat", exfat)
    pv = empty(tmp_path / "pv", 48 * MIB)
    with physical([pv], tmp_path / "lock") as lvm:
        lvm("pvcreate", *lvm.devices)
        lvm("vgcreate -s 1m vg", *lvm.devices)
        lvm.create("-l 16 -n swap vg")
        lvm.create("-l 8 -n empty vg")
    for at, part in ((BOOT, fat), (SWAP, swap), (GROUP, pv), (GROUP + MIB, swap), (EXFAT, exfat)):
        put_file(path, at, part)
    return path


def test_everything_at_once(disk: Path, tmp_path: Path) -> None:
    files = Files(disk)
    guest = files.run(look_at_disk(disk.stat().st_size))
    kinds = [
        each.content.filesystem.kind if each.content.filesystem else "" for each in guest.partitions
    ]
    assert kinds == ["vfat", "swap", "", "exfat", ""]
    assert [each.content.left_whole for each in guest.partitions] == [
        *("", "", "", ""),
        "nothing is known of what it holds",
    ]
    assert [each.name for each in guest.volumes] == ["vg-swap", "vg-empty"]
    assert guest.volumes[1].content.left_whole == "nothing is known of what it holds"
    wanted = [(start + BOOT, end + BOOT) for start, end in domain_map("vfat", tmp_path / "fat")]
    wanted += [(SWAP + 4096, SWAP + 16 * MIB), (GROUP + MIB + 4096, GROUP + 17 * MIB)]
    wanted += [
        (start + EXFAT, end + EXFAT) for start, end in domain_map("exfat", tmp_path / "exfat")
    ]
    assert free_of(guest) == wanted
    # The ends of the disk, those of the partitions; the group's two, its volumes' ends, swap.
    assert files.reads == 6


def test_luks_is_left_whole(disk: Path) -> None:
    put(disk, LAST, b"LUKS\xba\xbe\0\2")
    assert look(disk).partitions[4].content.left_whole == "it is LUKS2"


def test_many_partitions_are_read_together(tmp_path: Path) -> None:
    path = empty(tmp_path / "disk", 200 * MIB)
    run("sfdisk", "--quiet", path, stdin="label: gpt\n" + "size=3M\n" * 60)
    swap = empty(tmp_path / "swap", 3 * MIB)
    run("mkswap", "-q", swap)
    for partition in look(path).partitions:
        put_file(path, partition.start, swap)
    files = Files(path)
    guest = files.run(look_at_disk(path.stat().st_size))
    assert len(free_of(guest)) == 60
    assert files.reads <= 2 + 60 // 8 + 1


@pytest.mark.parametrize(
    ("offset", "data", "why"),
    [
        (-4096 + 60, b"\x83\x74\x02\x6d", "DRBD"),
        (4096 + 24, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"), "bcache"),
        (32769, b"CD001", "ISO 9660"),
    ],
)
def test_a_disk_that_is_part_of_something(disk: Path, offset: int, data: bytes, why: str) -> None:
    put(disk, offset if offset >= 0 else 150 * MIB + offset, data)
    guest = look(disk)
    assert why in guest.left_whole
    assert len(guest.partitions) == 5
    assert not guest.free


def test_two_signatures_in_a_partition(disk: Path) -> None:
    before = free_of(look(disk))
    put(disk, SWAP + 65536 + 64, b"_BHRfS_M")
    guest = look(disk)
    assert guest.partitions[1].content.left_whole == "there are signatures of btrfs and swap"
    swaps = (SWAP + 4096, GROUP + MIB + 4096)  # both: what of the two it is may be in use
    assert free_of(guest) == [each for each in before if each[0] not in swaps]


def test_a_table_in_a_partition(disk: Path, tmp_path: Path) -> None:
    nested = empty(tmp_path / "nested", 16 * MIB)
    run("sfdisk", "--quiet", nested, stdin="label: dos\nsize=3M\n")
    put(disk, SWAP, nested.read_bytes()[:1024])
    guest = look(disk)
    assert (
        guest.partitions[1].content.left_whole == "there are signatures of swap and partition table"
    )


def test_windows_shared_volumes(disk: Path) -> None:
    for kind in ("af9b60a0-1431-4f62-bc68-3311714a69ad", "e75caf8f-f680-4cee-afa3-b001e56efc2d"):
        run("sfdisk", "--quiet", "--part-type", disk, "1", kind)
        content = look(disk).partitions[0].content
        assert content.filesystem is None
        assert "signatures of vfat and Windows" in content.left_whole


def test_no_table_but_a_filesystem(tmp_path: Path) -> None:
    path = empty(tmp_path / "disk", 20 * MIB)
    run("mkfs.exfat", path)
    guest = look(path)
    assert guest.table == "none"
    assert guest.whole is not None
    assert guest.whole.holds == ("exfat",)
    assert free_of(guest) == domain_map("exfat", path)


def test_no_table_but_a_group(tmp_path: Path) -> None:
    pv = empty(tmp_path / "pv", 24 * MIB)
    with physical([pv], tmp_path / "lock") as lvm:
        lvm("pvcreate", *lvm.devices)
        lvm("vgcreate -s 1m vg", *lvm.devices)
        lvm.create("-l 3 -n swap vg")
    swap = empty(tmp_path / "swap", 3 * MIB)
    run("mkswap", "-q", swap)
    put_file(pv, MIB, swap)
    guest = look(pv)
    assert [each.name for each in guest.volumes] == ["vg-swap"]
    assert free_of(guest) == [(MIB + 4096, 4 * MIB)]


def test_a_filesystem_under_a_new_table(tmp_path: Path) -> None:
    """The first sector of FAT stays under fdisk's table: which of both is true cannot be told."""
    path = empty(tmp_path / "disk", 40 * MIB)
    run("mkfs.fat", "-F", "16", path)
    assert free_of(look(path))
    run("sfdisk", "--quiet", "--wipe", "never", path, stdin="label: dos\nsize=3M\n")
    guest = look(path)
    assert (guest.table, len(guest.partitions)) == ("mbr", 1)
    assert "vfat" in guest.left_whole
    assert not guest.free


def test_a_sleeping_swap_in_a_partition_that_is_refused(disk: Path) -> None:
    run("sfdisk", "--quiet", "--wipe", "never", disk, stdin="label: dos\nsize=40M\nsize=16M\n")
    put(disk, 512, bytes(1 << 15))
    with disk.open("r+b") as file:
        file.truncate(150 * MIB // 512 * 512 - 4096)  # without the backup of the GPT
    assert look(disk).left_whole == ""
    put(disk, 446 + 16 + 12, b"\xff\xff\xff\x0f")
    guest = look(disk)
    assert not guest.partitions[1].is_there
    assert guest.left_whole == ""
    assert guest.free
    put(disk, SWAP + 4086, b"S1SUSPEND\0")
    guest = look(disk)
    assert "partition 2 is a suspended swap" in guest.left_whole
    assert not guest.free


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("mkfs.ext4 -q -b 1024", "ext4"),
        ("mkfs.xfs -q", "xfs"),
        ("mkfs.ntfs -q -F -Q", "ntfs"),
        ("mkfs.fat -F 32", "vfat"),
        ("mkfs.exfat", "exfat"),
        ("mkswap -q", "swap"),
    ],
)
def test_larger_than_its_place(tmp_path: Path, command: str, kind: str) -> None:
    """Left whole with the reason, be it by a single cluster."""
    size = 320 * MIB
    image = empty(tmp_path / "image", size)
    run(*command.split(), image)
    whole = look(image).whole
    assert whole is not None
    assert whole.filesystem is not None
    for place in (size, whole.filesystem.size - 4096, size - MIB):
        guest = Files(image).run(look_at_disk(place))
        assert guest.whole is not None
        assert guest.whole.filesystem is not None
        assert guest.whole.filesystem.kind == kind
        assert bool(guest.whole.left_whole) == (not guest.free) == (place < size)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1024, 4096, 70000, 300001])
def test_hardly_a_disk(size: int) -> None:
    for content in (bytes(size), b"\xff" * size, b"\x55\xaa" * (size // 2)):
        guest = look(content)
        assert (guest.table, guest.partitions, len(guest.free)) == ("none", (), 0)
