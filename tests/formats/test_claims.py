"""Two entries of a table in one place of the file, and entries in that of another structure."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from imgfs.errors import CorruptImage
from imgfs.formats import qcow2, vdi, vhd, vhdx
from imgfs.formats import qcow2_tables as q
from imgfs.formats.claims import WHOLE, check_entries, sorted_apart
from imgfs.formats.entries import Entries
from imgfs.pieces import Kind
from tests.drive import Files
from tests.formats import qemu
from tests.formats.test_vdi import FREE
from tests.formats.test_vdi import image as vdi_image

MIB = 1 << 20


def refused(module: object, content: bytes, why: str) -> None:
    files = Files(bytes(content))
    with pytest.raises(CorruptImage, match=why):
        disk = files.run(module.open_disk("a.img", len(content)))  # type: ignore[attr-defined]
        files.read(disk, 0, 1)


def entries(high: int = 1 << 40, base: int = 0) -> Entries:
    rules = [((1 << 64) - 1, 0, Kind.ZERO), (0, 0, Kind.DATA)]
    return Entries(8, rules, mask=(1 << 62) - 1, base=base, high=high)


@pytest.mark.parametrize("seed", range(200))
def test_as_the_plainest_way_finds_them(seed: int) -> None:
    rng = random.Random(seed)
    unit, alone = rng.choice((1, 5, 512)), rng.choice((0, 1 << 63))
    values = [
        rng.randrange(0, 40 * unit) | rng.choice((0, 1 << 63)) for _ in range(rng.randrange(9))
    ]
    if seed % 2:
        values = [value // unit * unit for value in values]
    start = rng.randrange(50 * unit)
    taken = [(start, start + rng.randrange(1, 9))]
    found = entries().overlap(struct.pack(f"<{len(values)}Q", *values), unit, taken, alone)
    there = [(value & (1 << 62) - 1, value) for value in values if value]
    pairs = any(
        abs(a[0] - b[0]) < unit and (not alone or (a[1] | b[1]) & alone)
        for index, a in enumerate(there)
        for b in there[:index]
    )
    hit = any(at < taken[0][1] and taken[0][0] < at + unit for at, _ in there)
    if unit == 1 or not alone or seed % 2:  # who may share is aligned
        assert (found is not None) == (pairs or hit)


def test_large_tables_in_any_order() -> None:
    rng = random.Random(1)
    values = [n << 16 for n in range(1, 100_000)]
    rng.shuffle(values)
    table = struct.pack(f"<{len(values)}Q", *values)
    assert entries().overlap(table, 1 << 16) is None
    values[777] = values[99_000] + 5
    table = struct.pack(f"<{len(values)}Q", *values)
    found = entries().overlap(table, 1 << 16)
    assert found is not None
    assert {777, 99_000} & set(found)


def test_structures_apart() -> None:
    places = [(512, 1024, "b"), (0, 512, "a"), (7, 7, "nothing")]
    assert [each[2] for each in sorted_apart("x", places)] == ["a", "b"]
    with pytest.raises(CorruptImage, match="x: c at offset 1000 overlaps b"):
        sorted_apart("x", [*places, (1000, 1001, "c")])
    with pytest.raises(CorruptImage, match="x: entry 1 is in the place of b"):
        table = struct.pack("<2Q", 4096, 1000)
        check_entries(entries(), table, 100, [places[0]], "x", "entry {}".format)


def test_vdi() -> None:
    good = vdi_image([0, 1, 2, FREE, 3])
    for offset, value, why in (
        (512 + 4, 0, "block 0 .*block 1 .*the same place"),
        (340, 768, "offBlocks 768"),
        (344, 1025, "offData 1025"),
        (344, 512, "offData 512"),
        (340, 1024, "offData 1024 .* before the end"),
    ):
        bad = bytearray(good)
        struct.pack_into("<I", bad, offset, value)
        refused(vdi, bad, why)


def test_a_large_vdi_is_looked_at_in_parts() -> None:
    blocks = [0, 1, *([FREE] * (WHOLE // 4)), 1]
    content = vdi_image(blocks[:4])
    table = struct.pack(f"<{len(blocks)}I", *blocks)
    table += bytes(-len(table) % 512)
    struct.pack_into("<I", content, 344, 512 + len(table))
    struct.pack_into("<Q", content, 368, len(blocks) * 4096)
    struct.pack_into("<I", content, 384, len(blocks))
    content[512:] = table + bytes(4 * 4096)
    files = Files(bytes(content))
    disk = files.run(vdi.open_disk("a.vdi", len(content)))
    assert files.read(disk, 0, 1) == b"\0"
    struct.pack_into("<I", content, 512, 1)
    refused(vdi, content, "the same place")


def qemu_image(tmp_path: Path, format: str, options: str) -> bytearray:
    path = tmp_path / "image"
    qemu.img("create", "-q", "-f", format, "-o", options, path, "16M")
    qemu.io(path, format, "write -P 1 0 2M", "write -P 2 6M 2M")
    return bytearray(path.read_bytes())


def test_vhd(tmp_path: Path) -> None:
    good = qemu_image(tmp_path, "vpc", "force_size=on")
    (header,) = struct.unpack_from(">Q", good, 16)
    (table,) = struct.unpack_from(">Q", good, header + 16)
    first = struct.unpack_from(">I", good, table)[0]
    for value, why in (
        (first, "block 0 .*block 1 .*the same place"),
        (first + 8, "the same place"),
        (table // 512, "block 1 .*the table of blocks"),
        (header // 512, "block 1 .*the header"),
        (0, "block 1 .*the copy of the footer"),
        ((len(good) - 512) // 512 - 5, "block 1 .*footer|past the end|same place"),
    ):
        bad = bytearray(good)
        struct.pack_into(">I", bad, table + 4, value)
        refused(vhd, bad, why)


def test_vhdx(tmp_path: Path) -> None:
    good = qemu_image(tmp_path, "vhdx", "block_size=1M")
    bat = 3 * MIB if good[3 * MIB : 3 * MIB + 8] != b"metadata" else 2 * MIB
    (first,) = struct.unpack_from("<Q", good, bat)
    assert first & 7 == 6
    for value, why in (
        (first, "entry 0 .*entry 1 .*the same place"),
        (MIB | 6, "entry 1 .*the log"),
        (bat | 6, "entry 1 .*region 2dc27766"),
        (first + 2 * MIB + 4096, "no multiple of 1 MiB|the same place"),
    ):
        bad = bytearray(good)
        struct.pack_into("<Q", bad, bat + 8, value)
        files = Files(bytes(bad))
        disk = files.run(vhdx.open_disk("a.img", len(bad)))
        with pytest.raises(CorruptImage, match=why):
            files.read(disk, 0, 2 * MIB)


def test_qcow2(tmp_path: Path) -> None:
    good = qemu_image(tmp_path, "qcow2", "cluster_size=4k")
    l1, refcounts = struct.unpack_from(">2Q", good, 40)
    l2 = struct.unpack_from(">Q", good, l1)[0] & q.ENTRY_OFFSET
    first = struct.unpack_from(">Q", good, l2)[0]
    for at, value, why in (
        (l2 + 8, first, "byte 0 .*byte 4096 .*the same place"),
        (l2 + 8, first & ~q.ENTRY_COPIED, "the same place"),
        (l2 + 8, l2, "byte 4096 .*an L2 table"),
        (l2 + 8, l1, "byte 4096 .*the L1 table"),
        (l2 + 8, refcounts, "byte 4096 .*the refcount table"),
        (l1 + 8, l2, "L1 entry 0 .*L1 entry 1 .*the same place"),
        (l1, refcounts, "L1 entry 0 .*the refcount table"),
        (40, refcounts, "overlaps"),
        (48, 0, "overlaps the header"),
    ):
        bad = bytearray(good)
        struct.pack_into(">Q", bad, at, value)
        refused(qcow2, bad, why)
    shared = bytearray(good)
    for at in (l2, l2 + 8):  # as two refcounts say that they may
        struct.pack_into(">Q", shared, at, first & ~q.ENTRY_COPIED)
    files = Files(bytes(shared))
    disk = files.run(qcow2.open_disk("a.img", len(shared)))
    assert files.read(disk, 0, 8192) == b"\1" * 8192


def test_a_large_qcow2_is_looked_at_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu.img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, "2T")
    qemu.io(path, "qcow2", "write -P 1 0 2M", "write -P 2 1T 2M")
    good = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", good, 40)
    tables = [struct.unpack_from(">Q", good, l1 + 8 * at)[0] & q.ENTRY_OFFSET for at in (0, 2)]
    refused_at = struct.unpack_from(">Q", good, l1 + 8)[0]
    assert all(tables) and not refused_at
    for value in tables:
        bad = bytearray(good)
        struct.pack_into(">Q", bad, tables[0], value | q.ENTRY_COPIED)
        refused(qcow2, bad, "the cluster for byte 0 .* an L2 table")
