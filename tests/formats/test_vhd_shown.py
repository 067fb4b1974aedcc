"""Disks shown as VHD: qemu-img and our own reader find the same disk in the file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from imgfs.errors import UnsupportedFeature
from imgfs.extents import Flags, all_data
from imgfs.formats.layout import About, Layout
from imgfs.formats.vhd import open_disk
from imgfs.formats.vhd_layout import layout
from imgfs.formats.vhd_tables import footer
from tests.drive import Files, pread
from tests.formats import generated, qemu

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

DISKS: list[tuple[int, generated.Ranges]] = [
    (0, []),
    (1, [(0, 1)]),
    (1, []),
    (513, [(512, 513)]),
    (5 * MIB, [(0, 5 * MIB)]),
    (5 * MIB + 700, [(4 * MIB + 5, 5 * MIB + 700)]),
    (5 * MIB + 700, []),
    (9 * MIB, [(2 * MIB - 1, 2 * MIB + 1), (6 * MIB, 8 * MIB)]),
    (2040 * GIB, [(7, 8), (TIB + 1, TIB + 100_000), (2040 * GIB - 512, 2040 * GIB)]),
    (127 * GIB, [(127 * GIB - 33 * 512, 127 * GIB)]),
]


@pytest.mark.parametrize("number", range(len(DISKS)))
def test_a_disk(tmp_path: Path, number: int) -> None:
    size, ranges = DISKS[number]
    raw = tmp_path / "disk.raw"
    extents = generated.make_raw(raw, ranges, size, number)
    found = generated.check(layout, open_disk, "vpc", raw, extents, number)
    info = json.loads(qemu.img("info", "--output=json", found))
    assert info["format"] == "vpc"
    assert info["virtual-size"] == -(-size // 512) * 512


@pytest.mark.parametrize("seed", range(6))
def test_any_disk(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(1, 200 * MIB)
    ranges = generated.some_ranges(rng, size, rng.randint(1, 30), 3 * MIB)
    raw = tmp_path / "disk.raw"
    extents = generated.make_raw(raw, ranges, size, seed)
    generated.check(layout, open_disk, "vpc", raw, extents, seed)


def test_the_backup_table_of_partitions_is_not_lost(tmp_path: Path) -> None:
    """Its last sector is past the geometry, which some take for the size."""
    size = 100 * MIB + 5 * 512
    raw = tmp_path / "disk.raw"
    extents = generated.make_raw(raw, [(size - 33 * 512, size)], size)
    found = generated.check(layout, open_disk, "vpc", raw, extents)
    said = footer(pread(found, 0, 512))
    assert said is not None
    assert said.cylinders * said.heads * said.sectors_per_track * 512 < size
    assert qemu.raw(found, "vpc") == raw.read_bytes()


def head(made: Layout) -> bytes:
    return Files(b"").content(made.map(0, 512), 0, 512)


@pytest.mark.parametrize("sectors", [1, 67, 69_631, 69_632, 1_048_575, 66_059_280, 66_059_279])
def test_geometry_is_qemus(tmp_path: Path, sectors: int) -> None:
    theirs = tmp_path / "theirs.vpc"
    qemu.img("create", "-q", "-f", "vpc", theirs, str(sectors * 512))
    wanted = footer(pread(theirs, 0, 512))
    assert wanted is not None
    made = layout(generated.extents_of([], wanted.current_size), About("x", "y", 0))
    said = footer(head(made))
    assert said is not None
    assert said.current_size == wanted.current_size
    ours = (said.cylinders, said.heads, said.sectors_per_track)
    assert ours == (wanted.cylinders, wanted.heads, wanted.sectors_per_track)


def test_too_large() -> None:
    with pytest.raises(UnsupportedFeature, match="at most 2040 GiB"):
        layout(all_data(0, 2040 * GIB + 1), About("a.vhd", "x", 0))


def test_the_same_disk_makes_the_same_file_and_another_not() -> None:
    extents = generated.extents_of([(5, 99)], 3 * MIB)
    one, same, other = (layout(extents, About("a", who, 1_700_000_000)) for who in "xxy")
    assert head(one) == head(same) != head(other)
    said = footer(head(one))
    assert said is not None
    assert said.time_stamp == 1_700_000_000 - 946_684_800
    early = footer(head(layout(extents, About("a", "x", 5))))
    assert early is not None
    assert early.time_stamp == 0


def test_a_disk_whose_holes_are_not_zero_is_all_there() -> None:
    extents = all_data(0, 10 * MIB)
    assert not any(e.flags & Flags.ZERO for e in extents)
    assert layout(extents, About("a", "x", 0)).size == 4096 + 5 * (2 * MIB + 4096) + 512
