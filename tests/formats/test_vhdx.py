"""VHDX read: what qemu makes, differencing disks made by hand, and what is wrong with others."""

from __future__ import annotations

import json
import random
import struct
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs.errors import CorruptImage, UnsupportedFeature
from imgfs.formats import vhdx_tables as vt
from imgfs.formats.vhdx import VhdxDisk, open_disk
from imgfs.pieces import Kind
from tests.drive import Bytes, Files, size_of
from tests.formats import mutate, qemu
from tests.formats.vhdx_files import (
    BAT_AT,
    LINKAGE,
    METADATA_AT,
    PARENT,
    PARENT_ID,
    Differencing,
    locator,
    repair,
)

MIB = 1 << 20


def opened(file: Bytes) -> tuple[Files, VhdxDisk]:
    files = Files(file)
    return files, files.run(open_disk("a.vhdx", size_of(file)))


def data_bytes(files: Files, disk: VhdxDisk) -> set[tuple[int, int]]:
    """The ranges of the disk that are stored, as the pieces have them."""
    found, at = set(), 0
    while at < disk.size:
        pieces = files.run(disk.map(at, disk.size - at))
        for piece in pieces.between(at, pieces.end):
            if piece.kind == Kind.DATA:
                found.add((piece.start, piece.end))
        at = pieces.end
    return found


