"""ext filesystems that cannot be trusted are left whole, whatever they hold."""

from __future__ import annotations

import random
import shutil
import struct
import time
from pathlib import Path

import pytest

from imgfs.guest import ext_tables as tables
from imgfs.guest.ext import look
from tests.drive import Files
from tests.guest.mounted import LONG, in_order, mounted, run, runs
from tests.guest.test_ext import MiB, free_of_dumpe2fs, made, seen

SB = 1024
KINDS = {
    "ext2": ["-t", "ext2", "-b", "1024"],
    "ext3": ["-t", "ext3", "-b", "2048"],
    "crc16": ["-t", "ext4", "-O", "^metadata_csum,uninit_bg", "-b", "1024"],
    "crc32c": ["-t", "ext4", "-b", "4096", "-g", "1024"],
    "meta_bg": ["-t", "ext4", "-b", "1024", "-O", "^resize_inode,meta_bg,^64bit", "-g", "1024"],
    "bigalloc": ["-t", "ext4", "-b", "1024", "-O", "bigalloc", "-C", "4096"],
    "mmp": ["-t", "ext4", "-b", "1024", "-O", "mmp"],
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("ext")
    return {
        name: made(folder / name, 20 * MiB, *words, "-F", "-q").read_bytes()
        for name, words in KINDS.items()
    }


def patched(image: bytes, offset: int, what: bytes) -> bytearray:
    """With other bytes in its superblock, whose checksum is then right again."""
    changed = bytearray(image)
    changed[SB + offset : SB + offset + len(what)] = what
    sealed(changed)
    return changed


def sealed(image: bytearray) -> None:
    checksum = tables.crc32c(0xFFFFFFFF, bytes(image[SB : SB + 0x3FC]))
    image[SB + 0x3FC : SB + 0x400] = struct.pack("<I", checksum)


def le32(value: int) -> bytes:
    return struct.pack("<I", value)


def le16(value: int) -> bytes:
    return struct.pack("<H", value)


def superblock(image: bytes) -> tables.Superblock:
    return tables.parse_superblock(bytes(image[SB : 2 * SB]))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_wrong_at_first(kind: str, good: dict[str, bytes]) -> None:
    found = seen(patched(good[kind], 0x78, b"patched\0"))
    assert (found.left_whole, found.label) == ("", "patched")
    assert found.free
    assert found.kind == (kind if kind in ("ext2", "ext3") else "ext4")


@pytest.mark.parametrize(
    ("kind", "offset", "what", "why"),
    [
        ("ext2", 0x38, le16(0xEF54), "s_magic is 0xef54"),
        ("ext2", 0x3A, le16(0), "s_state is 0x0"),
        ("ext3", 0x3A, le16(3), "s_state is 0x3"),
        ("crc32c", 0x3A, le16(5), "s_state is 0x5"),
        ("ext3", 0x4C, le32(2), "s_rev_level 2"),
        ("ext3", 0x60, le32(0x2 | 0x4), "needs recovery"),
        ("ext3", 0x60, le32(0x8), "journal of another"),
        ("crc32c", 0x60, le32(0x1), "feature_incompat 0x1 "),
        ("crc32c", 0x60, le32(0x40000), "feature_incompat 0x40000"),
        ("crc32c", 0x60, le32(0x80000000), "feature_incompat 0x80000000"),
        ("crc32c", 0x64, le32(0x480), "feature_ro_compat 0x480"),
        ("crc32c", 0x64, le32(0x20400), "feature_ro_compat 0x20400"),
        ("crc32c", 0x64, le32(0x10400), "orphan file is in use"),
        ("crc32c", 0xE8, le32(12), "orphans begins at inode 12"),
        ("crc32c", 0xE0, le32(0), "another device"),
        ("crc32c", 0xE4, le32(0x801), "another device"),
        ("crc32c", 0x175, b"\2", "superblock's checksum"),
        ("ext2", 0x04, le32(20 * 1024 + 1), "are more than"),
        ("ext2", 0x04, le32(0xFFFFFFFF), "are more than"),
        ("ext2", 0x04, le32(0), "s_blocks_count is 0"),
        ("ext2", 0x14, le32(0), "s_first_data_block is 0"),
        ("crc32c", 0x14, le32(1), "s_first_data_block is 1"),
        ("ext2", 0x18, le32(7), "s_log_block_size is 7"),
        ("ext2", 0x18, le32(0xFFFFFFFF), "s_log_block_size is 42949"),
        ("ext2", 0x1C, le32(1), "s_log_cluster_size is 1"),
        ("bigalloc", 0x1C, le32(0xFFFFFFFF), "s_log_cluster_size is 42949"),
        ("bigalloc", 0x1C, le32(40), "s_log_cluster_size is 40"),
        ("ext2", 0x20, le32(0), "s_blocks_per_group is 0"),
        ("ext2", 0x24, le32(0), "s_clusters_per_group is 0"),
        ("ext2", 0x20, le32(8193) * 2, "s_clusters_per_group is 8193"),
        ("ext2", 0x28, le32(0), "s_inodes_per_group is 0"),
        ("ext2", 0x28, le32(1 << 30), "s_inodes_per_group is 1073741824"),
        ("ext2", 0x00, le32(7), "s_inodes_count is 7"),
        ("ext2", 0x58, le16(0), "s_inode_size is 0"),
        ("ext2", 0x58, le16(384), "s_inode_size is 384"),
        ("crc32c", 0xFE, le16(32), "s_desc_size is 32"),
        ("crc32c", 0xFE, le16(96), "s_desc_size is 96"),
        ("meta_bg", 0x104, le32(99), "s_first_meta_bg 99 is past"),
        ("mmp", 0x168, struct.pack("<Q", 1 << 50), "s_mmp_block 11258"),
        ("mmp", 0x168, struct.pack("<Q", 1), "mmp_magic is"),
        ("crc32c", 0x68, b"another uuid....", "descriptor of group 0 is wrong"),
        ("crc16", 0x68, b"another uuid....", "descriptor of group 0 is wrong"),
    ],
)
def test_superblock(kind: str, offset: int, what: bytes, why: str, good: dict[str, bytes]) -> None:
    found = seen(patched(good[kind], offset, what))
    assert why in found.left_whole
    assert not found.free


def test_superblock_checksum(good: dict[str, bytes]) -> None:
    image = bytearray(good["crc32c"])
    image[SB + 0x88] ^= 1
    assert seen(image).left_whole == "the superblock's checksum is wrong"


def test_mmp_in_use(good: dict[str, bytes]) -> None:
    image = bytearray(good["mmp"])
    at = superblock(image).mmp_block * 1024
    image[at + 4 : at + 8] = le32(12345)
    assert "mmp_seq is 0x3039" in seen(image).left_whole


def descriptor(image: bytes, number: int) -> tuple[int, tables.Group]:
    """Where that group's is, and it.  For filesystems whose descriptors are all together."""
    sb = superblock(image)
    block = 1024 << sb.log_block_size
    at = (sb.first_data_block + 1) * block + number * sb.desc_size
    return at, tables.parse_group(bytes(image[at : at + sb.desc_size]))


@pytest.mark.parametrize("kind", ["ext2", "ext3"])
@pytest.mark.parametrize("field", range(3))
@pytest.mark.parametrize("block", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_places_outside(kind: str, field: int, block: int, good: dict[str, bytes]) -> None:
    image = bytearray(good[kind])
    at, _ = descriptor(image, 1 if kind == "ext2" else 0)
    image[at + 4 * field : at + 4 * field + 4] = le32(block)
    if block or kind == "ext2":  # block 0 is not in blocks of 1 KiB's groups
        assert "is outside of the filesystem" in seen(image).left_whole
    else:
        assert "block 0 is of two" in seen(image).left_whole


def test_places_that_overlap(good: dict[str, bytes]) -> None:
    image = bytearray(good["ext2"])
    at, _ = descriptor(image, 1)
    _, other = descriptor(image, 0)
    image[at + 4 : at + 8] = le32(other.inode_table + 1)
    assert f"block {other.inode_table + 1} is of two" in seen(image).left_whole


def test_bitmap_that_frees_the_filesystem_itself(good: dict[str, bytes]) -> None:
    image = bytearray(good["ext2"])
    _, group = descriptor(image, 0)
    image[group.block_bitmap * 1024] &= 0xFE
    assert "has free what is of the filesystem" in seen(image).left_whole


def test_bitmap_checksum(good: dict[str, bytes]) -> None:
    image = bytearray(good["crc32c"])
    _, group = descriptor(image, 0)
    image[group.block_bitmap * 4096 + 100] ^= 0x10
    assert "checksum of the block bitmap of group 0" in seen(image).left_whole


def test_count_of_free_blocks(good: dict[str, bytes]) -> None:
    image = bytearray(good["ext3"])
    at, group = descriptor(image, 0)
    image[at + 12 : at + 14] = le16(group.free_clusters + 1)
    assert "bg_free_blocks_count of group 0" in seen(image).left_whole


def test_ends_early(good: dict[str, bytes]) -> None:
    """The disk has less than its partition."""
    image = good["crc32c"]
    for end in (0, 512, 1500, 2048, 4096, 5000, 9000):
        found = Files(image[:end]).run(look(0, len(image)))
        assert "end" in found.left_whole
        assert not found.free


def test_partition_that_is_too_small(good: dict[str, bytes]) -> None:
    image = good["crc32c"]
    for size in (0, 1, 2047, 2048, 4096, len(image) - 1):
        found = Files(image).run(look(0, size))
        assert found.left_whole
        assert not found.free


def test_in_a_partition(good: dict[str, bytes]) -> None:
    image = good["crc16"]
    found = Files(bytes(12345) + image).run(look(12345, len(image)))
    assert found == seen(image)


@pytest.mark.parametrize("kind", ["ext2", "ext3", "crc32c", "mmp"])
def test_crashed_while_mounted(kind: str, good: dict[str, bytes], tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(good[kind])
    with mounted(image) as point:
        (point / "file").write_bytes(bytes(range(256)) * 4096)
        run("sync", "-f", point)
        shutil.copy(image, tmp_path / "crashed")
    assert not seen(image).left_whole
    crashed = seen(tmp_path / "crashed")
    reason = "s_state is 0x0" if kind == "ext2" else "needs recovery"
    assert reason in crashed.left_whole
    if kind != "mmp":  # of which e2fsck would wait for the end of
        run("e2fsck", "-fy", tmp_path / "crashed", codes=(0, 1))
        assert not seen(tmp_path / "crashed").left_whole


def test_external_journal(tmp_path: Path) -> None:
    journal = made(tmp_path / "journal", 16 * MiB, "-O", "journal_dev", "-b", "1024", "-F", "-q")
    found = seen(journal)
    assert (found.kind, found.left_whole) == ("jbd", "the journal of another filesystem")


@pytest.mark.parametrize("kind", KINDS)
def test_mutations(kind: str, good: dict[str, bytes]) -> None:
    """Never an exception, never long, and nothing of the filesystem's own is called free."""
    rng = random.Random(kind)
    whole = good[kind]
    block = 1024 << superblock(whole).log_block_size
    for _ in range(3000 if LONG else 45):
        image = bytearray(whole[: 64 * block])
        for _ in range(rng.choice([1, 1, 2, 10])):
            fixed = rng.random() < 0.6
            at = rng.randrange(SB, 2 * SB) if fixed else rng.randrange(SB, len(image) - 8)
            width = rng.choice([1, 2, 4, 8])
            value = rng.choice([0, 0xFFFFFFFFFFFFFFFF, 1, 0x80, rng.getrandbits(64)])
            image[at : at + width] = value.to_bytes(8, "little")[:width]
        if rng.random() < 0.8:
            sealed(image)
        image += whole[len(image) :]
        began = time.perf_counter()
        found = Files(image).run(look(0, rng.choice([len(image), 1 << 45])))
        assert time.perf_counter() - began < 1
        in_order(found)
        assert not found.free or found.free[0] >= 2 * SB


@pytest.mark.parametrize("options", ["", "-J size=4 -O ^metadata_csum,^uninit_bg -N 131072"])
def test_a_tebibyte(tmp_path: Path, options: str) -> None:
    """Ready in time, in few round trips: it is 8192 bitmaps, in the second one all on the disk."""
    image = made(tmp_path / "disk", 1 << 40, "-t", "ext4", "-F", "-q", *options.split())
    run("debugfs", "-w", "-f", "-", image, text=f"write {__file__} a\n")
    files = Files(image)
    began = time.perf_counter()
    found = files.run(look(0, 1 << 40))
    assert time.perf_counter() - began < 3
    assert not found.left_whole
    assert files.reads <= 8
    assert runs(found.free) == free_of_dumpe2fs(image)
