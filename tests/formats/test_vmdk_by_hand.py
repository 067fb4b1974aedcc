"""VMDKs that qemu reads and cannot write, and the ways by which extents make up a disk."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from imgfs.errors import CorruptImage
from imgfs.formats.vmdk import open_disk
from imgfs.pieces import Kind
from tests.drive import Bytes, Files
from tests.formats import qemu
from tests.formats.test_vmdk import check, opened
from tests.formats.vmdk_images import (
    GRAIN,
    GTES,
    SECTOR,
    cowd,
    grain_bytes,
    hosted,
    sesparse,
    stream,
    text,
)

SIZE = GRAIN * SECTOR  # of a grain, in bytes


def read_all(image: bytes, others: dict[str, Bytes] | None = None) -> bytes:
    files = Files(image, others)
    disk = files.run(open_disk("disk.vmdk", len(image)))
    return files.read(disk, 0, disk.size)


@pytest.mark.parametrize("seed", range(4))
def test_vmfs_sparse(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    grain = rng.choice([1, 8])
    capacity = rng.randint(1, 3 * 4096 * grain)
    grains = rng.sample(range(-(-capacity // grain)), min(50, -(-capacity // grain)))
    (tmp_path / "disk-delta.vmdk").write_bytes(cowd(capacity, grains, grain))
    path = tmp_path / "disk.vmdk"
    path.write_bytes(text("vmfsSparse", f'RW {capacity} VMFSSPARSE "disk-delta.vmdk"'))
    disk = check(path, rng)
    assert disk.size == capacity * SECTOR


@pytest.mark.parametrize("seed", range(4))
def test_se_sparse(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    capacity = rng.randint(1, 3 * 4096 * 8)
    grains: dict[int, int | None] = {}
    for number in rng.sample(range(-(-capacity // 8)), min(50, -(-capacity // 8))):
        grains[number] = rng.choice([None, None, 1 << 60, 2 << 60 | 5, 1 << 60 | 0xFFF << 48])
    start = rng.randrange(-(-capacity // 8))
    for number in range(start, min(start + 30, -(-capacity // 8))):
        grains[number] = None
    (tmp_path / "disk-sesparse.vmdk").write_bytes(sesparse(capacity, grains))
    path = tmp_path / "disk.vmdk"
    path.write_bytes(text("seSparse", f'RW {capacity} SESPARSE "disk-sesparse.vmdk"'))
    check(path, rng)


def test_se_sparse_numbers_beyond_twelve_bits() -> None:
    """The low bits of a grain's number stand above its high ones."""
    image = sesparse(4096 * 8, dict.fromkeys(range(4096)))
    place = struct.unpack_from("<26Q", image)[24] * SECTOR
    image += bytes(place + 4098 * 4096 - len(image)) + grain_bytes(77, 4096)
    table = struct.unpack_from("<26Q", image)[18] * SECTOR
    struct.pack_into("<Q", image, table, 3 << 60 | 2 << 48 | 1)  # 4098
    descriptor = text("seSparse", f'RW {4096 * 8} SESPARSE "x"')
    files = Files(descriptor, {"x": image})
    disk = files.run(open_disk("d", len(descriptor)))
    assert files.read(disk, 0, 8192) == grain_bytes(77, 4096) + grain_bytes(1, 4096)
    assert files.read(disk, 4095 * 4096, 4096) == grain_bytes(4095, 4096)


@pytest.mark.parametrize("last", [SIZE, 3 * SECTOR])
def test_a_stream_with_a_footer(last: int, tmp_path: Path) -> None:
    """The last grain may be whole or end with the disk."""
    rng = random.Random(5)
    capacity = 3 * GRAIN * GTES + 3
    numbers = [*rng.sample(range(GTES), 20), *rng.sample(range(2 * GTES, 3 * GTES), 5)]
    grains = {n: rng.choice([grain_bytes(n), rng.randbytes(SIZE)]) for n in numbers}
    grains[3 * GTES] = rng.randbytes(last)
    path = tmp_path / "disk.vmdk"
    path.write_bytes(stream(capacity, grains))
    check(path, rng)


def test_a_streams_grain_is_read_and_no_more(tmp_path: Path) -> None:
    image = stream(3 * GRAIN, {n: grain_bytes(n) for n in range(3)})
    files = Files(image)
    disk = files.run(open_disk("d", len(image)))
    lengths = [p.detail.length for p in files.run(disk.map(0, disk.size))]  # type: ignore[union-attr]
    assert lengths[:2] == [SECTOR, SECTOR]


def test_a_grain_of_another_place() -> None:
    image = stream(3 * GRAIN, {n: grain_bytes(n) for n in range(3)})
    struct.pack_into("<Q", image, 3 * SECTOR, GRAIN)
    files = Files(image)
    disk = files.run(open_disk("d", len(image)))
    assert files.read(disk, SIZE, SIZE) == grain_bytes(1)
    with pytest.raises(CorruptImage, match="its marker says that it is of sector 8, not 0"):
        files.read(disk, 0, 1)


