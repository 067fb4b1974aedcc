"""VHD read: what qemu makes, differencing disks made by hand, and what is wrong with others."""

from __future__ import annotations

import json
import random
import struct
import uuid
from pathlib import Path

import pytest

from imgfs.errors import CorruptImage, UnsupportedFeature
from imgfs.formats import vhd_tables as vt
from imgfs.formats.vhd import VhdDisk, open_disk
from imgfs.pieces import Kind
from tests.drive import Bytes, Files, size_of
from tests.formats import mutate, qemu

MIB = 1 << 20
SIZE = 10 * MIB + 7 * 512
PARENT_ID = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")


def opened(file: Bytes) -> tuple[Files, VhdDisk]:
    files = Files(file)
    return files, files.run(open_disk("a.vhd", size_of(file)))


def kinds(files: Files, disk: VhdDisk) -> list[tuple[int, int, Kind]]:
    """The disk's ranges by kind, joined."""
    found: list[tuple[int, int, Kind]] = []
    at = 0
    while at < disk.size:
        pieces = files.run(disk.map(at, disk.size - at))
        for piece in pieces.between(at, pieces.end):
            if found and found[-1][2] == piece.kind:
                found[-1] = (found[-1][0], piece.end, piece.kind)
            else:
                found.append((piece.start, piece.end, piece.kind))
        at = pieces.end
    return found


