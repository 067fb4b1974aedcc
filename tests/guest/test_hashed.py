"""Filesystems under dm-verity and the like: nothing of them is free, and the rest of a disk is.

The trees are those of veritysetup, which also checks that what reads as zeroes is not under one.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from imgfs.guest.hashed import _roots_of
from tests.guest.contents import zero
from tests.guest.lvm2 import physical
from tests.guest.tools import MIB, empty, free_of, look, put, put_file, run

SIZE = 24 * MIB  # of the filesystem


@pytest.fixture
def ext(tmp_path: Path) -> Path:
    """A filesystem whose free blocks are not zero."""
    path = empty(tmp_path / "ext", SIZE)
    run("mkfs.ext4", "-q", "-F", path)
    junk = tmp_path / "junk"
    junk.write_bytes(b"deleted" * (MIB // 2))
    run("debugfs", "-w", "-R", f"write {junk} a", path)
    run("debugfs", "-w", "-R", "rm a", path)
    run("e2fsck", "-fn", path)
    return path


def grown(path: Path, size: int) -> Path:
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def verity(data: Path, hashes: Path, *options: str) -> str:
    """Its root hash."""
    told = run("veritysetup", "format", *options, data, hashes)
    return told.partition("Root hash:")[2].split()[0]


def partitions(tmp_path: Path, *parts: Path | int, script: str = "") -> Path:
    """A disk with these, or as many bytes of nothing, in partitions of their sizes."""
    sizes = [part if isinstance(part, int) else part.stat().st_size for part in parts]
    disk = empty(tmp_path / "disk", sum(sizes) + (2 + len(parts)) * MIB)
    lines = script or "".join(f"size={-(-size // 512)}\n" for size in sizes)
    run("sfdisk", "--quiet", disk, stdin="label: gpt\n" + lines)
    for part, place in zip(parts, look(disk).partitions, strict=True):
        if isinstance(part, Path):
            put_file(disk, place.start, part)
    return disk


def why(disk: Path) -> list[str]:
    guest = look(disk)
    assert not guest.left_whole
    contents = [content for _, content in guest.contents()]
    for content in contents:
        if content.left_whole and content.filesystem:
            assert not content.filesystem.free
    return [content.left_whole for content in contents]


@pytest.mark.parametrize("offset", [SIZE, SIZE + 512 * 9, SIZE + 3 * MIB])
@pytest.mark.parametrize("options", [(), ("--hash-block-size=1024", "--data-block-size=1024")])
def test_a_tree_behind_the_filesystem(ext: Path, offset: int, options: tuple[str, ...]) -> None:
    assert free_of(look(ext))
    disk = grown(ext, SIZE + 8 * MIB)
    assert free_of(look(disk))
    blocks = f"--data-blocks={SIZE // (1024 if options else 4096)}"
    hashed = (f"--hash-offset={offset}", blocks, *options)
    root = verity(disk, disk, *hashed)
    run("veritysetup", "verify", *hashed, disk, disk, root)
    (found,) = why(disk)
    assert f"dm-verity is behind it, at byte {offset}" in found
    zero(disk, look(disk).free)
    run("veritysetup", "verify", *hashed, disk, disk, root)


def test_a_tree_without_a_superblock(ext: Path) -> None:
    disk = grown(ext, SIZE + 40 * MIB)
    hashed = ("--no-superblock", f"--hash-offset={SIZE}", f"--data-blocks={SIZE // 4096}")
    verity(disk, disk, *hashed, "--salt=-")
    assert f"at byte {SIZE}, may be a tree" in why(disk)[0]


@pytest.mark.parametrize("place", [SIZE + 150 * MIB, SIZE + 299 * MIB])
def test_a_tree_far_behind(ext: Path, place: int) -> None:
    disk = grown(ext, SIZE + 300 * MIB)
    assert why(disk) == [""]
    hashed = ("--no-superblock", f"--hash-offset={place}", f"--data-blocks={SIZE // 4096}")
    verity(disk, disk, *hashed)
    assert "may be a tree" in why(disk)[0]


def test_too_much_behind_to_look_through(ext: Path) -> None:
    assert "too much" in why(grown(ext, 100 * SIZE))[0]


def test_what_is_too_short_for_a_tree(ext: Path) -> None:
    disk = grown(ext, SIZE + 4096)
    put(disk, SIZE, b"old" * 10)
    assert why(disk) == [""]


@pytest.mark.parametrize("fill", [b"\1", b"old bytes" * 5000])
def test_whatever_is_behind(ext: Path, fill: bytes) -> None:
    disk = grown(ext, SIZE + 2 * MIB)
    put(disk, SIZE + MIB, fill)
    assert f"at byte {SIZE + MIB}, may be a tree" in why(disk)[0]


@pytest.mark.parametrize(
    "command", ["mkfs.xfs -q --unsupported", "mkntfs -q -F -f", "mkfs.fat", "mkfs.exfat"]
)
def test_other_filesystems(tmp_path: Path, command: str) -> None:
    disk = empty(tmp_path / "disk", 64 * MIB)
    run(*command.split(), disk)
    grown(disk, 70 * MIB)
    assert why(disk) == [""]
    verity(disk, disk, f"--hash-offset={64 * MIB}", f"--data-blocks={64 * MIB // 4096}")
    assert "dm-verity" in why(disk)[0]


def test_an_android_footer(ext: Path) -> None:
    """AvbFooter of libavb's avb_footer.h."""
    disk = grown(ext, SIZE + 2 * MIB)
    footer = struct.pack(">4sIIQQQ28x", b"AVBf", 1, 0, SIZE, SIZE + MIB, 512)
    put(disk, disk.stat().st_size - 64, footer)
    assert why(disk) == ["there are signatures of ext and Android verified boot footer"]
    disk = partitions(disk.parent, disk)
    assert "Android verified boot footer" in why(disk)[0]


