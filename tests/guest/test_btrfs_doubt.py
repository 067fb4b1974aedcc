"""btrfs in doubt: flags and fields that cannot be, trees that lie, damage at random."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import pytest

from imgfs.guest.btrfs import look
from imgfs.steps import OpenFile
from tests.drive import Files, pread
from tests.guest.mounted import LONG, in_order, mounted, run, runs
from tests.guest.test_btrfs import made, scatter, seen

MiB = 1 << 20
SB = 64 << 10
MIRROR = 64 << 20
NODE = 4096


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With trees of several levels, and one copy of each."""
    image = made(
        tmp_path_factory.mktemp("btrfs") / "disk", 120 * MiB, "-m", "single", "-n", str(NODE)
    )
    with mounted(image) as point:
        scatter(point, 1500)
    assert seen(image).left_whole == ""
    yield image
    image.unlink()


class Image(bytearray):
    """An image that knows what was changed: (where, what was there)."""

    before: list[tuple[int, bytes]]


@pytest.fixture(scope="module")
def shared(filled: Path) -> Image:
    return Image(filled.read_bytes())


@pytest.fixture
def image(shared: Image) -> Iterator[Image]:
    """What a test changes of it is undone."""
    shared.before = []
    yield shared
    for at, data in reversed(shared.before):
        shared[at : at + len(data)] = data


def put(image: Image, at: int, data: bytes) -> None:
    image.before.append((at, bytes(image[at : at + len(data)])))
    image[at : at + len(data)] = data


def seal(image: Image, at: int) -> None:
    """A right checksum."""
    checksum = google_crc32c.value(bytes(image[at + 32 : at + NODE]))
    put(image, at, struct.pack("<I", checksum))


def le64(value: int) -> bytes:
    return struct.pack("<Q", value)


@pytest.mark.parametrize(
    ("at", "data", "why"),
    [
        (0x00, b"\1\2\3\4", "the superblock's checksum is wrong"),
        (0x30, le64(64 << 20), "says that it is at 67108864"),
        (0x38, le64(0x5), "it had errors: flags are 0x5"),
        (0x38, le64(1 | 1 << 32), "it is a seed"),
        (0x38, le64(1 | 1 << 36), "its uuid is being changed"),
        (0x38, le64(1 | 1 << 50), "flags 0x4000000000001 have bits"),
        (0x40, b"_BHRfS_?", "magic is"),
        (0x48, le64(3), "chunk_root_generation"),
        (0x50, le64(1 << 60), "no chunk has"),
        (0x50, le64(0x123), "inside of a sector"),
        (0x58, le64(1 << 60), "no chunk has"),
        (0x60, le64(30 * MiB), "log_root is 31457280"),
        (0x70, le64(1 << 40), ""),  # what it says of all devices is not used
        (0x78, le64(12345), "bytes_used is 12345, but"),
        (0x88, le64(2), "it has 2 devices"),
        (0x90, b"\0\2\0\0", "sectorsize is 512"),
        (0x94, b"\0\0\2\0", "nodesize is 131072"),
        (0x94, b"\0\x08\0\0", "nodesize is 2048"),
        (0x94, b"\0\x40\0\0", "checksum"),
        (0xA0, b"\xff\xff\0\0", "sys_chunk_array_size is 65535"),
        (0xA0, b"\5\0\0\0", "sys_chunk_array ends"),
        (0xA0, b"\0\0\0\0", "no chunk has"),
        (0xA4, le64(1 << 50), "chunk_root_generation"),
        (0xB4, le64(0x3 | 0x100), "compat_ro_flags 0x103"),
        (0xB4, le64(0xB), "has no block group tree"),
        (0xBC, le64(0x365), "mixed"),
        (0xBC, le64(0x1361), "zones"),
        (0xBC, le64(0x2361), "extent tree v2"),
        (0xBC, le64(0x4361), "RAID stripe tree"),
        (0xBC, le64(0x10361), "simple quotas"),
        (0xBC, le64(0x80000000000361), "incompat_flags 0x80000000000361"),
        (0xBC, le64(0x360), "before 2009"),
        (0xC4, b"\4\0", "csum_type 4"),
        (0xC6, b"\1", "level"),
        (0xC6, b"\xff", "level 255"),
        (0xC7, b"\3", "level"),
        (0xC9, le64(2), "is on device 1, not 2"),
        (0xC9 + 8, le64(121 * MiB), "dev_item.total_bytes is 126877696, and its place"),
        (0xC9 + 8, le64(2 * MiB), "is at byte"),
        (0xC9 + 16, le64(1), "not just that of the superblock"),
        (0xC9 + 66, bytes(16), "is on device 1"),
        (0xC9 + 82, bytes(16), "dev_item.fsid"),
        (0x32B, le64(255), "not that of a chunk"),
        (0x32B + 17, le64(0), "has 0 bytes, which cannot be"),
        (0x32B + 17, le64(8 * MiB), "different chunks"),
        (0x32B + 17 + 24, le64(0x4), "different chunks"),
        (0x32B + 17 + 24, le64(0x12), "neither single nor DUP"),
        (0x32B + 17 + 24, le64(0x22), "has 1 stripes"),
        (0x32B + 17 + 44, b"\xff\xff", "has 65535 stripes"),
        (0x32B + 17 + 56, le64(119 * MiB), "is at byte"),
    ],
)
def test_superblocks(image: Image, at: int, data: bytes, why: str) -> None:
    put(image, SB + at, data)
    if at:
        seal(image, SB)
    found = Files(image).run(look(0, len(image)))
    in_order(found)
    assert why in found.left_whole
    assert bool(found.left_whole) == bool(why)


