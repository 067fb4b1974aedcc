"""VDIs that qemu writes, and such as it cannot write."""

from __future__ import annotations

import os
import random
import struct
import time
from pathlib import Path

import pytest

from imgfs.errors import CorruptImage, ImgfsError, UnsupportedFeature
from imgfs.formats.disk import Disk
from imgfs.formats.vdi import open_disk
from imgfs.pieces import Kind
from tests.drive import Bytes, Files, size_of
from tests.formats import qemu
from tests.formats.test_vmdk import data_ranges

MiB = 1 << 20
LONG = bool(os.environ.get("IMGFS_TEST_LONG"))


def opened(image: Bytes) -> tuple[Files, Disk]:
    files = Files(image)
    return files, files.run(open_disk("disk.vdi", size_of(image)))


@pytest.mark.parametrize("seed", range(100 if LONG else 6))
def test_written_by_qemu_io(seed: int, tmp_path: Path) -> None:
    """In an order that is not sequential."""
    rng = random.Random(seed)
    path, size = tmp_path / "disk.vdi", rng.randint(1, 40 << 11) * 512
    static = "on" if seed % 3 == 2 else "off"
    qemu.img("create", "-f", "vdi", "-o", f"static={static}", path, str(size))
    qemu.io(path, "vdi", *qemu.scribble(rng, size, 15))
    files, disk = opened(path)
    whole = qemu.raw(path, "vdi")
    assert disk.size == size == len(whole)
    assert files.read(disk, 0, size) == whole
    assert data_ranges(files, disk) == qemu.data_ranges(path, "vdi")
    assert ("type", "fixed" if static == "on" else "dynamic") in disk.facts()


def image(
    blocks: list[int], stored: int = 4, block: int = 4096, extra: int = 0, size: int | None = None
) -> bytearray:
    """A VDI with that map; block number n is filled with n + 1, what is extra with 0xee."""
    disk_size = len(blocks) * block if size is None else size
    head = struct.pack(
        "<64sII III256sII 4I I Q IIII 16s16s16s16s",
        *(b"by hand", 0xBEDA107F, 0x10001, 400, 1, 0, b"", 512, 1024),
        *(0, 0, 0, 512, 0, disk_size, block, extra, len(blocks), stored),
        *(b"c" * 16, b"m" * 16, b"", b""),
    )
    table = struct.pack(f"<{len(blocks)}I", *blocks)
    data = b"".join(b"\xee" * extra + bytes([n + 1]) * block for n in range(stored))
    return bytearray(head.ljust(512, b"\0") + table.ljust(512, b"\0") + data)


FREE, ZERO = 0xFFFFFFFF, 0xFFFFFFFE


def test_any_order_and_both_kinds_of_nothing(tmp_path: Path) -> None:
    blocks = [3, 2, FREE, 0, 1, ZERO, FREE, FREE, ZERO]
    content = image(blocks, block=MiB)
    files, disk = opened(content)
    expected = b"".join(bytes([0 if b >= ZERO else b + 1]) * MiB for b in blocks)
    assert files.read(disk, 0, disk.size) == expected
    path = tmp_path / "disk.vdi"
    path.write_bytes(content)
    assert qemu.raw(path, "vdi") == expected
    assert {p.kind for p in files.run(disk.map(0, 1))} == {Kind.DATA, Kind.ZERO}


@pytest.mark.parametrize("extra", [0, 512, 3])
def test_what_stands_before_each_block(extra: int) -> None:
    files, disk = opened(image([0, 1, FREE, 3, 2], extra=extra))
    expected = b"".join(bytes([n]) * 4096 for n in (1, 2, 0, 4, 3))
    assert files.read(disk, 0, disk.size) == expected


def test_a_size_that_is_no_multiple(tmp_path: Path) -> None:
    content = image([1, 0], block=MiB, size=MiB + 700)
    files, disk = opened(content)
    assert disk.size == MiB + 1024
    assert files.read(disk, 0, disk.size) == b"\2" * MiB + b"\1" * 1024
    path = tmp_path / "disk.vdi"
    path.write_bytes(content)
    assert qemu.raw(path, "vdi") == files.read(disk, 0, disk.size)


