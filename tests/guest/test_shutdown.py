"""Swap stays where the guest may go on: beside a filesystem that is in use, or may be."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest

from tests.guest.lvm2 import physical
from tests.guest.tools import MIB, empty, free_of, look, put, put_file, run

SWAP = 121 * MIB  # where the second partition begins
OTHER = "another filesystem of this disk was not shut down"
MAYBE = "another filesystem of this disk may not be shut down"


@pytest.fixture
def swap(tmp_path: Path) -> Path:
    path = empty(tmp_path / "swap", 8 * MIB)
    run("mkswap", "-q", path)
    return path


def disk_with(tmp_path: Path, swap: Path, other: Path | None, kind: str = "") -> Path:
    disk = empty(tmp_path / "disk", 140 * MIB)
    first = f"size=120M{kind and ',type=' + kind}"
    run("sfdisk", "--quiet", disk, stdin=f"label: gpt\n{first}\nsize=8M,type=swap\nsize=4M\n")
    if other is not None:
        put_file(disk, MIB, other)
    put_file(disk, SWAP, swap)
    return disk


def swap_of(disk: Path) -> str:
    """Why it is left whole."""
    guest = look(disk)
    content = guest.partitions[1].content
    assert content.filesystem is not None
    assert content.filesystem.kind == "swap"
    is_free = (SWAP + 4096, SWAP + 8 * MIB) in free_of(guest)
    assert is_free == (not content.left_whole) == bool(content.filesystem.free)
    return content.left_whole


def made(tmp_path: Path, command: str) -> Path:
    path = empty(tmp_path / "fs", 120 * MIB)
    run(*command.split(), path)
    return path


CLEAN = [
    "mkfs.ext4 -q -F",
    "mkfs.ext2 -q -F",
    "mkfs.xfs -q --unsupported",
    "mkfs.fat -F 32 -s 1",
    "mkfs.fat -F 16",
    "mkfs.exfat",
    "mkntfs -q -F -f",
    "mkswap -q",
]


@pytest.mark.parametrize("command", CLEAN)
def test_beside_what_was_unmounted(tmp_path: Path, swap: Path, command: str) -> None:
    assert swap_of(disk_with(tmp_path, swap, made(tmp_path, command))) == ""


def test_beside_nothing(tmp_path: Path, swap: Path) -> None:
    assert swap_of(disk_with(tmp_path, swap, None)) == ""


def _needs_recovery(path: Path) -> None:
    run("debugfs", "-w", "-R", "feature needs_recovery", path)


def _ext_state(path: Path) -> None:
    run("debugfs", "-w", "-R", "set_super_value state 0", path)


def _ext_orphan(path: Path) -> None:
    run("debugfs", "-w", "-R", "set_super_value last_orphan 12", path)


def _xfs_log(path: Path) -> None:
    """Of another record than that of an unmount: no flags of such in its one operation."""
    with path.open("rb") as file:
        super_block = file.read(512)
    (block,) = struct.unpack_from(">I", super_block, 4)
    (start,) = struct.unpack_from(">Q", super_block, 48)
    per_group = struct.unpack_from(">I", super_block, 84)[0]
    shift = super_block[124]
    at = ((start >> shift) * per_group + (start & ((1 << shift) - 1))) * block
    put(path, at + 512 + 9, b"\0")


def _fat_32(path: Path) -> None:
    put(path, 65, b"\1")


def _fat_table(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(512)
    (reserved,) = struct.unpack_from("<H", head, 14)
    (sectors,) = struct.unpack_from("<I", head, 36)
    for copy in range(2):
        put(path, (reserved + copy * sectors) * 512 + 4, struct.pack("<I", 0x07FFFFFF))


def _exfat(path: Path) -> None:
    put(path, 106, b"\2")


IN_USE = [
    ("mkfs.ext4 -q -F", _needs_recovery, "recovery"),
    ("mkfs.ext4 -q -F -O ^has_journal", _ext_state, "s_state is 0x0"),
    ("mkfs.ext2 -q -F", _ext_state, "s_state is 0x0"),
    ("mkfs.ext4 -q -F", _ext_orphan, "orphan"),
    ("mkfs.xfs -q --unsupported", _xfs_log, "not an unmount record"),
    ("mkfs.fat -F 32 -s 1", _fat_32, "not unmounted"),
    ("mkfs.fat -F 32 -s 1", _fat_table, "not unmounted"),
    ("mkfs.exfat", _exfat, "not unmounted"),
]


@pytest.mark.parametrize(("command", "use", "why"), IN_USE)
def test_beside_what_is_in_use(
    tmp_path: Path, swap: Path, command: str, use: object, why: str
) -> None:
    path = made(tmp_path, command)
    assert callable(use)
    use(path)
    found = swap_of(disk_with(tmp_path, swap, path))
    assert found.startswith(f"{OTHER}: partition 1: ")
    assert why in found
    guest = look(disk_with(tmp_path, swap, path))
    filesystem = guest.partitions[0].content.filesystem
    assert filesystem is not None
    assert filesystem.not_shut_down
    assert not guest.free


def test_beside_ntfs_in_use(tmp_path: Path, swap: Path) -> None:
    """The dirty flag of $Volume."""
    path = made(tmp_path, "mkntfs -q -F -f")
    raw = bytearray(path.read_bytes())
    mft = struct.unpack_from("<Q", raw, 48)[0] * raw[13] * 512
    volume = mft + 3 * 1024
    at = struct.unpack_from("<H", raw, volume + 20)[0]
    while struct.unpack_from("<I", raw, volume + at)[0] != 0x70:
        at += struct.unpack_from("<I", raw, volume + at + 4)[0]
    value = volume + at + struct.unpack_from("<H", raw, volume + at + 20)[0]
    raw[value + 10] |= 1
    path.write_bytes(raw)
    assert "it is dirty" in swap_of(disk_with(tmp_path, swap, path))


def test_btrfs_never_says(tmp_path: Path, swap: Path) -> None:
    path = made(tmp_path, "mkfs.btrfs -q")
    disk = disk_with(tmp_path, swap, path)
    assert "btrfs does not say whether it was unmounted" in swap_of(disk)
    assert look(disk).partitions[0].content.left_whole == ""


UNKNOWN = [
    ("LUKS", b"LUKS\xba\xbe\0\2", 0),
    ("F2FS", b"\x10\x20\xf5\xf2", 1024),
    ("APFS", b"NXSB", 32),
    ("nothing is known", b"ciphertext", 5000),
]


@pytest.mark.parametrize(("why", "magic", "offset"), UNKNOWN)
def test_beside_what_is_not_read(
    tmp_path: Path, swap: Path, why: str, magic: bytes, offset: int
) -> None:
    disk = disk_with(tmp_path, swap, None)
    put(disk, MIB + offset, magic)
    found = swap_of(disk)
    assert found.startswith(f"{MAYBE}: partition 1: ")
    assert why in found


def test_beside_a_verified_root(tmp_path: Path, swap: Path) -> None:
    """It is mounted read-only, and clean whatever the guest does."""
    path = made(tmp_path, "mkfs.ext4 -q -F")
    disk = disk_with(tmp_path, swap, path)
    run("sfdisk", "--quiet", "--part-type", disk, "3", "2c7357ed-ebd2-46d9-aec1-23d437ec2bf5")
    assert "dm-verity" in swap_of(disk)


def test_beside_a_boot_loader(tmp_path: Path, swap: Path) -> None:
    disk = disk_with(tmp_path, swap, None, "21686148-6449-6e6f-744e-656564454649")
    put(disk, MIB, b"\x52\x56\xbe GRUB")
    assert swap_of(disk) == ""


def test_in_logical_volumes(tmp_path: Path, swap: Path) -> None:
    pv = empty(tmp_path / "pv", 64 * MIB)
    with physical([pv], tmp_path / "lock") as lvm:
        lvm("pvcreate", *lvm.devices)
        lvm("vgcreate -s 1m vg", *lvm.devices)
        lvm.create("-l 8 -n swap vg")
        lvm.create("-l 24 -n root vg")
    put_file(pv, MIB, swap)
    root = empty(tmp_path / "root", 24 * MIB)
    run("mkfs.ext4", "-q", "-F", root)
    put_file(pv, 9 * MIB, root)
    guest = look(pv)
    assert [each.content.left_whole for each in guest.volumes] == ["", ""]
    assert (MIB + 4096, 9 * MIB) in free_of(guest)
    _needs_recovery(root)
    put_file(pv, 9 * MIB, root)
    found = look(pv)
    assert found.volumes[0].content.left_whole.startswith(f"{OTHER}: volume vg-root: ")
    assert not found.free


def test_the_other_is_a_volume_that_is_not_seen(tmp_path: Path, swap: Path) -> None:
    pv = empty(tmp_path / "pv", 60 * MIB)
    with physical([pv], tmp_path / "lock") as lvm:
        lvm("pvcreate", *lvm.devices)
        lvm("vgcreate -s 1m vg", *lvm.devices)
        lvm.create("-l 8 -n root vg")
    disk = disk_with(tmp_path, swap, pv)
    assert swap_of(disk) == ""
    raw = shutil.copy(disk, tmp_path / "copy")
    put(raw, MIB + 512 + 16, b"\xff")  # the label's checksum
    assert "label" in swap_of(raw)
