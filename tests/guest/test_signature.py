"""What signatures are found, where mkfs and the like put them, and beside what libblkid says."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from imgfs.guest.signature import sample, signatures
from imgfs.guest.signature_tables import MAGICS
from tests.drive import Files
from tests.guest.tools import MIB, empty, put, run

SIZE = 128 * MIB


def names(path: Path | bytes) -> list[str]:
    size = path.stat().st_size if isinstance(path, Path) else len(path)
    files = Files(path)
    found = signatures(files.run(sample(0, size)))
    assert files.reads == 1
    return found


def blkid(path: Path) -> str:
    """The type that libblkid is sure of, or nothing."""
    command = ["blkid", "-p", "-o", "value", "-s", "TYPE", path]
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return empty(tmp_path / "disk", SIZE)


MAKERS = [
    ("mkfs.ext4 -q -F", "ext", "ext4"),
    ("mkfs.ext4 -q -F -b 1024 -O ^has_journal", "ext", "ext4"),
    ("mkfs.ext2 -q -F", "ext", "ext2"),
    ("mkfs.xfs -q -f --unsupported", "xfs", "xfs"),
    ("mkfs.btrfs -q", "btrfs", "btrfs"),
    ("mkntfs -q -F -f", "ntfs", "ntfs"),
    ("mkfs.fat", "vfat", "vfat"),
    ("mkfs.fat -F 12", "vfat", "vfat"),
    ("mkfs.exfat", "exfat", "exfat"),
    ("mkswap -q", "swap", "swap"),
    ("mkfs.f2fs -q", "F2FS", "f2fs"),
    ("make-bcache -B", "bcache", "bcache"),
    ("make-bcache -C", "bcache", "bcache"),
]


@pytest.mark.parametrize(("command", "name", "kind"), MAKERS, ids=[m[0] for m in MAKERS])
def test_what_tools_make(disk: Path, command: str, name: str, kind: str) -> None:
    run(*command.split(), disk)
    assert names(disk) == [name]
    assert blkid(disk) == kind


@pytest.mark.parametrize("version", ["1", "2"])
def test_luks(disk: Path, version: str) -> None:
    options = ["--pbkdf-force-iterations", "1000", "--type", f"luks{version}"]
    options += ["--pbkdf", "pbkdf2"] if version == "2" else []
    run("cryptsetup", "luksFormat", "-q", *options, disk, "-", stdin="secret")
    assert names(disk) == [f"LUKS{version}"]
    if version == "2":  # the first header is lost, the second is not
        put(disk, 0, bytes(4096))
        assert names(disk) == ["second LUKS2 header"]
        assert blkid(disk) == "crypto_LUKS"


def md_1(offset: int) -> bytes:
    """A superblock of version 1 for that byte of its disk, with its checksum."""
    block = bytearray(256)
    struct.pack_into("<III", block, 0, 0xA92B4EFC, 1, 0)
    struct.pack_into("<Q", block, 144, offset // 512)
    total = sum(struct.unpack("<64I", block))
    struct.pack_into("<I", block, 216, (total & 0xFFFFFFFF) + (total >> 32))
    return bytes(block)


@pytest.mark.parametrize("size", [SIZE, SIZE + 512, SIZE - 70 * 1024])
@pytest.mark.parametrize("version", ["0.90", "1.0", "1.1", "1.2"])
def test_md(tmp_path: Path, size: int, version: str) -> None:
    disk = empty(tmp_path / "disk", size)
    run("mkfs.ext4", "-q", "-F", "-E", "offset=0", disk, "64M")
    if version == "0.90":
        at = size // 65536 * 65536 - 65536
        block = struct.pack("<4I", 0xA92B4EFC, 0, 90, 0) + bytes(16) + struct.pack("<I", 64 << 10)
    else:
        at = {"1.0": size // 4096 * 4096 - 8192, "1.1": 0, "1.2": 4096}[version]
        block = md_1(at)
    put(disk, at, block)
    assert names(disk) == ["ext", "RAID member (md)"]
    put(disk, 1024, bytes(1024))
    if version == "0.90" or version == "1.2":
        assert blkid(disk) == "linux_raid_member"
    if version != "0.90":  # of another place
        put(disk, at, md_1(at + 4096))
        assert names(disk) == []


@pytest.mark.parametrize("label", range(4))
@pytest.mark.parametrize("order", "<>")
def test_zfs_in_each_label(disk: Path, label: int, order: str) -> None:
    size = SIZE + 100_000
    with disk.open("r+b") as file:
        file.truncate(size)
    at = [0, 1, size // 262144 - 2, size // 262144 - 1][label] * 262144
    for slot in range(4):
        put(disk, at + 131072 + slot * 4096, struct.pack(order + "Q", 0x00BAB10C))
    assert names(disk) == ["ZFS"]
    for slot in range(4):
        put(disk, at + 131072 + slot * 4096, bytes(8))
    assert names(disk) == []
    put(disk, at + 131072 - 40, struct.pack(order + "Q", 0x0210DA7AB10C7A11))
    assert names(disk) == ["ZFS"]


def test_drbd(disk: Path) -> None:
    block = bytearray(4096)
    struct.pack_into(">I", block, 60, 0x8374026B)
    struct.pack_into(">I", block, 80, 4096)
    put(disk, SIZE - 4096, bytes(block))
    assert names(disk) == ["DRBD"]
    assert blkid(disk) == "drbd"


@pytest.mark.parametrize("index", range(len(MAGICS)))
def test_each_beside_a_filesystem(tmp_path: Path, index: int) -> None:
    """Whatever it is, an old signature makes two of it."""
    offset, magic, name = MAGICS[index]
    disk = empty(tmp_path / "disk", 16 * MIB)
    put(disk, offset if offset >= 0 else 16 * MIB + offset, magic)
    assert names(disk) == [name]


@pytest.mark.parametrize("old", ["mkfs.btrfs -q", "mkfs.xfs -q -f --unsupported", "mkswap -q"])
def test_an_old_one_that_was_not_wiped(disk: Path, tmp_path: Path, old: str) -> None:
    run(*old.split(), disk)
    first = names(disk)
    kept = disk.read_bytes()[:MIB]
    run("mkfs.ext4", "-q", "-F", disk)
    assert names(disk) == ["ext"]  # mke2fs wipes what is at these places
    for at, length in ((0, 512), (4086, 10), (65536, 4096)):
        put(disk, at, kept[at : at + length])
    assert sorted(names(disk)) == sorted(["ext", *first])


@pytest.mark.parametrize("size", [1, 511, 512, 513, 1080, 4096, 65536, 131072, 262144, 300000])
def test_small_ranges(size: int) -> None:
    assert names(bytes(size)) == []
    assert names(b"\xff" * size) == []
    assert names(b"XFSB".ljust(size, b"\0")[:size]) == (["xfs"] if size >= 4 else [])