def test_a_later_mirror(image: Image) -> None:
    """That of another filesystem is none."""
    (generation,) = struct.unpack_from("<Q", image, MIRROR + 0x48)
    put(image, MIRROR + 0x48, le64(generation + 1))
    assert Files(image).run(look(0, len(image))).left_whole == ""  # its checksum is wrong
    seal(image, MIRROR)
    assert "later than the first" in Files(image).run(look(0, len(image))).left_whole
    put(image, MIRROR + 0x20, bytes(16))
    seal(image, MIRROR)
    found = Files(image).run(look(0, len(image)))
    assert found.left_whole == ""
    assert all(end <= MIRROR or start >= MIRROR + 65536 for start, end in runs(found.free))


def test_cut(filled: Path) -> None:
    whole = filled.read_bytes()
    for size in (0, 1, 65536, 65536 + 4095, 65536 + 4096, MiB, 8 * MiB):
        assert Files(whole[:size]).run(look(0, size)).left_whole
        assert size == 0 or Files(whole[:size]).run(look(0, len(whole))).left_whole
    assert "its place has" in Files(whole[:-1]).run(look(0, len(whole) - 1)).left_whole


def blocks_read(image: Image) -> dict[int, list[int]]:
    """Where the blocks of each tree are, by the tree's number, in the order in which it is read."""
    found: dict[int, list[int]] = {}
    steps = look(0, len(image))
    answer: object = None
    while True:
        try:
            need = steps.send(answer)
        except StopIteration:
            return found
        assert not isinstance(need, OpenFile)
        for each in need:
            if each.length == NODE and each.offset >= MiB and each.offset != MIRROR:
                (owner,) = struct.unpack_from("<Q", image, each.offset + 0x58)
                found.setdefault(owner, []).append(each.offset)
        answer = [pread(image, each.offset, each.length) for each in need]


def without_tree(image: Image) -> None:
    """The extent tree has to do."""
    put(image, SB + 0xB4, le64(0x1))
    seal(image, SB)


def test_both_trees_say_the_same(image: Image) -> None:
    found = Files(image).run(look(0, len(image)))
    without_tree(image)
    assert Files(image).run(look(0, len(image))) == found
    assert len(found.free) > 1000