def test_android_metadata_of_all_partitions(ext: Path, tmp_path: Path) -> None:
    vbmeta = tmp_path / "vbmeta"
    vbmeta.write_bytes(b"AVB0" + struct.pack(">II", 1, 0) + bytes(65536 - 12))
    found = why(partitions(tmp_path, ext, vbmeta))
    assert "partition 2 has Android verified boot metadata" in found[0]


def test_a_tree_in_another_partition(ext: Path, tmp_path: Path) -> None:
    hashes = empty(tmp_path / "hashes", MIB)
    verity(ext, hashes)
    other = empty(tmp_path / "other", SIZE + MIB)
    run("mkfs.ext4", "-q", "-F", other)
    small = empty(tmp_path / "small", SIZE - MIB)
    run("mkfs.ext4", "-q", "-F", small)
    found = why(partitions(tmp_path, other, ext, hashes, small))
    assert found[0] == found[3] == ""
    assert found[1] == (
        f"partition 3 has dm-verity over all blocks of {SIZE} bytes, those that are free too"
    )


def test_a_tree_for_data_of_no_size_that_is_here(ext: Path, tmp_path: Path) -> None:
    hashes = empty(tmp_path / "hashes", MIB)
    verity(ext, hashes, f"--data-blocks={SIZE // 8192}")
    found = why(partitions(tmp_path, ext, hashes))
    assert "partition 2 has dm-verity" in found[0]


def test_two_trees_in_another_partition(ext: Path, tmp_path: Path) -> None:
    hashes = empty(tmp_path / "hashes", 2 * MIB)
    other = empty(tmp_path / "other", SIZE + 2 * MIB)
    run("mkfs.ext4", "-q", "-F", other)
    verity(ext, hashes)
    verity(other, hashes, f"--hash-offset={MIB}")
    found = why(partitions(tmp_path, ext, other, hashes))
    assert all("partition 3 has dm-verity" in each for each in found[:2])


def test_a_damaged_superblock_may_be_of_everything(ext: Path, tmp_path: Path) -> None:
    hashes = empty(tmp_path / "hashes", MIB)
    hashes.write_bytes(b"verity\0\0" + b"\xff" * 4096)
    assert "partition 2 has dm-verity over all" in why(partitions(tmp_path, ext, hashes))[0]


@pytest.mark.parametrize(
    "type", ["2c7357ed-ebd2-46d9-aec1-23d437ec2bf5", "6e11a4e7-fbca-4ded-b9e9-e1a512bb664e"]
)
def test_a_type_of_partition(ext: Path, tmp_path: Path, type: str) -> None:
    disk = partitions(tmp_path, ext, MIB)
    assert why(disk)[0] == ""
    run("sfdisk", "--quiet", "--part-type", disk, "2", type)
    assert "partition 2 has dm-verity" in why(disk)[0]


def test_a_bare_tree_in_another_partition(ext: Path, tmp_path: Path) -> None:
    hashes = empty(tmp_path / "hashes", MIB)
    verity(ext, hashes, "--no-superblock")
    assert _roots_of(SIZE) == (1, 48)
    found = why(partitions(tmp_path, ext, hashes))
    assert "partition 2 has what may be a tree of hashes" in found[0]
    hashes.write_bytes(b"\xeb\x63\x90 not a tree")
    assert why(partitions(tmp_path, ext, hashes))[0] == ""


def test_tags_of_dm_integrity_on_another_partition(ext: Path, tmp_path: Path) -> None:
    tags = empty(tmp_path / "tags", MIB)
    put(tags, 0, struct.pack("<8sBBHIQ", b"integrt\0", 1, 15, 4, 88, SIZE // 512))
    assert "partition 2 has dm-integrity" in why(partitions(tmp_path, ext, tags))[0]


def test_a_store_of_a_snapshot(ext: Path, tmp_path: Path) -> None:
    store = empty(tmp_path / "store", MIB)
    put(store, 0, b"SnAp" + struct.pack("<III", 1, 1, 8))
    assert "snapshot exception store" in why(partitions(tmp_path, ext, store))[0]


def test_logical_volumes(ext: Path, tmp_path: Path) -> None:
    pv = empty(tmp_path / "pv", 64 * MIB)
    with physical([pv], tmp_path / "lock") as lvm:
        lvm("pvcreate", *lvm.devices)
        lvm("vgcreate -s 1m vg", *lvm.devices)
        lvm.create(f"-l {SIZE // MIB} -n data vg")
        lvm.create("-l 1 -n hashes vg")
        lvm.create(f"-l {SIZE // MIB + 2} -n both vg")
    hashes = empty(tmp_path / "hashes", MIB)
    verity(ext, hashes)
    put_file(pv, MIB, ext)
    put_file(pv, MIB + SIZE + MIB, ext)
    put_file(pv, MIB + SIZE, hashes)
    disk, data, _, both = why(pv)
    assert disk == ""
    assert "volume vg-hashes has dm-verity" in data
    assert "volume vg-hashes has dm-verity" in both  # its filesystem is as large
    put(pv, MIB + SIZE, bytes(512))
    assert why(pv)[1] == ""
    put(pv, MIB + SIZE + MIB + SIZE, b"a hash")
    assert "may be a tree" in why(pv)[3]
