"""VMDKs that qemu writes: the same bytes and the same data and holes as qemu reads there."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from imgfs.errors import CorruptImage
from imgfs.formats.disk import Disk
from imgfs.formats.vmdk import open_disk
from imgfs.pieces import Kind
from tests.drive import Files, size_of
from tests.formats import qemu

MiB = 1 << 20
SEEDS = range(100 if os.environ.get("IMGFS_TEST_LONG") else 3)
PLAIN = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"]


def opened(path: Path) -> tuple[Files, Disk]:
    files = Files(path, {other.name: other for other in path.parent.iterdir()})
    return files, files.run(open_disk(path.name, size_of(path)))


def data_ranges(files: Files, disk: Disk) -> list[tuple[int, int]]:
    """Joined, as the pieces say."""
    ranges: list[tuple[int, int]] = []
    at = 0
    while at < disk.size:
        pieces = files.run(disk.map(at, disk.size - at))
        assert pieces.start <= at < pieces.end <= disk.size
        for piece in pieces.between(at, pieces.end):
            if piece.kind in (Kind.BELOW, Kind.ZERO):
                continue
            if ranges and ranges[-1][1] == piece.start:
                ranges[-1] = (ranges[-1][0], piece.end)
            else:
                ranges.append((piece.start, piece.end))
        at = pieces.end
    return ranges


def check(path: Path, rng: random.Random, sparse: bool = True) -> Disk:
    files, disk = opened(path)
    whole = qemu.raw(path, "vmdk")
    assert disk.size == len(whole)
    assert files.read(disk, 0, disk.size) == whole
    for _ in range(10):
        offset = rng.randrange(disk.size)
        length = min(rng.choice([1, 512, 70_000]), disk.size - offset)
        assert files.read(disk, offset, length) == whole[offset : offset + length]
    if sparse:
        assert data_ranges(files, disk) == qemu.data_ranges(path, "vmdk")
    return disk


@pytest.mark.parametrize("subformat", PLAIN)
@pytest.mark.parametrize("seed", SEEDS)
def test_written_by_qemu_io(subformat: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path, size = tmp_path / "disk.vmdk", rng.randint(1, 140 << 11) * 512
    options = f"subformat={subformat}"
    if "Sparse" in subformat and seed % 2:
        options += ",zeroed_grain=on"
    qemu.img("create", "-f", "vmdk", "-o", options, path, str(size))
    commands = qemu.scribble(rng, size, 12)
    for _ in range(4):
        start = rng.randrange(0, size, 65536)
        commands.append(f"write -z {start} {min(rng.randint(1, 40) * 65536, size - start)}")
    qemu.io(path, "vmdk", *commands)
    disk = check(path, rng, "Sparse" in subformat)
    assert ("createType", subformat) in disk.facts()


@pytest.mark.parametrize("seed", SEEDS)
def test_stream_optimized(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path, raw, size = tmp_path / "disk.vmdk", tmp_path / "raw", rng.randint(1, 140 << 11) * 512
    qemu.img("create", "-f", "raw", raw, str(size))
    qemu.io(raw, "raw", *qemu.scribble(rng, size, 12))
    with raw.open("r+b") as file:  # what cannot be compressed
        file.seek(rng.randrange(size))
        file.write(rng.randbytes(min(300_000, size - file.tell())))
    qemu.img("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, path)
    check(path, rng)


@pytest.mark.parametrize("kind", ["Sparse", "Flat"])
def test_several_extents(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    qemu.img("create", "-f", "vmdk", "-o", f"subformat=twoGbMaxExtent{kind}", path, "5G")
    at = [(2 << 30) - 70_144, (4 << 30) - 512, (5 << 30) - 512]
    qemu.io(
        path,
        "vmdk",
        *(f"write -P {n + 1} {a} {min(140_288, (5 << 30) - a)}" for n, a in enumerate(at)),
    )
    files, disk = opened(path)
    assert disk.size == 5 << 30
    for number, offset in enumerate(at):
        length = min(140_288, disk.size - offset)
        expected = bytes([number + 1]) * length
        assert files.read(disk, offset, length) == expected
        assert files.read(disk, offset - 9, 9) == bytes(9)
    assert len(files.opened) == 4
    if kind == "Sparse":
        assert data_ranges(files, disk) == qemu.data_ranges(path, "vmdk")
        reads = files.reads
        pieces = files.run(disk.map(0, disk.size))
        assert (pieces.start, pieces.end) == (0, disk.size)
        assert files.reads == reads + 1  # of all tables at once


def test_a_chain(tmp_path: Path) -> None:
    base, delta = tmp_path / "base.vmdk", tmp_path / "delta.vmdk"
    qemu.img("create", "-f", "vmdk", base, "70M")
    qemu.io(base, "vmdk", "write -P 1 0 3M", "write -P 2 65M 1M")
    options = "zeroed_grain=on"
    qemu.img("create", "-f", "vmdk", "-o", options, "-b", base, "-F", "vmdk", delta)
    qemu.io(delta, "vmdk", "write -P 3 1M 1M", "write -z 2M 1M", "write -P 4 66M 512")
    below_files, below = opened(base)
    assert below.backing is None
    files, disk = opened(delta)
    assert disk.backing is not None
    assert (disk.backing.name, disk.backing.format) == (str(base), "vmdk")
    assert disk.backing.wanted_ids == (below.own_id,) != (disk.own_id,)
    whole = files.read(
        disk, 0, disk.size, lambda offset, length: below_files.read(below, offset, length)
    )
    assert whole == qemu.raw(delta, "vmdk")
    kinds = {piece.kind for piece in files.run(disk.map(2 * MiB, MiB)).between(2 * MiB, 3 * MiB)}
    assert kinds == {Kind.ZERO}
    kinds = {piece.kind for piece in files.run(disk.map(MiB // 2, 1)).between(0, MiB)}
    assert kinds == {Kind.BELOW}


@pytest.mark.parametrize("size", [8 << 40, 48 << 40])
def test_little_is_read(size: int, tmp_path: Path) -> None:
    """Of a directory that is kept, and of one that is not."""
    path = tmp_path / "disk.vmdk"
    qemu.img("create", "-f", "vmdk", path, str(size))
    qemu.io(path, "vmdk", "write -P 7 5T 512")
    files, disk = opened(path)
    directory = (size >> 25) * 4
    kept = directory <= 4 * MiB
    assert files.reads == 1 + kept
    assert files.bytes_read == 65536 + 1536 + kept * directory
    assert files.read(disk, 5 << 40, 513) == b"\7" * 512 + b"\0"
    assert files.reads == 3
    assert files.bytes_read < 2 * MiB
    with path.open("r+b") as file:
        file.truncate(30 << 9)  # within the redundant directory, so that all others are lost
    files, disk = opened(path)
    with pytest.raises(CorruptImage, match="ends in its grain directory"):
        files.read(disk, size - 1, 1)
