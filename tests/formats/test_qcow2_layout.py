"""Disks shown as qcow2: what qemu and our own reader make of the file."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from imgfs.errors import UnsupportedFeature
from imgfs.extents import ExtentList, from_data_ranges
from imgfs.formats.layout import About, Layout
from imgfs.formats.qcow2 import open_disk
from imgfs.formats.qcow2_layout import layout
from imgfs.pieces import Kind
from tests.drive import Files, pread
from tests.formats import qemu

ABOUT = About("disk.qcow2", "stat:1", 0)
CLUSTER = 65536
STEP = 64 << 20  # of the file that is put together at once


def materialise(shown: Layout, disk: Path, out: Path) -> None:
    """The whole file; its holes stay holes."""
    with out.open("wb") as file:
        file.truncate(shown.size)
        for at in range(0, shown.size, STEP):
            for piece in shown.map(at, min(STEP, shown.size - at)):
                if piece.kind == Kind.LITERAL:
                    assert isinstance(piece.detail, bytes)
                    assert len(piece.detail) <= 1 << 20
                    os.pwrite(file.fileno(), piece.detail, piece.start)
                elif piece.kind == Kind.DATA:
                    part = pread(disk, piece.offset, piece.end - piece.start)
                    assert len(part) == piece.end - piece.start, f"{piece} is past the disk's end"
                    os.pwrite(file.fileno(), part, piece.start)
                else:
                    assert piece.kind == Kind.ZERO


def random_disk(path: Path, size: int, runs: int, seed: int) -> ExtentList:
    rng = random.Random(seed)
    points = sorted({rng.randrange(size + 1) for _ in range(2 * runs)}) if size else []
    ranges = []
    with path.open("wb") as file:
        file.truncate(size)
        for start, end in zip(points[::2], points[1::2], strict=False):
            end = min(end, start + rng.choice([1, 700, 5000, 300000]))
            os.pwrite(file.fileno(), rng.randbytes(end - start), start)
            ranges.append((start, end))
    return from_data_ranges(iter(ranges), size)


def check(tmp_path: Path, extents: ExtentList, seed: int = 0) -> Layout:
    disk, out = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    shown = layout(extents, ABOUT)
    materialise(shown, disk, out)
    assert "No errors" in qemu.img("check", out)
    assert "identical" in qemu.img("compare", "-f", "raw", "-F", "qcow2", disk, out)
    files = Files(out)
    again = files.run(open_disk("disk.qcow2", shown.size))
    assert again.size == -(-extents.end // 512) * 512
    assert again.backing is None
    rng = random.Random(seed)
    for start, end in list(extents.data_ranges())[:50]:
        offset = rng.randrange(start, end)
        length = min(end - offset, 100000)
        assert files.read(again, offset, length) == pread(disk, offset, length)
    raw = Files(disk)
    for _ in range(40):
        offset = rng.choice(
            [rng.randrange(shown.size), rng.randrange(min(shown.size, 6 * CLUSTER))]
        )
        length = rng.randint(1, min(3 * CLUSTER, shown.size - offset))
        found = raw.content(shown.map(offset, length), offset, length)
        assert found == pread(out, offset, length), (offset, length)
    return shown


@pytest.mark.parametrize(
    "size", [0, 1, 511, 512, 513, CLUSTER - 1, CLUSTER, CLUSTER + 1, (3 << 20) + 5, (1 << 30) + 77]
)
def test_sizes(size: int, tmp_path: Path) -> None:
    check(tmp_path, random_disk(tmp_path / "disk.raw", size, 20, size), size)


@pytest.mark.parametrize("size", [1, 100_000, 1 << 20])
def test_all_hole_and_all_data(size: int, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(random.Random(1).randbytes(size))
    full = check(tmp_path, from_data_ranges(iter([(0, size)]), size))
    disk.write_bytes(bytes(size))
    empty = check(tmp_path, from_data_ranges(iter(()), size))
    # The clusters of data, and the one L2 table.
    assert full.size - empty.size == (-(-size // CLUSTER) + 1) * CLUSTER


def test_holes_of_the_disk_are_holes_of_the_file(tmp_path: Path) -> None:
    extents = from_data_ranges(iter([(4096, 8192)]), 1 << 20)
    shown = layout(extents, ABOUT)
    pieces = list(shown.map(0, shown.size))
    assert [(p.end - p.start, p.offset) for p in pieces if p.kind == Kind.DATA] == [(4096, 4096)]
    held = sum(p.end - p.start for p in pieces if p.kind == Kind.LITERAL)
    assert held < 5 * 4096


@pytest.mark.parametrize("size", [8 << 40, 64 << 40])
def test_terabytes(size: int, tmp_path: Path) -> None:
    rng = random.Random(size)
    starts = sorted(rng.sample(range(size >> 30), 30))
    disk = tmp_path / "disk.raw"
    ranges = [
        ((start << 30) + rng.randrange(1 << 20), (start << 30) + (2 << 20)) for start in starts
    ]
    extents = from_data_ranges(iter(ranges), size)
    shown = layout(extents, ABOUT)
    with disk.open("wb") as file:
        file.truncate(8 << 40)  # more is too much for some filesystems; what is read is there
        for start, end in ranges:
            if end <= 8 << 40:
                os.pwrite(file.fileno(), rng.randbytes(end - start), start)
    if size == 8 << 40:
        check(tmp_path, extents)
    else:
        held = tmp_path / "held.qcow2"
        with held.open("wb") as file:
            file.truncate(shown.size)
            for piece in shown.map(0, shown.size):
                if piece.kind == Kind.LITERAL:
                    assert isinstance(piece.detail, bytes)
                    os.pwrite(file.fileno(), piece.detail, piece.start)
        assert "No errors" in qemu.img("check", held)
        files = Files(held)
        again = files.run(open_disk("x", shown.size))
        first = files.run(again.map(ranges[0][0], 1))
        piece = next(first.between(ranges[0][0], ranges[0][0] + 1))
        (source,) = shown.map(piece.offset, 1)
        assert (source.kind, source.offset) == (Kind.DATA, ranges[0][0])


def test_a_full_disk_of_terabytes_is_planned_at_once() -> None:
    """64 TiB of data: the tables have gigabytes, and are made only for the range asked."""
    size = 64 << 40
    shown = layout(from_data_ranges(iter([(0, size)]), size), ABOUT)
    assert shown.size > size
    data = next(p for p in shown.map(shown.size - 5, 5))
    assert (data.kind, data.offset) == (Kind.DATA, size - 5)


def test_clusters_grow_for_huge_disks() -> None:
    size = 5 << 50
    shown = layout(from_data_ranges(iter([(size - 512, size)]), size), ABOUT)
    (header,) = (p.detail for p in shown.map(0, 104))
    assert isinstance(header, bytes)
    assert header[20:24] == (17).to_bytes(4, "big")
    (data,) = shown.map(shown.size - 512, 512)
    assert (data.kind, data.offset) == (Kind.DATA, size - 512)


def test_more_than_qcow2_holds() -> None:
    size = 1 << 62
    with pytest.raises(UnsupportedFeature, match=r"^disk\.qcow2: qcow2 cannot hold"):
        layout(from_data_ranges(iter([(0, size)]), size), ABOUT)