@pytest.mark.parametrize("seed", range(8))
def test_what_qemu_makes(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path, size = tmp_path / "a.vhdx", rng.randint(1, 60 * MIB // 512) * 512
    subformat = rng.choice(("dynamic", "dynamic", "fixed"))
    options = f"subformat={subformat},block_size={rng.choice((1, 2, 8))}M"
    options += f",log_size={rng.choice((1, 3))}M,block_state_zero={rng.choice(('on', 'off'))}"
    qemu.img("create", "-q", "-f", "vhdx", "-o", options, path, str(size))
    qemu.io(path, "vhdx", *qemu.scribble(rng, size, rng.randint(0, 12)))
    files, disk = opened(path)
    assert files.reads == 2
    assert disk.size == json.loads(qemu.img("info", "--output=json", path))["virtual-size"]
    wanted = qemu.raw(path, "vhdx")
    assert files.read(disk, 0, disk.size) == wanted
    for _ in range(20):
        offset = rng.randrange(disk.size)
        length = rng.randint(1, min(3 * MIB, disk.size - offset))
        assert files.read(disk, offset, length) == wanted[offset : offset + length]
    assert ("subformat", subformat) in disk.facts()


@pytest.mark.parametrize(("block_mib", "size"), [(1, 9 << 30), (256, 9 << 30), (8, 40 << 40)])
def test_bitmap_entries_between_the_blocks(tmp_path: Path, block_mib: int, size: int) -> None:
    path, rng = tmp_path / "a.vhdx", random.Random(block_mib)
    qemu.img("create", "-q", "-f", "vhdx", "-o", f"block_size={block_mib}M", path, str(size))
    places = [0, size - 512, (4 << 30) - 4096, 4 << 30, rng.randrange(0, size, 512)]
    writes = [f"write -P {n} {at} 512" for n, at in enumerate(places, 1)]
    qemu.io(path, "vhdx", *writes)
    files, disk = opened(path)
    for number, at in enumerate(places, 1):
        assert files.read(disk, at, 512) == bytes([number]) * 512
    stored = sum(b - a for a, b in data_bytes(files, disk)) if size < 1 << 40 else 0
    assert stored <= len(places) * block_mib * MIB


def test_a_large_one_opens_soon(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    qemu.img("create", "-q", "-f", "vhdx", "-o", "block_size=1M", path, "16T")
    files = Files(path)
    opened(path)
    before = time.perf_counter()
    disk = files.run(open_disk("a.vhdx", size_of(path)))
    files.run(disk.map(5 << 40, 4096))
    assert time.perf_counter() - before < 0.1
    assert files.reads == 3
    pieces = files.run(disk.map(0, disk.size))
    assert pieces.end == (32 << 10) * MIB


@pytest.mark.parametrize("seed", range(8))
def test_a_differencing_disk(seed: int) -> None:
    rng = random.Random(seed)
    sector, block_size = rng.choice((512, 4096)), rng.choice((1, 2, 4)) * MIB
    size = rng.randint(1, 6 * MIB // sector) * sector
    below, sectors = rng.randbytes(size), block_size // sector
    made, wanted = Differencing(size, block_size, sector), bytearray(below)
    here: set[int] = set()
    for block in rng.sample(range(made.blocks), made.blocks):
        kind, content = (
            rng.choice(("none", "zero", "all", "some", "few")),
            rng.randbytes(block_size),
        )
        first, end = block * block_size, min(size, (block + 1) * block_size)
        if kind == "zero":
            made.table[made.place(block)] = rng.choice((vt.ZERO, vt.UNMAPPED, vt.UNDEFINED))
            wanted[first:end] = bytes(end - first)
        elif kind == "all":
            made.add(block, content)
            wanted[first:end] = content[: end - first]
            here |= set(range(first, end, sector))
        elif kind in ("some", "few"):
            some = {s for s in range(sectors) if rng.random() < (0.5 if kind == "some" else 0.01)}
            made.add(block, content, some)
            for at in (s * sector for s in some if first + s * sector < size):
                wanted[first + at : first + at + sector] = content[at : at + sector]
                here.add(first + at)
    files, disk = opened(bytes(made.file()))
    assert disk.backing is not None

    def parent(at: int, length: int) -> bytes:
        return below[at : at + length]

    assert files.read(disk, 0, size, parent) == wanted
    stored = {s for a, b in data_bytes(files, disk) for s in range(a, b, sector)}
    assert stored == here
    for _ in range(20):
        offset = rng.randrange(size)
        length = rng.randint(1, size - offset)
        assert files.read(disk, offset, length, parent) == wanted[offset : offset + length]


def test_differencing_past_the_first_chunk() -> None:
    made = Differencing(9 << 30, 2 * MIB)
    block = 2048 + 5  # of the second chunk of 4 GiB
    made.add(block, b"x" * 2 * MIB, {0, 9})
    files, disk = opened(bytes(made.file()))
    pieces = list(files.run(disk.map(block * 2 * MIB, 2 * MIB)))
    kinds = [(p.start - block * 2 * MIB, p.kind) for p in pieces]
    data, below = Kind.DATA, Kind.BELOW
    assert kinds == [(0, data), (512, below), (9 * 512, data), (10 * 512, below)]


def test_the_parent() -> None:
    _, disk = opened(bytes(Differencing(MIB, MIB).file()))
    assert disk.backing is not None
    assert (disk.backing.name, disk.backing.format) == ("parent.vhdx", "vhdx")
    assert disk.backing.wanted_ids == (str(PARENT_ID),)
    assert disk.own_id == str(uuid.UUID(bytes_le=b"d" * 16))
    assert ("subformat", "differencing") in disk.facts()


PATHS = [
    ({"relative_path": "..\\x\\p.vhdx", "absolute_win32_path": "C:\\q.vhdx"}, "../x/p.vhdx"),
    ({"absolute_win32_path": "\\\\?\\d:\\path\\p.vhdx"}, "p.vhdx"),
    ({"volume_path": "\\\\?\\Volume{26A21BDA}\\q.vhdx", "absolute_win32_path": "C:\\p"}, "q.vhdx"),
]


@pytest.mark.parametrize(("paths", "wanted"), PATHS)
def test_the_parents_path(paths: dict[str, str], wanted: str) -> None:
    made = Differencing(MIB, MIB)
    made.items[vt.PARENT_LOCATOR_ITEM] = locator({**LINKAGE, **paths})
    backing = opened(bytes(made.file()))[1].backing
    assert backing is not None
    assert backing.name == wanted


def test_the_newest_valid_header_counts() -> None:
    file = Differencing(MIB, MIB).file()
    new = vt.header(file[vt.HEADER_OFFSETS[0] :][: vt.HEADER_SIZE])
    new = new._replace(checksum=0, sequence_number=9, data_write_guid=b"n" * 16)
    first, second = (slice(at, at + vt.HEADER_SIZE) for at in vt.HEADER_OFFSETS)
    file[first] = new.pack()
    assert opened(bytes(file))[1].own_id == str(uuid.UUID(bytes_le=b"n" * 16))
    file[second.start + 70] ^= 1
    assert opened(bytes(file))[1].own_id == str(uuid.UUID(bytes_le=b"n" * 16))
    file[second] = new._replace(data_write_guid=b"o" * 16).pack()
    with pytest.raises(CorruptImage, match="both headers have the sequence number 9"):
        opened(bytes(file))
    file[second] = new.pack()  # as Disk2vhd has it
    opened(bytes(file))
    file[first], file[second] = bytes(4096), bytes(4096)
    with pytest.raises(CorruptImage, match="no header with a correct checksum"):
        opened(bytes(file))


def test_either_region_table() -> None:
    file = Differencing(MIB, MIB).file()
    file[vt.REGION_TABLE_OFFSETS[0] + 60000] ^= 1
    opened(bytes(file))
    file[vt.REGION_TABLE_OFFSETS[1] + 60000] ^= 1
    with pytest.raises(CorruptImage, match="no region table with a correct checksum"):
        opened(bytes(file))


def item(item_id: bytes, content: bytes) -> Callable[[Differencing], None]:
    def change(made: Differencing) -> None:
        made.items[item_id] = content

    return change


def region(number: int, **changes: object) -> Callable[[Differencing], None]:
    def change(made: Differencing) -> None:
        made.regions[number] = made.regions[number]._replace(**changes)  # type: ignore[arg-type]

    return change


def parent(**values: str) -> Callable[[Differencing], None]:
    return item(vt.PARENT_LOCATOR_ITEM, locator({k: v for k, v in values.items() if v}))


def without(item_id: bytes) -> Callable[[Differencing], None]:
    return lambda made: made.items.pop(item_id) and None


def parameters(block_size: int) -> bytes:
    return vt.FILE_PARAMETERS.pack(block_size, vt.HAS_PARENT)


def number(value: int, width: int = 4) -> bytes:
    return value.to_bytes(width, "little")


BROKEN: list[tuple[Callable[[Differencing], None], str]] = [
    (item(b"?" * 16, b"x"), "metadata item 3f3f3f3f-.* is required and unknown"),
    (lambda made: made.regions.append(vt.Region(b"?" * 16, 9 * MIB, MIB, 1)), "region 3f.*unknown"),
    (lambda made: made.regions.append(made.regions[0]), "is there twice"),
    (lambda made: made.regions.pop() and None, "region 8b7ca206-.* is missing"),
    (region(0, file_offset=0), "at offset 0"),
    (region(0, file_offset=5), "at offset 5"),
    (region(0, file_offset=1 << 63), "at offset 9223372036854775808"),
    (region(0, length=0), "of 0 bytes"),
    (region(1, file_offset=1 << 50), "at offset 1125899906842624, of .* past the end of the file"),
    (item(vt.FILE_PARAMETERS_ITEM, parameters(0)), "block size 0"),
    (item(vt.FILE_PARAMETERS_ITEM, parameters(512 << 10)), "block size 524288"),
    (item(vt.FILE_PARAMETERS_ITEM, parameters(3 * MIB)), "block size 3145728"),
    (item(vt.FILE_PARAMETERS_ITEM, parameters(512 * MIB)), "block size 536870912"),
    (item(vt.FILE_PARAMETERS_ITEM, b"1234"), "file parameters has a length of 4"),
    (item(vt.LOGICAL_SECTOR_SIZE_ITEM, number(1024)), "logical sector size 1024"),
    (item(vt.VIRTUAL_DISK_SIZE_ITEM, number(513, 8)), "virtual disk size 513 is no multiple"),
    (item(vt.VIRTUAL_DISK_SIZE_ITEM, number(1 << 47, 8)), "more than 64 TiB"),
    (item(vt.VIRTUAL_DISK_SIZE_ITEM, number(1 << 46, 8)), "too few for"),
    (without(vt.VIRTUAL_DISK_SIZE_ITEM), "has no virtual disk size"),
    (without(vt.PARENT_LOCATOR_ITEM), "but no locator"),
    (item(vt.PARENT_LOCATOR_ITEM, b"x"), "parent locator has a length of 1"),
    (item(vt.PARENT_LOCATOR_ITEM, locator(PARENT, b"?" * 16)), "unknown type 3f3f3f3f-"),
    (item(vt.PARENT_LOCATOR_ITEM, locator(PARENT)[:30]), "2 entries .* too many"),
    (item(vt.PARENT_LOCATOR_ITEM, locator(PARENT)[:-1]), "the text at .* is no UTF-16"),
    (parent(**LINKAGE), "no path of the parent"),
    (parent(relative_path="x"), "parent_linkage '' is no GUID"),
    (parent(relative_path="x", parent_linkage="{zz}"), "parent_linkage '{zz}' is no GUID"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_broken(change: Callable[[Differencing], None], message: str) -> None:
    made = Differencing(5 * MIB, MIB)
    change(made)
    with pytest.raises((CorruptImage, UnsupportedFeature), match=message) as raised:
        opened(bytes(made.file()))
    assert str(raised.value).startswith("a.vhdx: ")


def test_another_version() -> None:
    with pytest.raises(UnsupportedFeature, match="header's version is 2, not 1"):
        opened(bytes(Differencing(MIB, MIB).file(version=2)))


@pytest.mark.parametrize("content", [b"", b"vhdxfile", bytes(4 * MIB), b"vhdxfile" + bytes(MIB)])
def test_no_vhdx(content: bytes) -> None:
    with pytest.raises(CorruptImage, match=r"^a\.vhdx: "):
        opened(content)


WRONG_ENTRIES = [
    (4, "is of the state 4"),
    (vt.FULLY_PRESENT, "at offset 0 is not inside of the file"),
    (1 << 40 | vt.FULLY_PRESENT, "at offset 1099511627776 is not inside"),
    ((1 << 64) - MIB | vt.FULLY_PRESENT, "is not inside of the file"),
    (19 * MIB | vt.PARTIALLY_PRESENT, "has no sector bitmap"),
    (19 * MIB + 4096 | vt.FULLY_PRESENT, "its offset is no multiple of 1 MiB"),
]


@pytest.mark.parametrize(("entry", "message"), WRONG_ENTRIES)
def test_a_wrong_entry_spoils_its_block_alone(entry: int, message: str) -> None:
    made = Differencing(5 * MIB, MIB)
    for block in (0, 1, 3, 4):
        made.add(block, bytes([block + 1]) * MIB)
    made.table[2] = entry
    files, disk = opened(bytes(made.file()).ljust(20 * MIB, b"\0"))
    assert files.read(disk, 0, 2 * MIB) == b"\1" * MIB + b"\2" * MIB
    assert files.read(disk, 3 * MIB, 2 * MIB) == b"\4" * MIB + b"\5" * MIB
    for offset in (2 * MIB, 3 * MIB - 1):
        with pytest.raises(CorruptImage, match=f"block 2, .* offset {BAT_AT + 16}, .*{message}"):
            files.run(disk.map(offset, 1))


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    qemu.img("create", "-q", "-f", "vhdx", "-o", "block_size=1M", path, "8M")
    qemu.io(path, "vhdx", "write -P 1 1M 6M")
    whole, wanted = path.read_bytes(), qemu.raw(path, "vhdx")
    regions = vt.regions(whole[vt.REGION_TABLE_OFFSETS[0] :][: vt.REGION_TABLE_SIZE])
    assert regions is not None
    metadata_end = max(region.file_offset + region.length for region in regions)
    for length in (100, 65536, 200_000, MIB, 2 * MIB, metadata_end - MIB + 65550):
        with pytest.raises(CorruptImage):
            opened(whole[:length])
    complete, disk = opened(whole)
    data = [p for p in complete.run(disk.map(0, disk.size)) if p.kind == Kind.DATA]
    ends = [p.offset + at for p in data for at in range(MIB, p.end - p.start + 1, MIB)]
    assert len(ends) == 6
    for length in (metadata_end, min(ends), min(ends) + 5000, max(ends) - 512):
        files, disk = opened(whole[:length])
        bad = 0
        for offset in range(0, disk.size, MIB):
            try:
                assert files.read(disk, offset, MIB) == wanted[offset : offset + MIB]
            except CorruptImage:
                bad += 1
        assert bad == sum(end > length for end in ends)


def test_a_truncated_table() -> None:
    file = bytes(Differencing(8 * MIB, MIB).file())
    files, disk = opened(file[: BAT_AT + 20])
    assert files.run(disk.map(0, 8 * MIB)).end == 2 * MIB
    with pytest.raises(
        CorruptImage, match=f"BAT's entry 2 at offset {BAT_AT + 16} is past the end"
    ):
        files.run(disk.map(2 * MIB, 1))


@pytest.mark.timeout(900)  # of the long run
def test_mutations() -> None:
    made = Differencing(600 * MIB, MIB)
    for block in (0, 7, 8, 599):
        made.add(block, bytes(MIB), {1, 5} if block % 2 else None)
    file = bytes(made.file())
    places = [(at, at + 80) for at in (*vt.HEADER_OFFSETS, *vt.REGION_TABLE_OFFSETS)]
    places += [(METADATA_AT, METADATA_AT + 230), (METADATA_AT + 65536, METADATA_AT + 65800)]
    places += [(BAT_AT, BAT_AT + 9 * 8), (BAT_AT, BAT_AT + 4800)]
    mutate.check(open_disk, file, places, 7, repair)


def test_a_checksum() -> None:
    assert vt.crc32c(b"123456789") == 0xE3069283  # RFC 3720, B.4 and others
    data = struct.pack("<4sI", b"head", 0) + b"x" * 100
    assert vt.has_checksum(vt.with_checksum(data))
    assert not vt.has_checksum(data)
