"""Disks shown as vdi: qemu finds them in order, and the same as the disk."""

from __future__ import annotations

import json
import random
import uuid
from pathlib import Path

import pytest

from imgfs.errors import UnsupportedFeature
from imgfs.extents import from_data_ranges
from imgfs.formats.vdi import open_disk
from imgfs.formats.vdi_layout import layout
from tests.drive import Files, pread
from tests.formats import qemu
from tests.formats.shown import ABOUT, check_random_access, make_disk, materialise, random_ranges

MiB = 1 << 20


def check(size: int, ranges: list[tuple[int, int]], folder: Path) -> None:
    disk, out = folder / "disk.raw", folder / "disk.vdi"
    made = layout(make_disk(disk, size, ranges), ABOUT)
    materialise(made, disk, out)
    assert "No errors" in qemu.img("check", "-f", "vdi", out)
    info = json.loads(qemu.img("info", "--output=json", "-f", "vdi", out))
    rounded = -(-size // 512) * 512
    assert info["virtual-size"] == rounded
    assert "identical" in qemu.img("compare", "-f", "raw", "-F", "vdi", disk, out)
    blocks = {n for a, b in ranges for n in range(a // MiB, -(-b // MiB))}
    assert made.size == MiB + len(blocks) * MiB
    stored = sum(b - a for a, b in qemu.data_ranges(out, "vdi"))
    assert stored == sum(min(MiB, rounded - n * MiB) for n in blocks)
    files = Files(out)
    found = files.run(open_disk("disk.vdi", made.size))
    assert found.size == rounded
    assert files.read(found, 0, rounded) == pread(disk, 0, size).ljust(rounded, b"\0")
    check_random_access(made, disk, out, random.Random(size))


@pytest.mark.parametrize("size", [0, 1, 513, MiB, MiB + 1, 9 * MiB + 777])
def test_sizes(size: int, tmp_path: Path) -> None:
    check(size, [], tmp_path)
    if size:
        check(size, [(0, size)], tmp_path)
        check(size, [(size - 1, size)], tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_scattered_data(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    size = rng.randint(1, 60 * MiB)
    starts = sorted(rng.sample(range(size // 5000 + 1), min(9, size // 5000 + 1)))
    ranges = [(s * 5000, min(size, s * 5000 + rng.randint(1, 5000))) for s in starts]
    check(size, [(a, b) for a, b in ranges if a < b], tmp_path)
    size = rng.randint(1, 3000)
    check(size, random_ranges(rng, size, 3), tmp_path)


def test_terabytes(tmp_path: Path) -> None:
    size = 4 << 40
    ranges = [(start, start + 100) for start in range(99, size, 100 << 30)]
    disk, out = tmp_path / "disk.raw", tmp_path / "disk.vdi"
    made = layout(make_disk(disk, size, ranges), ABOUT)
    materialise(made, disk, out)
    assert "No errors" in qemu.img("check", "-f", "vdi", out)
    files = Files(out)
    found = files.run(open_disk("disk.vdi", made.size))
    for start, end in ranges:
        assert files.read(found, start - 9, end - start + 9) == pread(
            disk, start - 9, end - start + 9
        )


def test_uuids_are_ones_and_differ(tmp_path: Path) -> None:
    made = layout(from_data_ranges(iter([]), MiB), ABOUT)
    head = Files(b"").content(made.map(0, 512), 0, 512)
    ids = [uuid.UUID(bytes_le=head[at : at + 16]) for at in (392, 408)]
    assert ids[0] != ids[1]
    assert all(x.variant == uuid.RFC_4122 and x.version == 4 for x in ids)
    again = layout(from_data_ranges(iter([]), MiB), ABOUT)
    assert Files(b"").content(again.map(0, 512), 0, 512) == head


def test_a_disk_that_no_vdi_holds() -> None:
    layout(from_data_ranges(iter([(0, 1)]), (1 << 50) - (1 << 39)), ABOUT)
    with pytest.raises(UnsupportedFeature, match="1 PiB"):
        layout(from_data_ranges(iter([(0, 1)]), 1 << 50), ABOUT)