@pytest.mark.parametrize("seed", range(8))
def test_what_qemu_makes(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "a.vhd"
    size = rng.randint(1, 80 * MIB // 512) * 512
    subformat, force = rng.choice(("dynamic", "dynamic", "fixed")), rng.choice(("on", "off"))
    options = f"subformat={subformat},force_size={force}"
    qemu.img("create", "-q", "-f", "vpc", "-o", options, path, str(size))
    qemu.io(path, "vpc", *qemu.scribble(rng, size, rng.randint(0, 12)))
    files, disk = opened(path)
    assert files.reads == 1
    assert (
        disk.size
        == json.loads(qemu.img("info", "--output=json", "-f", "vpc", path))["virtual-size"]
    )
    wanted = qemu.raw(path, "vpc")
    assert files.read(disk, 0, disk.size) == wanted
    for _ in range(20):
        offset = rng.randrange(disk.size)
        length = rng.randint(1, min(3 * MIB, disk.size - offset))
        assert files.read(disk, offset, length) == wanted[offset : offset + length]
    data = [(a, b) for a, b, kind in kinds(files, disk) if kind == Kind.DATA]
    if subformat == "dynamic":
        assert data == qemu.data_ranges(path, "vpc")
    else:
        assert data == [(0, disk.size)]
    assert ("subformat", subformat) in disk.facts()


def make_footer(
    size: int = SIZE,
    disk_type: int = vt.FIXED,
    creator: bytes = b"win ",
    geometry: tuple[int, int, int] = (100, 16, 10),
    unique_id: bytes = b"i" * 16,
    version: int = vt.VERSION,
    data_offset: int = 512,
) -> bytes:
    fields = (vt.COOKIE, vt.FEATURES, version, data_offset, 0, creator, 0, b"Wi2k", size, size)
    return vt.Footer(*fields, *geometry, disk_type, 0, unique_id, 0).pack()


CREATORS = [b"vpc ", b"qemu", b"qem2", b"win ", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0", b"vbox"]


@pytest.mark.parametrize("creator", [*CREATORS, b"SIMH", b"dutl", b"tap ", b"\0\0\0\0"])
@pytest.mark.parametrize("geometry", [(100, 16, 10), (65535, 16, 255), (21, 16, 255)])
def test_the_size_by_creator(
    tmp_path: Path, creator: bytes, geometry: tuple[int, int, int]
) -> None:
    path = tmp_path / "a.vhd"
    path.write_bytes(bytes(SIZE) + make_footer(creator=creator, geometry=geometry))
    # Which of the two sizes qemu takes by itself depends on its version.
    rule = "chs" if creator in (b"vpc ", b"qemu") else "current_size"
    options = f"driver=vpc,file.filename={path},force_size_calc={rule}"
    info = json.loads(qemu.img("info", "--output=json", "--image-opts", options))
    assert opened(path)[1].size == info["virtual-size"]


def test_a_footer_of_511_bytes() -> None:
    content = random.Random(1).randbytes(SIZE)
    files, disk = opened(content + make_footer()[:511])
    assert disk.size == SIZE
    assert files.read(disk, 0, SIZE) == content


def test_a_guest_cannot_make_its_fixed_disk_another() -> None:
    planted = make_footer(4 * MIB, vt.DIFFERENCING)
    files, disk = opened(planted.ljust(SIZE, b"x") + make_footer())
    assert (disk.size, disk.backing) == (SIZE, None)
    assert files.read(disk, 0, 512) == planted


def test_the_copy_of_a_damaged_footer(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    qemu.img("create", "-q", "-f", "vpc", path, "9M")
    qemu.io(path, "vpc", "write -P 7 5M 70k")
    whole = path.read_bytes()
    wanted = qemu.raw(path, "vpc")
    for broken in (whole[:-512], whole[:-512] + bytes(512), whole[:-1] + b"\1", whole[:-300]):
        files, disk = opened(broken)
        assert files.read(disk, 0, disk.size) == wanted


def test_it_says_what_it_is() -> None:
    _, disk = opened(bytes(SIZE) + make_footer(unique_id=PARENT_ID.bytes))
    assert disk.own_id == str(PARENT_ID)
    assert ("creator application", "win") in disk.facts()


class Differencing:
    """A differencing disk, put together from what its blocks say."""

    def __init__(self, size: int, block_size: int, names: dict[bytes, bytes], plain: str) -> None:
        self.size, self.block_size = size, block_size
        self.entries = -(-size // block_size)
        self.table_at = 512 + 1024 + 1024
        self.table = [vt.NOT_ALLOCATED] * self.entries
        end = -(-(self.table_at + 4 * self.entries) // 512) * 512
        locators = b""
        self.body = bytearray(end)
        for code, text in names.items():
            locators += vt.Locator(code, 512, len(text), len(self.body)).pack()
            self.body += text.ljust(-(-len(text) // 512) * 512, b"\0")
        self.fields = (b"cxsparse", vt.NO_OFFSET, self.table_at, vt.VERSION, self.entries)
        self.fields += (block_size, 0, PARENT_ID.bytes, 0, plain.encode("utf-16-be"), locators)

    def add(self, block: int, present: set[int], content: bytes) -> None:
        self.table[block] = len(self.body) // 512
        bits = [0] * (vt.bitmap_size(self.block_size))
        for sector in present:
            bits[sector // 8] |= 0x80 >> sector % 8
        self.body += bytes(bits) + content

    def file(self, **changes: int) -> bytes:
        footer = make_footer(self.size, vt.DIFFERENCING)
        head = footer + vt.Header(*self.fields)._replace(**changes).pack()
        self.body[: len(head)] = head
        struct.pack_into(f">{self.entries}I", self.body, self.table_at, *self.table)
        return bytes(self.body) + footer


NAMES = {
    b"W2ku": "C:\\vm\\parent.vhd".encode("utf-16-le"),
    b"W2ru": ".\\parent.vhd".encode("utf-16-le"),
}


@pytest.mark.parametrize("seed", range(6))
def test_a_differencing_disk(seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice((512, 4096, 65536, 2 * MIB))
    size = rng.randint(1, min(9 * block_size, 4 * MIB) // 512) * 512
    below, wanted = rng.randbytes(size), bytearray()
    made = Differencing(size, block_size, NAMES, "parent.vhd")
    sectors = block_size // 512
    present: set[int] = set()
    for block in rng.sample(range(made.entries), made.entries):
        if rng.random() < 0.3:
            continue
        some = rng.choice(
            (set(), set(range(sectors)), {s for s in range(sectors) if rng.random() < 0.5})
        )
        made.add(block, some, rng.randbytes(block_size))
        present |= {block * sectors + s for s in some if block * sectors + s < size // 512}
    file = made.file()
    for sector in range(size // 512):
        block, inside = divmod(sector, sectors)
        at = made.table[block] * 512 + vt.bitmap_size(block_size) + inside * 512
        source, at = (file, at) if sector in present else (below, sector * 512)
        wanted += source[at : at + 512]
    files, disk = opened(file)
    assert disk.backing is not None
    assert files.read(disk, 0, size, lambda at, length: below[at : at + length]) == wanted
    data = {s for a, b, kind in kinds(files, disk) if kind == Kind.DATA for s in range(a, b, 512)}
    assert data == {sector * 512 for sector in present}
    for _ in range(20):
        offset = rng.randrange(size)
        length = rng.randint(1, size - offset)
        found = files.read(disk, offset, length, lambda at, length: below[at : at + length])
        assert found == wanted[offset : offset + length]


UTF16 = "utf-16-le"
PARENTS: list[tuple[dict[bytes, bytes], str, str]] = [
    (NAMES, "x.vhd", "parent.vhd"),
    ({b"W2ru": "..\\a\\b.vhd".encode(UTF16)}, "x.vhd", "../a/b.vhd"),
    ({b"W2ru": "sub\\b.vhd\0\0".encode(UTF16)}, "x.vhd", "sub/b.vhd"),
    ({b"W2ku": "C:\\vm\\parent.vhd".encode(UTF16)}, "x.vhd", "parent.vhd"),
    ({b"W2ku": "\\\\server\\share\\ü.vhd".encode(UTF16)}, "x.vhd", "ü.vhd"),
    ({b"MacX": b"file:///x.vhd"}, "y.vhd", "y.vhd"),
    ({}, "y.vhd", "y.vhd"),
    ({}, "D:\\z\\y.vhd", "y.vhd"),
]


@pytest.mark.parametrize(("names", "plain", "wanted"), PARENTS)
def test_the_parents_name(names: dict[bytes, bytes], plain: str, wanted: str) -> None:
    files, disk = opened(Differencing(MIB, MIB, names, plain).file())
    assert disk.backing is not None
    assert (disk.backing.name, disk.backing.format) == (wanted, "vpc")
    assert disk.backing.wanted_ids == (str(PARENT_ID),)
    assert files.reads <= 2


def test_other_names_of_the_parent() -> None:
    """Each once, the relative ones first, then the last components, where images were gathered."""
    names = {b"W2ku": "C:\\vm\\p.vhd".encode(UTF16), b"W2ru": "..\\base\\q.vhd".encode(UTF16)}
    _, disk = opened(Differencing(MIB, MIB, names, "r.vhd").file())
    assert disk.backing is not None
    assert disk.backing.name == "../base/q.vhd"
    assert disk.backing.other_names == ("p.vhd", "r.vhd", "q.vhd")


BROKEN_HEADERS: list[tuple[dict[str, int], str]] = [
    ({"block_size": 0}, "block size 0 at offset 544"),
    ({"block_size": 256}, "block size 256"),
    ({"block_size": 3 * MIB}, "block size 3145728"),
    ({"max_table_entries": 0}, "max table entries 0 at offset 540"),
    ({"max_table_entries": 4}, "max table entries 4"),
    ({"table_offset": vt.NO_OFFSET}, "table offset 18446744073709551615 at offset 528"),
    ({"header_version": 0x20000}, "header version 0x20000 at offset 536"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN_HEADERS)
def test_a_broken_header(changes: dict[str, int], message: str) -> None:
    made = Differencing(5 * MIB, MIB, NAMES, "x")
    with pytest.raises((CorruptImage, UnsupportedFeature), match=message):
        opened(made.file(**changes))


BROKEN_FOOTERS: list[tuple[bytes, str]] = [
    (make_footer(disk_type=0), "disk type 0 at offset"),
    (make_footer(disk_type=5), "disk type 5 at offset"),
    (make_footer(version=0x20000), "file format version 0x20000"),
    (make_footer(size=(2040 << 30) + 512), "more than 2040 GiB"),
    (make_footer(size=2**64 - 1), "more than 2040 GiB"),
    (make_footer(disk_type=vt.DYNAMIC, data_offset=1 << 40), "data offset 1099511627776"),
    (make_footer(disk_type=vt.DYNAMIC, data_offset=2**64 - 1), "data offset"),
    (make_footer(disk_type=vt.DYNAMIC), "no dynamic disk header at offset 512"),
    (bytes(512), "no VHD footer with a correct checksum"),
    (make_footer()[:-1] + b"\1", "no VHD footer with a correct checksum"),
]


@pytest.mark.parametrize(("footer", "message"), BROKEN_FOOTERS)
def test_a_broken_footer(footer: bytes, message: str) -> None:
    with pytest.raises((CorruptImage, UnsupportedFeature), match=message):
        opened(bytes(8192) + footer)


@pytest.mark.parametrize("content", [b"", b"conectix", bytes(511)])
def test_no_vhd(content: bytes) -> None:
    with pytest.raises(CorruptImage, match=r"^a\.vhd: no VHD footer"):
        opened(content)


def test_a_missing_end_of_a_fixed_disk() -> None:
    content = random.Random(2).randbytes(SIZE // 2)
    files, disk = opened(content + make_footer())
    assert files.read(disk, 0, len(content)) == content
    with pytest.raises(CorruptImage, match="is truncated"):
        files.run(disk.map(len(content), 1))


def test_a_header_with_a_wrong_checksum() -> None:
    file = bytearray(Differencing(5 * MIB, MIB, NAMES, "x").file())
    file[512 + 900] ^= 1
    with pytest.raises(CorruptImage, match=r"header checksum 0x.* at offset 548 is not 0x"):
        opened(bytes(file))


def test_an_absurd_parent_locator() -> None:
    made = Differencing(MIB, MIB, NAMES, "x")
    for length in (0, 1 << 31):
        locator = vt.Locator(b"W2ru", 0, length, 512).pack()
        made.fields = (*made.fields[:-1], locator)
        with pytest.raises(CorruptImage, match=f"platform data length {length}"):
            opened(made.file())
    made.fields = (*made.fields[:-1], vt.Locator(b"W2ru", 0, 9, 2**64 - 9).pack())
    with pytest.raises(CorruptImage, match="platform data offset"):
        opened(made.file())
    made.fields = (*made.fields[:-1], vt.Locator(b"W2ru", 0, 9, 512).pack())
    with pytest.raises(CorruptImage, match="no UTF-16 text"):
        opened(made.file())
    with pytest.raises(CorruptImage, match="names no parent"):
        opened(Differencing(MIB, MIB, {}, "").file())


def test_a_block_past_the_end_spoils_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    qemu.img("create", "-q", "-f", "vpc", "-o", "force_size=on", path, "20M")
    qemu.io(path, "vpc", "write -P 1 0 20M")
    whole = qemu.raw(path, "vpc")
    file = bytearray(path.read_bytes())
    struct.pack_into(">I", file, 1536 + 4 * 4, 1 << 30)
    files, disk = opened(bytes(file))
    assert files.read(disk, 0, 8 * MIB) == whole[: 8 * MIB]
    assert files.read(disk, 10 * MIB, 10 * MIB) == whole[10 * MIB :]
    for offset in (8 * MIB, 10 * MIB - 1):
        with pytest.raises(CorruptImage, match=r"block 4 at sector 1073741824, .* at offset 1552"):
            files.run(disk.map(offset, 1))


def truncations(file: bytes) -> list[int]:
    return [512, 600, 1536, 1540, 2048, 3000, len(file) // 2, len(file) - 513]


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    qemu.img("create", "-q", "-f", "vpc", path, "8M")
    qemu.io(path, "vpc", "write -P 1 1M 6M")
    whole, wanted = path.read_bytes(), qemu.raw(path, "vpc")
    for length in truncations(whole):
        bad = 0
        try:
            files, disk = opened(whole[:length])
        except CorruptImage:
            assert length < 1536
            continue
        for offset in range(0, disk.size, 512 << 10):
            part = min(512 << 10, disk.size - offset)
            try:
                assert files.read(disk, offset, part) == wanted[offset : offset + part]
            except CorruptImage:
                bad += 1
        assert bad


def test_a_table_of_millions() -> None:
    """2040 GiB in blocks of 512 bytes: each step reads little of it."""
    size = 2040 << 30
    header = vt.Header(
        vt.HEADER_COOKIE,
        vt.NO_OFFSET,
        4096,
        vt.VERSION,
        size // 512,
        512,
        0,
        bytes(16),
        0,
        b"",
        b"",
    )
    file = bytearray(make_footer(size, vt.DYNAMIC) + header.pack()).ljust(4096, b"\0")
    file += b"\xff" * (8 << 20)
    files, disk = opened(bytes(file))
    before = files.bytes_read
    pieces = files.run(disk.map(700, size - 700))
    assert files.bytes_read - before <= 128 << 10
    assert pieces.end == 512 * (32 << 10)
    with pytest.raises(CorruptImage, match="the table's entry 2097152 at offset 8392704"):
        files.run(disk.map((2 << 20) * 512, 512))


@pytest.mark.timeout(900)  # of the long run
def test_mutations() -> None:
    rng = random.Random(5)
    made = Differencing(200 * 65536, 65536, NAMES, "x.vhd")
    for block in range(0, 200, 3):
        made.add(block, set(range(0, 128, 2 + block)), bytes(65536))
    file = made.file()

    def repair(changed: bytearray) -> None:
        for at, size, checksum_at in ((0, 512, 64), (512, 1024, 36), (len(file) - 512, 512, 64)):
            part = changed[at : at + size]
            if len(part) == size:
                part[checksum_at : checksum_at + 4] = bytes(4)
                checksum = ~sum(part) & 0xFFFFFFFF
                struct.pack_into(">I", changed, at + checksum_at, checksum)

    places = [(0, 512), (512, 1536), (len(file) - 512, len(file)), (2560, 2560 + 800)]
    mutate.check(open_disk, file, places, rng.randrange(1000), repair)
