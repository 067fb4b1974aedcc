"""What changed over a base, shown as qcow2, against a disk put together block by block."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from imgfs.errors import UnsupportedFeature
from imgfs.formats.layout import About
from imgfs.formats.qcow2 import open_disk
from imgfs.formats.qcow2_layout import delta_layout
from imgfs.pieces import Kind, PieceList, PieceListBuilder
from tests.drive import Files
from tests.formats import qemu
from tests.formats.test_qcow2_layout import materialise

ABOUT = About("work.delta.qcow2", "stat:1", 0)
BLOCK = 4096
CLUSTER = 65536


def random_changes(rng: random.Random, size: int) -> PieceList:
    builder = PieceListBuilder()
    while builder.end < size:
        length = rng.choice([1, 2, 15, 16, 17, 40, 160]) * BLOCK
        end = min(size, builder.end + length)
        kind = rng.choice([Kind.BELOW, Kind.BELOW, Kind.ZERO, Kind.DATA])
        if kind == Kind.DATA:
            builder.data(end, rng.randrange(1 << 40), 1)  # where the overlay has it is its own
        elif kind == Kind.ZERO:
            builder.zero(end)
        else:
            builder.below(end)
    return builder.finish(size)


def merged(rng: random.Random, changes: PieceList, base: bytes) -> bytes:
    disk = bytearray(base[: changes.end].ljust(changes.end, b"\0"))
    for piece in changes:
        length = piece.end - piece.start
        if piece.kind == Kind.DATA:
            disk[piece.start : piece.end] = rng.randbytes(length)
        elif piece.kind == Kind.ZERO:
            disk[piece.start : piece.end] = bytes(length)
    return bytes(disk)


@pytest.mark.parametrize("seed", range(16))
def test_random_changes(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    sizes = [0, 1000, BLOCK, CLUSTER, 20 * CLUSTER, 40 * CLUSTER + 3 * BLOCK, 30 * CLUSTER + 1000]
    size = rng.choice(sizes)
    base = tmp_path / "base.raw"
    base.write_bytes(rng.randbytes(rng.choice([size, size // 2, size + 5000, 2 * size, 512])))
    changes = random_changes(rng, size)
    disk, out = tmp_path / "disk.raw", tmp_path / "work.delta.qcow2"
    disk.write_bytes(merged(rng, changes, base.read_bytes()))
    shown = delta_layout(changes, size, ABOUT, str(base), "raw")
    materialise(shown, disk, out)
    assert "No errors" in qemu.img("check", out)
    wanted = disk.read_bytes().ljust(-(-size // 512) * 512, b"\0")
    assert qemu.raw(out, "qcow2") == wanted
    info = json.loads(qemu.img("info", "--output=json", out))
    assert (info["backing-filename"], info["backing-filename-format"]) == (str(base), "raw")
    assert info["virtual-size"] == len(wanted)
    files = Files(out)
    again = files.run(open_disk("work.delta.qcow2", shown.size))
    content = base.read_bytes().ljust(len(wanted), b"\0")
    if wanted:
        found = files.read(again, 0, again.size, lambda at, n: content[at : at + n])
        assert found == wanted
    for _ in range(10):
        offset = rng.randrange(shown.size)
        length = rng.randint(1, shown.size - offset)
        part = Files(disk).content(shown.map(offset, length), offset, length)
        assert part == out.read_bytes()[offset : offset + length]


def test_whole_clusters_of_the_base_and_of_zeroes_are_not_stored(tmp_path: Path) -> None:
    size = 8 * CLUSTER
    builder = PieceListBuilder()
    builder.below(2 * CLUSTER)
    builder.zero(4 * CLUSTER)
    builder.data(4 * CLUSTER + BLOCK, 0)
    builder.below(6 * CLUSTER)
    builder.zero(6 * CLUSTER + BLOCK)  # a part of a cluster: stored whole
    builder.below(size)
    disk, out = tmp_path / "disk.raw", tmp_path / "delta.qcow2"
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * size)
    disk.write_bytes(merged(random.Random(1), builder.finish(size), base.read_bytes()))
    shown = delta_layout(builder.finish(size), size, ABOUT, str(base), "raw")
    materialise(shown, disk, out)
    files = Files(out)
    pieces = files.run(files.run(open_disk("x", shown.size)).map(0, size))
    assert [(p.end // CLUSTER, p.kind) for p in pieces if p.kind != Kind.DATA] == [
        (2, Kind.BELOW),
        (4, Kind.ZERO),
        (6, Kind.BELOW),
        (8, Kind.BELOW),
    ]
    assert qemu.raw(out, "qcow2") == disk.read_bytes()
    # What is known to be zero in a stored cluster is a hole of the file.
    assert sum(p.end - p.start for p in shown.map(0, shown.size) if p.kind == Kind.DATA) == (
        2 * CLUSTER - BLOCK
    )


def test_a_base_in_qemus_json(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * CLUSTER)
    name = "json:" + json.dumps(
        {"driver": "raw", "file": {"driver": "file", "filename": str(base)}}
    )
    builder = PieceListBuilder()
    builder.below(CLUSTER)
    shown = delta_layout(builder.finish(CLUSTER), CLUSTER, ABOUT, name, "raw")
    materialise(shown, base, tmp_path / "delta.qcow2")
    assert qemu.raw(tmp_path / "delta.qcow2", "qcow2") == base.read_bytes()


def test_what_does_not_fit_into_the_header() -> None:
    builder = PieceListBuilder()
    builder.below(CLUSTER)
    changes = builder.finish(CLUSTER)
    delta_layout(changes, CLUSTER, ABOUT, "x" * 1023, "raw")
    for name, kind in (("x" * 1024, "raw"), ("é" * 512, "raw"), ("", "raw"), ("x", "y" * 16)):
        with pytest.raises(UnsupportedFeature, match=r"^work\.delta\.qcow2: the (name|format)"):
            delta_layout(changes, CLUSTER, ABOUT, name, kind)
    with pytest.raises(ValueError, match="changes are of"):
        delta_layout(changes, CLUSTER + 1, ABOUT, "x", "raw")