def test_zeroed_grains_hide_the_parent(tmp_path: Path) -> None:
    grains = {0: None, 1: 1, 2: None, 5: 1, 6: 1, 7: None}
    image = hosted(10 * GRAIN, grains, version=2, flags=7)
    (tmp_path / "disk.vmdk").write_bytes(image)
    check(tmp_path / "disk.vmdk", random.Random(1))
    more = 'parentCID=00000007\nparentFileNameHint="base.vmdk"'
    image = hosted(10 * GRAIN, grains, version=2, flags=7, more=more)
    files = Files(image)
    disk = files.run(open_disk("d", len(image)))
    assert disk.backing is not None
    assert (disk.backing.name, disk.backing.wanted_ids) == ("base.vmdk", ("00000007",))
    kinds = [
        next(files.run(disk.map(n * SIZE, 1)).between(n * SIZE, n * SIZE + 1)).kind
        for n in range(10)
    ]
    nothing, zero, data = Kind.BELOW, Kind.ZERO, Kind.DATA
    assert kinds == [data, zero, data, nothing, nothing, zero, zero, data, nothing, nothing]


def test_one_is_a_sector_where_the_flag_is_missing() -> None:
    image = hosted(2 * GRAIN, {0: 1, 1: None}, flags=3)
    with pytest.raises(CorruptImage, match="the grain of byte 0 is in the place of the descriptor"):
        read_all(image)


def test_grains_that_begin_at_their_own_size(tmp_path: Path) -> None:
    """A hole and the first grain differ by as much as two grains do."""
    image = hosted(6 * GRAIN, {1: None, 2: None, 4: None})
    entries = struct.unpack_from("<6I", image, 6 * SECTOR)
    assert entries[:3] == (0, GRAIN, 2 * GRAIN)
    (tmp_path / "disk.vmdk").write_bytes(image)
    check(tmp_path / "disk.vmdk", random.Random(1))


class TestRedundantDirectory:
    """Two tables, both directories as they should be; then the first one is damaged."""

    GRAINS = (3, 4, 100, GTES + 1, 2 * GTES - 1)
    GD, GT = 6 * SECTOR, 7 * SECTOR

    def image(self, flags: int = 3) -> bytearray:
        return hosted(2 * GTES * GRAIN, dict.fromkeys(self.GRAINS), flags=flags)

    def test_is_not_read_without_need(self) -> None:
        image = self.image()
        struct.pack_into("<2I", image, 3 * SECTOR, 1 << 31, 1 << 31)
        assert read_all(image) == read_all(self.image())

    @pytest.mark.parametrize("entry", [0, 1 << 31, 0xFFFFFFFF])
    @pytest.mark.parametrize("which", [0, 1])
    def test_instead_of_a_directory_entry(self, entry: int, which: int) -> None:
        image = self.image()
        struct.pack_into("<I", image, self.GD + 4 * which, entry)
        assert read_all(image) == read_all(self.image())

    def test_instead_of_a_directory_that_is_not_in_the_file(self) -> None:
        image = self.image()
        struct.pack_into("<Q", image, 56, 1 << 40)
        assert read_all(image) == read_all(self.image())

    def test_only_where_the_flag_says_that_it_is_there(self) -> None:
        image = self.image(flags=1)
        struct.pack_into("<I", image, self.GD + 4, 1 << 31)
        files = Files(image)
        disk = files.run(open_disk("d", len(image)))
        assert files.read(disk, 0, GTES * SIZE) == read_all(self.image())[: GTES * SIZE]
        with pytest.raises(CorruptImage, match="grain directory entry 0x80000000 says byte"):
            files.read(disk, GTES * SIZE, 1)

    def test_both_damaged(self) -> None:
        image = self.image()
        for place in (3, 6):
            struct.pack_into("<I", image, place * SECTOR, 1 << 31)
        files = Files(image)
        disk = files.run(open_disk("d", len(image)))
        assert files.read(disk, GTES * SIZE, SIZE) == bytes(SIZE)
        with pytest.raises(CorruptImage, match="d: grain directory entry 0x80000000"):
            files.read(disk, GTES * SIZE - 1, 1)