@pytest.mark.parametrize("tree", [1, 2, 3, 4, 10])
@pytest.mark.parametrize(
    ("at", "data", "why"),
    [
        (0x20, bytes(16), "has fsid"),
        (0x30, le64(NODE), f"has bytenr {NODE}"),
        (0x50, le64(0), "has generation 0"),
        (0x50, le64(1 << 40), f"has generation {1 << 40}"),
        (0x58, le64(5), "has owner 5"),
        (0x60, b"\xff\xff\xff\xff", "4294967295 "),
        (0x60, b"\1\1\0\0", "257 "),
        (0x60, bytes(4), ""),
        (0x64, b"\7", "has level 7"),
        (0x65 + 17, b"\xff\xff\xff\xff\xff\xff\xff\x7f", ""),
    ],
)
def test_blocks(image: Image, tree: int, at: int, data: bytes, why: str) -> None:
    """The last that is read of each tree."""
    if tree == 2:
        without_tree(image)
    block = blocks_read(image)[tree][-1]
    put(image, block + at, data)
    assert "the checksum of the block" in Files(image).run(look(0, len(image))).left_whole
    seal(image, block)
    assert why in Files(image).run(look(0, len(image))).left_whole
    assert Files(image).run(look(0, len(image))).left_whole


def items(image: Image, leaf: int) -> list[tuple[int, int, int, int, int, int]]:
    """Where each is, its key, where its data is."""
    (count,) = struct.unpack_from("<I", image, leaf + 0x60)
    assert image[leaf + 0x64] == 0
    found = []
    for number in range(count):
        at = leaf + 0x65 + 25 * number
        objectid, kind, offset, data, length = struct.unpack_from("<QBQII", image, at)
        found.append((at, objectid, kind, offset, leaf + 0x65 + data, length))
    return found


def changed(image: Image, leaf: int, at: int, data: bytes) -> str:
    put(image, at, data)
    seal(image, leaf)
    return Files(image).run(look(0, len(image))).left_whole


def test_free_space_that_is_not(image: Image) -> None:
    """A little more than there is, in an extent and in a bitmap."""
    leaves = [at for at in blocks_read(image)[10] if not image[at + 0x64]]
    seen = set()
    for leaf in leaves:
        for at, objectid, kind, offset, data, length in items(image, leaf):
            if kind in seen:
                continue
            seen.add(kind)
            before = bytes(image[leaf : leaf + NODE])
            if kind == 198:
                (count,) = struct.unpack_from("<I", image, data)
                gone = objectid < 13 * MiB  # those with which mkfs began
                why = changed(image, leaf, data, struct.pack("<I", count + 1))
                assert gone or "extent_count" in why
                seen -= {kind} if gone else set()
            elif kind == 199:
                why = changed(image, leaf, at + 9, le64(offset + 4096))
                assert why or objectid < 13 * MiB
                seen -= set() if why else {kind}
            else:
                assert (kind, length) == (200, 256)
                bits = image[data : data + length]
                byte = next(n for n, value in enumerate(bits) if value != 0xFF)
                assert changed(image, leaf, data + byte, b"\xff")
            put(image, leaf, before)
    assert seen == {198, 199, 200}


def test_extents_that_are_not(image: Image) -> None:
    without_tree(image)
    leaf = next(at for at in blocks_read(image)[2] if not image[at + 0x64])
    for at, _, kind, offset, _, _ in items(image, leaf)[1:]:
        before = bytes(image[leaf : leaf + NODE])
        if kind == 168:
            assert "uses" in changed(image, leaf, at + 9, le64(offset - 4096)) or offset == 4096
            assert "not of whole sectors" in changed(image, leaf, at + 9, le64(offset - 512))
            assert "not in order" in changed(image, leaf, at + 9, le64(1 << 63))
        elif kind == 169:
            assert "uses" in changed(image, leaf, at + 8, b"\0")
        put(image, leaf, before)


def last_leaf(image: Image, tree: int) -> int:
    return [at for at in blocks_read(image)[tree] if not image[at + 0x64]][-1]


