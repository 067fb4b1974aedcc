"""VMDKs that contradict themselves: refused, at once and with little memory."""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable

import pytest

from imgfs.errors import CorruptImage, ImgfsError, UnsupportedFeature
from imgfs.formats.codecs import decode
from imgfs.formats.disk import Disk
from imgfs.formats.vmdk import open_disk
from imgfs.pieces import Coded
from tests.drive import Bytes, Files, pread
from tests.formats.vmdk_images import (
    AT_END,
    GRAIN,
    GTES,
    SECTOR,
    cowd,
    grain_bytes,
    header,
    hosted,
    sesparse,
    stream,
    text,
)

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
U32, U64 = "<I", "<Q"


def opened(image: bytes, others: dict[str, Bytes] | None = None) -> tuple[Files, Disk]:
    files = Files(image, others)
    return files, files.run(open_disk("disk.vmdk", len(image)))


def hosted_image() -> bytearray:
    return hosted(2 * GTES * GRAIN, {0: None, 9: None, GTES: None})


def stream_image() -> bytearray:
    return stream(2 * GTES * GRAIN, {n: grain_bytes(n) for n in (0, 9, GTES)})


HOSTED_FIELDS: dict[str, tuple[int, str, list[int]]] = {
    "version": (4, U32, [0, 4, 0xFFFFFFFF]),
    "flags": (8, U32, [1 << 3, 1 << 16, 1 << 31, 0x20003 | 1 << 18]),
    "capacity": (12, U64, [1 << 40, 1 << 55, 0xFFFFFFFFFFFFFFFF]),
    "grainSize": (20, U64, [0, 3, 1 << 22, 1 << 63]),
    "descriptor": (28, U64, [0, 1 << 30, 1 << 63]),
    "descriptorSize": (36, U64, [1 << 20, 1 << 63]),
    "numGTEsPerGT": (44, U32, [0, 1, 100, 1024, 0xFFFFFFFF]),
    "newlines": (73, "<I", [0x0A0A0A0A]),
    "compressAlgorithm": (77, "<H", [1, 2, 0xFFFF]),
}


@pytest.mark.parametrize("field", HOSTED_FIELDS)
def test_fields_of_a_hosted_extent(field: str) -> None:
    offset, code, values = HOSTED_FIELDS[field]
    for value in values:
        image = hosted_image()
        struct.pack_into(code, image, offset, value)
        with pytest.raises((CorruptImage, UnsupportedFeature), match=f"^disk.vmdk: .*{field}"):
            opened(image)


@pytest.mark.parametrize("place", [0, 1 << 40, (1 << 64) - 2])
def test_a_grain_directory_that_is_not_there(place: int) -> None:
    image = hosted(GRAIN, {0: None}, flags=1)
    struct.pack_into(U64, image, 56, place)
    with pytest.raises(CorruptImage, match=f"gdOffset {place} "):
        opened(image)


def test_a_directory_that_is_its_own_table() -> None:
    image = hosted(GTES * GRAIN, {0: None}, flags=1)
    (gd,) = struct.unpack_from(U64, image, 56)
    struct.pack_into(U32, image, gd * SECTOR, gd)
    files, disk = opened(image)
    with pytest.raises(CorruptImage, match="place of the grain directory"):
        read_everything(files, disk)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_stream_without_its_footer(at: int) -> None:
    image = stream_image()
    place = len(image) - (3 - at) * SECTOR
    image[place + 8 : place + 16] = b"\x05" * 8
    if at == 1:
        image[place : place + 4] = b"XXXX"
    with pytest.raises(CorruptImage, match="there is no footer"):
        opened(image)
    with pytest.raises(CorruptImage, match="there is no footer"):
        opened(stream_image()[:-SECTOR])
    with pytest.raises(CorruptImage, match="there is no footer"):
        opened(header(GRAIN, gdOffset=AT_END))


COWD_FIELDS = {
    "version": (4, [0, 2, 0xFFFFFFFF]),
    "capacity": (12, [0, 1]),
    "grainSize": (16, [0, 3, 1 << 22, 0xFFFFFFFF]),
    "gdOffset": (20, [0, 1 << 20, 0xFFFFFFFF]),
    "numGDEntries": (24, [0]),
}