def test_extents_of_all_kinds(tmp_path: Path) -> None:
    """As qemu has it, but for ZERO and RDONLY, which it leaves out."""
    flat = random.Random(1).randbytes(20 * SECTOR)
    (tmp_path / "x-flat.vmdk").write_bytes(flat)
    sparse = hosted(4 * GRAIN, {1: None}, descriptorOffset=0)
    (tmp_path / "x-s001.vmdk").write_bytes(sparse)
    (tmp_path / "x-delta.vmdk").write_bytes(cowd(9, [2, 3]))
    (tmp_path / "x-sesparse.vmdk").write_bytes(sesparse(16, {1: None}))
    lines = [
        'RW 5 FLAT "x-flat.vmdk" 3',
        f'RW {4 * GRAIN} SPARSE "x-s001.vmdk"',
        'RW 9 VMFSSPARSE "x-delta.vmdk"',
        'RW 16 SESPARSE "x-sesparse.vmdk"',
        'RW 20 VMFS "x-flat.vmdk"',
        'RW 1 FLAT "x-flat.vmdk" 19',
    ]
    path = tmp_path / "x.vmdk"
    path.write_bytes(text("vmfs", *lines).replace(b"\n", b"\r\n"))
    files, disk = opened(path)
    whole = files.read(disk, 0, disk.size)
    assert whole == qemu.raw(path, "vmdk")
    assert len(files.opened) == 5
    path.write_bytes(
        text("custom", "RW 7 ZERO", *lines, "NOACCESS 2 ZERO", lines[0].replace("RW", "RDONLY"))
    )
    files, disk = opened(path)
    expected = bytes(7 * SECTOR) + whole + bytes(2 * SECTOR) + whole[: 5 * SECTOR]
    assert files.read(disk, 0, disk.size) == expected
    for at in range(0, disk.size, SECTOR):
        assert files.read(disk, at, 1) == expected[at : at + 1]


def test_a_part_is_larger_than_the_descriptor_says() -> None:
    """Its capacity was rounded up to whole grains."""
    extents = (f'RW {GRAIN + 3} SPARSE "a"', f'RW {GRAIN} SPARSE "b"')
    part = hosted(2 * GRAIN, {0: None, 1: None})
    whole = read_all(text("twoGbMaxExtentSparse", *extents), {"a": part, "b": part})
    assert whole == grain_bytes(0) + grain_bytes(1, 3 * SECTOR) + grain_bytes(0)


def test_a_descriptor_inside_of_an_extent_that_lists_others(tmp_path: Path) -> None:
    (tmp_path / "x-flat.vmdk").write_bytes(b"\1" * 4096)
    image = hosted(0, {})
    image[SECTOR : 3 * SECTOR] = text("monolithicFlat", 'RW 8 FLAT "x-flat.vmdk" 0').ljust(
        1024, b"\0"
    )
    assert read_all(image, {"x-flat.vmdk": b"\1" * 4096}) == b"\1" * 4096
    assert read_all(hosted(0, {})) == b""


def test_a_flat_file_that_is_too_short() -> None:
    descriptor = text("monolithicFlat", 'RW 8 FLAT "f" 0', "RW 2 ZERO")
    for length in (4096, 4095, 3585):  # within the last sector
        assert read_all(descriptor, {"f": b"\1" * length}) == b"\1" * length + bytes(5120 - length)
    files = Files(descriptor, {"f": b"\1" * 3584})
    disk = files.run(open_disk("d", len(descriptor)))
    assert files.read(disk, 0, 3584) == b"\1" * 3584
    assert files.read(disk, 4096, 1024) == bytes(1024)
    with pytest.raises(CorruptImage, match=r"d: extent 'f': the file ends at 3584, before 4096"):
        files.read(disk, 3584, 1)


@pytest.mark.parametrize("cut", [1, SIZE, 2 * SIZE])
def test_a_file_that_is_cut_off_is_damaged_only_there(cut: int) -> None:
    image = hosted(8 * GRAIN, dict.fromkeys([6, 0, 1, 3]))[:-cut]
    files = Files(image)
    disk = files.run(open_disk("d", len(image)))
    lost = [3, 1][: -(-cut // SIZE)]
    for number in range(8):
        if number in lost:
            with pytest.raises(CorruptImage, match=f"the grain of byte {number * SIZE} is at "):
                files.read(disk, number * SIZE, 1)
        else:
            expected = grain_bytes(number) if number in (6, 0, 1, 3) else bytes(SIZE)
            assert files.read(disk, number * SIZE, SIZE) == expected


def test_a_file_that_ends_in_its_tables() -> None:
    image = hosted(3 * GTES * GRAIN, dict.fromkeys([0, GTES - 1, GTES]), flags=1)
    del image[9 * SECTOR + 4 :]  # the primary tables are at 8, 9 and 10
    files = Files(image)
    disk = files.run(open_disk("d", len(image)))
    assert files.read(disk, SIZE, SIZE) == bytes(SIZE)
    for number, problem in [
        (0, "past the end"),
        (GTES + 1, "ends in the grain table"),
        (2 * GTES, "entry 0xa"),
    ]:
        with pytest.raises(CorruptImage, match=problem):
            files.read(disk, number * SIZE, 1)