def test_a_large_map_is_read_in_parts() -> None:
    blocks = list(range(4)) + [FREE] * 500_000
    content = image(blocks)
    table = struct.pack(f"<{len(blocks)}I", *blocks)
    table += bytes(-len(table) % 512)
    struct.pack_into("<I", content, 344, 512 + len(table))
    content[512:] = table + bytes(16384)
    files, disk = opened(content)
    assert files.reads == 1
    pieces = files.run(disk.map(0, disk.size))
    assert pieces.end == 4096 << 18
    assert files.bytes_read < 2 * MiB
    assert files.run(disk.map(disk.size - 1, 1)).end == disk.size
    assert files.run(disk.map(5000, 1)).end == 4096 << 10
    assert files.bytes_read < 2 * MiB


@pytest.mark.parametrize("cut", [1, 4096, 16384])
def test_a_file_that_is_cut_off_is_damaged_only_there(cut: int) -> None:
    content = image([0, 3, FREE, 1])
    files, disk = opened(content[:-cut])
    lost = [1] if cut < 16384 else [0, 1, 3]
    for number, expected in enumerate([1, 4, 0, 2]):
        if number in lost:
            with pytest.raises(
                CorruptImage, match=r"disk\.vdi: block \d is number \d .*past the end"
            ):
                files.read(disk, number * 4096, 1)
        else:
            assert files.read(disk, number * 4096, 4096) == bytes([expected]) * 4096


def test_a_map_that_is_cut_off() -> None:
    files, disk = opened(image([0, 1, ZERO, 1])[: 512 + 13])
    assert files.read(disk, 8192, 4096) == bytes(4096)
    with pytest.raises(CorruptImage, match="ends in its map of blocks"):
        files.read(disk, 3 * 4096, 1)


def test_numbers_that_end_at_those_of_nothing() -> None:
    """0xfffffffd and 0xfffffffe follow each other as blocks do."""
    files, disk = opened(image([0, 0xFFFFFFFC, 0xFFFFFFFD, ZERO, FREE, 1]))
    assert files.read(disk, 3 * 4096, 3 * 4096) == bytes(8192) + b"\2" * 4096
    for number in (1, 2):
        with pytest.raises(CorruptImage, match="past the end"):
            files.read(disk, number * 4096, 1)


FIELDS = {
    "u32Signature": (64, [0, 1]),
    "u32Version": (68, [0, 0x10002, 0x20000, FREE]),
    "u32Type": (76, [0, 3, 4, 5, FREE]),
    "offBlocks": (340, [0, 16, 1 << 31, FREE]),
    "cbSector": (360, [0, 4096, FREE]),
    "cbDisk": (372, [1, FREE]),
    "cbBlock": (376, [0, 1, 256, 4097, 1 << 31, FREE]),
    "cbBlockExtra": (380, [FREE]),
    "cBlocks": (384, [0, 3, 1 << 30, FREE]),
    "uuidLinkage": (424, [1]),
    "uuidParentModify": (440, [1]),
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_that_cannot_be(field: str) -> None:
    offset, values = FIELDS[field]
    for value in values:
        content = image([0, 1, 2, 3])
        struct.pack_into("<I", content, offset, value)
        with pytest.raises(
            (CorruptImage, UnsupportedFeature), match=f"^disk.vdi: .*{field[:5]}|dif"
        ):
            opened(content)


def test_a_differencing_image_says_what_to_do() -> None:
    content = image([0])
    struct.pack_into("<I", content, 76, 4)
    content[424:440] = bytes(range(16))
    with pytest.raises(UnsupportedFeature, match=r"03020100-0504-.*clonemedium"):
        opened(content)


def test_a_header_that_is_cut_off() -> None:
    for length in (0, 1, 64, 455):
        with pytest.raises(CorruptImage, match="ends in its header"):
            opened(image([0])[:length])


def test_mutations_are_errors_of_ours_or_disks() -> None:
    rng = random.Random(1)
    whole = image([3, FREE, 0, 1, ZERO, 2])
    for _ in range(100_000 if LONG else 300):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.choice([rng.randrange(64, 550), rng.randrange(340, 390)])
            content[at] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        began = time.process_time()
        try:
            files, disk = opened(content)
            for _ in range(3):
                if disk.size:
                    files.run(disk.map(rng.randrange(disk.size), 1 << 20))
        except ImgfsError as exc:
            assert str(exc).startswith("disk.vdi: ")
        assert time.process_time() - began < 1