def test_what_a_balance_leaves(image: Image) -> None:
    """The tree of relocated data goes by the number before that."""
    leaf = last_leaf(image, 1)
    at = next(at for at, objectid, *_ in items(image, leaf) if objectid == (1 << 64) - 9)
    assert "balance was cut off" in changed(image, leaf, at, le64((1 << 64) - 8))


@pytest.mark.parametrize(("state", "why"), [(0, ""), (1, "replaced"), (2, ""), (4, "replaced")])
def test_replaced_device(image: Image, state: int, why: str) -> None:
    leaf = last_leaf(image, 4)
    at, objectid, kind, _, data, length = items(image, leaf)[0]
    assert (objectid, kind, length) == (0, 249, 40)
    put(image, data + 32, le64(state))
    assert why in changed(image, leaf, at, struct.pack("<QBQ", 0, 250, 0))
    assert bool(why) == bool(Files(image).run(look(0, len(image))).left_whole)


@pytest.mark.parametrize(("kind", "at"), [(204, 24), (204, 16), (216, 8), (228, 0), (228, 56)])
def test_chunks_and_devices_agree(image: Image, kind: int, at: int) -> None:
    """A chunk has another length or place in one of both trees."""
    leaf = last_leaf(image, 4 if kind == 204 else 3)
    data = [item[4] for item in items(image, leaf) if item[2] == kind][-1]
    (value,) = struct.unpack_from("<Q", image, data + at)
    assert changed(image, leaf, data + at, le64(value - 64 * 1024))


@pytest.mark.parametrize("tree", [True, False])
def test_mutations(image: Image, tree: bool) -> None:
    """Never an exception, and never long; half of them with right checksums.  What is still called
    free then is what was."""
    rng = random.Random(tree)
    if not tree:
        without_tree(image)
    places = [SB, *(at for each in blocks_read(image).values() for at in each)]
    truth = Files(image).run(look(0, len(image)))
    assert not truth.left_whole
    doubts = 0
    for _ in range(3000 if LONG else 300):
        block = rng.choice([SB, rng.choice(places)])
        before = bytes(image[block : block + NODE])
        for _ in range(rng.choice([1, 1, 2, 10])):
            at = block + rng.randrange(rng.choice([256, 1024, NODE - 8]))
            width = rng.choice([1, 2, 4, 8])
            value = rng.choice([0, (1 << 64) - 1, 1, 0x80, NODE, rng.getrandbits(64)])
            put(image, at, value.to_bytes(8, "little")[:width])
        if rng.random() < 0.6:
            seal(image, block)
        size = rng.choice([len(image), len(image), 1 << 45])
        began = time.process_time()
        found = Files(image).run(look(0, size))
        assert time.process_time() - began < 1
        in_order(found)
        doubts += bool(found.left_whole)
        assert found.left_whole or found.free == truth.free
        put(image, block, before)
    assert doubts > 50


def test_mixed(tmp_path: Path) -> None:
    found = seen(made(tmp_path / "disk", 120 * MiB, "-M", "-n", "4096"))
    assert "mixed" in found.left_whole


def test_seed(tmp_path: Path) -> None:
    image = made(tmp_path / "disk", 120 * MiB)
    run("btrfstune", "-S", "1", image)
    assert "seed" in seen(image).left_whole


@pytest.mark.parametrize("profile", ["single", "raid0", "raid1"])
def test_two_devices(profile: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        with path.open("wb") as file:
            file.truncate(140 * MiB)
    run("mkfs.btrfs", "-q", "-m", profile, "-d", profile, first, second)
    assert "it has 2 devices" in seen(first).left_whole
    assert "it has 2 devices" in seen(second).left_whole


def test_raid0_of_one_device(tmp_path: Path) -> None:
    found = seen(made(tmp_path / "disk", 300 * MiB, "-d", "raid0", "-m", "single"))
    assert "neither single nor DUP" in found.left_whole
