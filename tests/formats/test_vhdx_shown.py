"""Disks shown as VHDXX: qemu-img and our own reader find the same disk in the file."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from imgfs.errors import UnsupportedFeature
from imgfs.extents import all_data
from imgfs.formats.layout import About, Layout
from imgfs.formats.vhdx import open_disk
from imgfs.formats.vhdx_layout import layout
from imgfs.formats.vhdx_tables import HEADER_OFFSETS, header
from tests.drive import Files
from tests.formats import generated, qemu

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

DISKS: list[tuple[int, generated.Ranges]] = [
    (1, [(0, 1)]),
    (1, []),
    (513, [(512, 513)]),
    (5 * MIB, [(0, 5 * MIB)]),
    (5 * MIB + 700, [(4 * MIB + 5, 5 * MIB + 700)]),
    (5 * MIB + 700, []),
    (9 * MIB, [(2 * MIB - 1, 2 * MIB + 1), (6 * MIB, 8 * MIB)]),
    (GIB, [(GIB - 33 * 512, GIB)]),
]


@pytest.mark.parametrize("number", range(len(DISKS)))
def test_a_disk(tmp_path: Path, number: int) -> None:
    size, ranges = DISKS[number]
    raw = tmp_path / "disk.raw"
    extents = generated.make_raw(raw, ranges, size, number)
    found = generated.check(layout, open_disk, "vhdx", raw, extents, number)
    info = json.loads(qemu.img("info", "--output=json", found))
    assert info["format"] == "vhdx"
    assert info["virtual-size"] == -(-size // 512) * 512


@pytest.mark.parametrize("seed", range(6))
def test_any_disk(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(1, 200 * MIB)
    ranges = generated.some_ranges(rng, size, rng.randint(1, 30), 3 * MIB)
    raw = tmp_path / "disk.raw"
    extents = generated.make_raw(raw, ranges, size, seed)
    generated.check(layout, open_disk, "vhdx", raw, extents, seed)


def test_too_large() -> None:
    with pytest.raises(UnsupportedFeature, match="at most 64 TiB"):
        layout(all_data(0, 64 * TIB + 1), About("a.vhd", "x", 0))


def test_an_empty_disk() -> None:
    with pytest.raises(UnsupportedFeature, match="no disk of 0 bytes"):
        layout(all_data(0, 0), About("a.vhdx", "x", 0))


def header_of(made: Layout, number: int) -> bytes:
    return Files(b"").content(made.map(HEADER_OFFSETS[number], 4096), HEADER_OFFSETS[number], 4096)


def test_the_same_disk_makes_the_same_file_and_another_not() -> None:
    extents = generated.extents_of([(5, 99)], 3 * MIB)
    one, same, other = (layout(extents, About("a", who, 1_700_000_000)) for who in "xxy")
    assert header_of(one, 0) == header_of(same, 0) != header_of(other, 0)
    first, second = header(header_of(one, 0)), header(header_of(one, 1))
    assert first.sequence_number < second.sequence_number
    assert first.data_write_guid == second.data_write_guid != first.file_write_guid


def test_a_disk_whose_holes_are_not_zero_is_all_there() -> None:
    assert layout(all_data(0, 10 * MIB), About("a", "x", 0)).size == 14 * MIB


@pytest.mark.parametrize(
    ("size", "block_size"),
    [(1, 1), (128 * GIB, 1), (128 * GIB + 1, 2), (4 * TIB, 32), (64 * TIB, 32)],
)
def test_blocks_grow_with_the_disk(size: int, block_size: int) -> None:
    made = layout(generated.extents_of([(0, 1)], size), About("a", "x", 0))
    bat = max(1, -(-size // (block_size * MIB) * 8 // MIB))
    assert made.size - (3 + block_size) * MIB in (bat * MIB, (bat + 1) * MIB)


@pytest.mark.parametrize("size", [127 * GIB, 7 * TIB + 512, 64 * TIB])
def test_a_large_disk(tmp_path: Path, size: int) -> None:
    """Too large to be compared: qemu reads all of it, holes or not."""
    ranges = [(7, 8), (size // 2 + 512, size // 2 + 100_000), (size - 512, size)]
    extents = generated.extents_of(ranges, size)
    made, path = layout(extents, About("a", "x", 0)), tmp_path / "disk.vhdx"
    generated.write_out(made, lambda offset, length: b"Z" * length, size, path)
    info = json.loads(qemu.img("info", "--output=json", path))
    assert (info["format"], info["virtual-size"]) == ("vhdx", size)
    qemu.img("check", "-q", "-f", "vhdx", path)
    commands = [f"read -P 0x5a {a} {b - a}" for a, b in ranges]
    commands += [f"read -P 0 {at} 40000" for at in (8, size // 3, size // 2 - 40000, size - 40512)]
    qemu.io(path, "vhdx", *commands)
    with pytest.raises(subprocess.CalledProcessError):
        qemu.io(path, "vhdx", "read -P 0x5b 7 1")
    files = Files(path)
    disk = files.run(open_disk("disk.vhdx", made.size))
    assert files.reads == 2
    for start, end in ranges:
        assert files.read(disk, start, end - start) == b"Z" * (end - start)


def test_checked_by_qemu(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    extents = generated.make_raw(raw, [(3 * MIB, 9 * MIB)], 11 * MIB + 99)
    found = generated.check(layout, open_disk, "vhdx", raw, extents)
    qemu.img("check", "-q", "-f", "vhdx", found)