@pytest.mark.parametrize("field", COWD_FIELDS)
def test_fields_of_a_cowd_extent(field: str) -> None:
    offset, values = COWD_FIELDS[field]
    descriptor = text("vmfsSparse", 'RW 9 VMFSSPARSE "x"')
    for value in values:
        image = cowd(9, [2])
        struct.pack_into(U32, image, offset, value)
        with pytest.raises((CorruptImage, UnsupportedFeature), match=f"extent 'x': .*{field}"):
            opened(descriptor, {"x": image})


SESPARSE_FIELDS = {
    "magic": (0, [0]),
    "version": (8, [0, 0x200000002]),
    "capacity": (16, [0, 15, 1 << 55]),
    "grain_size": (24, [0, 16]),
    "grain_table_size": (32, [0, 128]),
    "flags": (40, [1]),
    "reserved1": (48, [1]),
    "reserved4": (72, [1]),
    "volatile_header_offset": (80, [0, 1 << 40, AT_END]),
    "grain_dir_offset": (128, [0, 1 << 40, AT_END]),
    "grain_dir_size": (136, [0]),
    "unknown fields": (208, [1]),
    "volatile header": (512, [0]),
    "replay_journal": (512 + 24, [1]),
}


@pytest.mark.parametrize("field", SESPARSE_FIELDS)
def test_fields_of_an_se_sparse_extent(field: str) -> None:
    offset, values = SESPARSE_FIELDS[field]
    descriptor = text("seSparse", 'RW 16 SESPARSE "x"')
    for value in values:
        image = sesparse(16, {0: None})
        struct.pack_into(U64, image, offset, value)
        with pytest.raises((CorruptImage, UnsupportedFeature), match=f"extent 'x': .*{field}"):
            opened(descriptor, {"x": image})


@pytest.mark.parametrize("entry", [1, 1 << 59, 4 << 60, 0xFFFFFFFFFFFFFFFF, 3 << 60 | 1 << 40])
def test_entries_of_an_se_sparse_extent(entry: int) -> None:
    descriptor = text("seSparse", 'RW 32 SESPARSE "x"')
    image = sesparse(32, {0: None, 1: entry, 2: 1 << 60})
    files, disk = opened(descriptor, {"x": image})
    assert files.read(disk, 0, 4096) == grain_bytes(0, 4096)
    assert files.read(disk, 8192, 8192) == bytes(8192)
    with pytest.raises(CorruptImage, match="extent 'x': "):
        files.read(disk, 4096, 1)
    struct.pack_into(U64, image, 1024, entry)
    files, disk = opened(descriptor, {"x": image})
    with pytest.raises(CorruptImage, match="extent 'x': grain directory entry"):
        files.read(disk, 0, 1)


def test_parts_alone_say_what_to_open() -> None:
    alone = [
        hosted(GRAIN, {}, descriptorOffset=0),
        header(GRAIN).ljust(4096, b"\0"),
        cowd(9, [2]),
        sesparse(16, {}),
    ]
    for image in alone:
        with pytest.raises(ImgfsError, match=r"open the \.vmdk"):
            opened(bytes(image))


def test_extents_that_are_not_what_the_descriptor_says() -> None:
    small = hosted(GRAIN, {0: None})
    for line, image, match in [
        ('RW 8 SPARSE "x"', b"", "magic b''"),
        ('RW 8 SPARSE "x"', b"text" * 999, "magic b'text'"),
        ('RW 9 SPARSE "x"', bytes(small), "capacity 8 sectors .* less than the 9"),
        ('RW 8 SPARSE "x"', bytes(small[:30]), "ends in its header"),
        ('RW 8 SPARSE "x"', b"COWD", "ends in its header"),
        ('RW 8 SPARSE "x"', bytes(hosted(0, {})), "capacity 0"),
        ('RW 8 SESPARSE "x"', bytes(small), "magic 0x1564d444b"),
        ('RW 8 SESPARSE "x"', b"x", "ends in its header"),
    ]:
        with pytest.raises(CorruptImage, match=f"disk.vmdk: extent 'x': .*{match}"):
            opened(text("twoGbMaxExtentSparse", line), {"x": image})


