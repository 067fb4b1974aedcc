"""Disks shown as vmdk, in both kinds: qemu finds them in order, and the same as the disk."""

from __future__ import annotations

import json
import os
import random
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs.errors import UnsupportedFeature
from imgfs.extents import ExtentList, from_data_ranges
from imgfs.formats import vmdk_layout, vmdk_stream_layout
from imgfs.formats.layout import About, Layout
from imgfs.formats.vmdk import open_disk
from imgfs.pieces import Kind
from tests.drive import Files, pread
from tests.formats import qemu
from tests.formats.shown import (
    ABOUT,
    check_random_access,
    make_disk,
    materialise,
    random_ranges,
)

MiB = 1 << 20
GRAIN = 65536
Make = Callable[[ExtentList, About], Layout]
KINDS: dict[str, Make] = {
    "monolithicSparse": vmdk_layout.layout,
    "streamOptimized": vmdk_stream_layout.layout,
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def check(kind: str, size: int, ranges: list[tuple[int, int]], folder: Path) -> Path:
    """The materialised file, which is right."""
    disk, out = folder / "disk.raw", folder / "disk.vmdk"
    layout = KINDS[kind](make_disk(disk, size, ranges), ABOUT)
    materialise(layout, disk, out)
    assert "No errors" in qemu.img("check", "-f", "vmdk", out)
    info = json.loads(qemu.img("info", "--output=json", "-f", "vmdk", out))
    rounded = -(-size // 512) * 512
    assert info["virtual-size"] == rounded
    assert info["format-specific"]["data"]["create-type"] == kind
    assert info["cluster-size"] == GRAIN
    assert "identical" in qemu.img("compare", "-f", "raw", "-F", "vmdk", disk, out)
    grains = {g for a, b in ranges for g in range(a // GRAIN, -(-b // GRAIN))}
    stored = sum(b - a for a, b in qemu.data_ranges(out, "vmdk"))
    assert stored == sum(min(GRAIN, rounded - g * GRAIN) for g in grains)
    files = Files(out)
    found = files.run(open_disk("disk.vmdk", layout.size))
    assert found.size == rounded
    whole = pread(disk, 0, size).ljust(rounded, b"\0")
    assert files.read(found, 0, rounded) == whole
    check_random_access(layout, disk, out, random.Random(size))
    return out


@pytest.mark.parametrize("size", [1, 511, 512, 513, GRAIN, GRAIN + 1, 33 * MiB + 777])
def test_sizes(kind: str, size: int, tmp_path: Path) -> None:
    check(kind, size, [(0, size)], tmp_path)
    check(kind, size, [], tmp_path)
    check(kind, size, [(size - 1, size)], tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_scattered_data(kind: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    size = rng.randint(1, 140 * MiB)
    starts = sorted(rng.sample(range(size // 5000 + 1), min(20, size // 5000 + 1)))
    ranges = [(s * 5000, min(size, s * 5000 + rng.randint(1, 5000))) for s in starts]
    check(kind, size, [(a, b) for a, b in ranges if a < b], tmp_path)


def test_a_random_small_disk(kind: str, tmp_path: Path) -> None:
    rng = random.Random(7)
    for _ in range(4):
        size = rng.randint(1, 5 * GRAIN)
        check(kind, size, random_ranges(rng, size, rng.randint(0, 5)), tmp_path)


def test_terabytes(kind: str, tmp_path: Path) -> None:
    """Of which little is there, and little is read to know it."""
    size = 3 << 40
    rng = random.Random(3)
    starts = sorted(rng.sample(range(0, size, 1 << 30), 40))
    ranges = [(start + 12345, start + 12345 + 100) for start in starts]
    extents = from_data_ranges(iter(ranges), size)
    layout = KINDS[kind](extents, ABOUT)
    disk, out = tmp_path / "disk.raw", tmp_path / "disk.vmdk"
    disk.touch()
    os.truncate(disk, size)
    for start, end in ranges:
        with disk.open("r+b") as file:
            file.seek(start)
            file.write(rng.randbytes(end - start))
    materialise(layout, disk, out)
    files = Files(out)
    found = files.run(open_disk("disk.vmdk", layout.size))
    assert found.size == size
    for start, end in ranges:
        assert files.read(found, start - 10, end - start + 20) == pread(
            disk, start - 10, end - start + 20
        )
        assert qemu_reads(out, start, end) == pread(disk, start, end - start)


def qemu_reads(out: Path, start: int, end: int) -> bytes:
    """By `qemu-img dd`, of the sectors around."""
    part = out.with_suffix(".part")
    first, last = start // 512, -(-end // 512)
    qemu.img(
        *("dd", "-f", "vmdk", "-O", "raw", "bs=512", f"skip={first}", f"count={last}"),
        *(f"if={out}", f"of={part}"),
    )
    return pread(part, start - first * 512, end - start)


def test_where_nothing_is_there_are_no_bytes() -> None:
    """The tables of 16 TiB are zeroes, not literals, where they are empty."""
    layout = vmdk_layout.layout(from_data_ranges(iter([(5 << 40, (5 << 40) + 1)]), 16 << 40), ABOUT)
    literal = 0
    for offset in range(0, layout.size, 64 * MiB):
        for piece in layout.map(offset, min(64 * MiB, layout.size - offset)):
            assert piece.kind != Kind.LITERAL or piece.end - piece.start <= MiB
            literal += piece.end - piece.start if piece.kind == Kind.LITERAL else 0
    assert literal < 5 * MiB


def test_the_same_disk_gives_the_same_bytes(kind: str) -> None:
    extents = from_data_ranges(iter([(5, 6)]), MiB)
    one, again, other = (
        KINDS[kind](extents, About(f"{name}.vmdk", identity, 0)).map(0, 512 * 21)
        for name, identity in [("a", "stat:1"), ("a", "stat:1"), ("a", "stat:2")]
    )
    assert list(one) == list(again) != list(other)


def test_a_name_that_cannot_stand_in_a_descriptor(tmp_path: Path) -> None:
    disk, out = tmp_path / "disk.raw", tmp_path / "disk.vmdk"
    extents = make_disk(disk, MiB, [(0, 9)])
    for name in ('a"b.vmdk', "a\nRW 1 ZERO.vmdk", "\udcff.vmdk", "x" * 300, "ü.vmdk"):
        materialise(vmdk_layout.layout(extents, About(name, "stat:1", 0)), disk, out)
        assert "identical" in qemu.img("compare", "-f", "raw", "-F", "vmdk", disk, out)
        assert Files(out).run(open_disk("d", out.stat().st_size)).size == MiB


def test_readers_look_at_the_checksum(tmp_path: Path) -> None:
    """So it cannot be left out."""
    out = check("streamOptimized", GRAIN, [(0, GRAIN)], tmp_path)
    with out.open("r+b") as file:
        file.seek(128 * 512 + 12 + 2 + 5 + 5 + GRAIN)
        checksum = file.read(4)
        assert checksum == zlib.adler32((tmp_path / "disk.raw").read_bytes()).to_bytes(4, "big")
        file.seek(-4, os.SEEK_CUR)
        file.write(bytes(4))
    with pytest.raises(subprocess.CalledProcessError):
        qemu.raw(out, "vmdk")


def test_disks_that_no_vmdk_holds(kind: str) -> None:
    with pytest.raises(UnsupportedFeature, match="cannot hold a disk of 0 bytes"):
        KINDS[kind](from_data_ranges(iter([]), 0), ABOUT)
    with pytest.raises(UnsupportedFeature, match="2 TiB"):
        KINDS[kind](from_data_ranges(iter([(0, 2 << 40)]), 2 << 40), ABOUT)
    with pytest.raises(UnsupportedFeature, match="2 TiB"):
        KINDS[kind](from_data_ranges(iter([(0, 1)]), 2 << 50), ABOUT)
    KINDS[kind](from_data_ranges(iter([(0, 1 << 40)]), 2 << 40), ABOUT)