def test_descriptors_of_no_disk() -> None:
    for content, match in [
        (b"", "no createType"),
        (text("monolithicFlat"), "lists no extents"),
        (text("monolithicFlat", "RW 0 ZERO"), "lists no extents"),
        (text("monolithicFlat", *[f"RW {1 << 53} ZERO"] * 2), "absurdly large"),
        (text("vmfs").ljust((1 << 20) + 1), "too large for a descriptor"),
    ]:
        with pytest.raises(CorruptImage, match=f"^disk.vmdk: .*{match}"):
            opened(content)


def test_a_descriptor_that_lists_itself() -> None:
    content = text("twoGbMaxExtentSparse", 'RW 8 SPARSE "disk.vmdk"')
    with pytest.raises(CorruptImage, match="is not of a sparse extent"):
        opened(content, {"disk.vmdk": content})


def test_a_grain_that_is_a_bomb() -> None:
    image = stream(GRAIN, {0: bytes(4 << 20)})
    files, disk = opened(image)
    assert files.read(disk, 0, disk.size) == bytes(disk.size)
    image = stream(GRAIN, {0: b""}, grainSize=4096)
    with pytest.raises(UnsupportedFeature, match="grainSize 4096"):
        opened(image)


@pytest.mark.parametrize("tables", [1, 4096])
def test_many_entries_of_one_grain(tables: int) -> None:
    """All tables are one, and all its entries one grain: that is told soon."""
    image = hosted(tables * GTES * GRAIN, {0: None}, flags=1)
    (gd,) = struct.unpack_from(U64, image, 56)
    (grains,) = struct.unpack_from(U64, image, 64)
    first = gd + -(-tables * 4 // SECTOR)
    struct.pack_into(f"<{tables}I", image, gd * SECTOR, *[first] * tables)
    struct.pack_into(f"<{GTES}I", image, first * SECTOR, *[grains] * GTES)
    files, disk = opened(image)
    began = time.process_time()
    what = "table of grain directory entry" if tables > 1 else "grain of byte"
    with pytest.raises(CorruptImage, match=rf"the {what} \d+ .*and the {what}"):
        files.run(disk.map(0, disk.size))
    assert time.process_time() - began < 3


def read_everything(files: Files, disk: Disk) -> None:
    """All pieces, and what they are of, but for data that is only passed on."""
    at = 0
    while at < disk.size:
        pieces = files.run(disk.map(at, min(disk.size - at, 1 << 30)))
        for piece in pieces.between(at, pieces.end):
            if isinstance(piece.detail, Coded):
                coded = pread(files.opened[piece.file], piece.offset, piece.detail.length)
                detail = piece.detail
                decode(detail.codec, coded, detail.unit, "disk.vmdk", sector=detail.sector)
        at = pieces.end


DESCRIBED = {
    "cowd": (text("vmfsSparse", 'RW 9000 VMFSSPARSE "x"'), cowd(9000, [2, 5000])),
    "sesparse": (text("seSparse", 'RW 64 SESPARSE "x"'), sesparse(64, {0: None, 5: 1 << 60})),
}
MAKERS: dict[str, Callable[[], bytearray]] = {"hosted": hosted_image, "stream": stream_image}


@pytest.mark.parametrize("kind", [*MAKERS, *DESCRIBED])
def test_mutations_are_errors_of_ours_or_disks(kind: str) -> None:
    rng = random.Random(1)
    whole = MAKERS[kind]() if kind in MAKERS else DESCRIBED[kind][1]
    for _ in range(50_000 if LONG else 150):
        image = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            low, high = rng.choice([(0, 80), (0, 256), (512, 1024), (1024, 4096), (0, len(image))])
            at = rng.randrange(low, min(high, len(image)))
            image[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        if rng.random() < 0.2:
            del image[rng.randrange(len(image)) :]
        began = time.process_time()
        try:
            if kind in MAKERS:
                read_everything(*opened(image))
            else:
                read_everything(*opened(DESCRIBED[kind][0], {"x": image}))
        except ImgfsError as exc:
            assert str(exc).startswith("disk.vmdk: ")
        assert time.process_time() - began < 1
