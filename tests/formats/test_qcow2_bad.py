"""qcow2 files that lie: each field absurd, each structure cut, and bytes changed at random."""

from __future__ import annotations

import os
import random
import resource
import struct
import time

import pytest

from imgfs.errors import CorruptImage, ImgfsError, UnsupportedFeature
from imgfs.formats import qcow2_tables as t
from imgfs.formats.qcow2 import Qcow2Disk, open_disk
from tests.drive import Files
from tests.formats import qemu

MUTATIONS = 100_000 if os.environ.get("IMGFS_TEST_LONG") else 2000
CLUSTER = 512
SIZE = 100_000


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """With data, zeroes, compressed clusters and a backing file."""
    path = tmp_path_factory.mktemp("qcow2") / "disk.qcow2"
    options = f"cluster_size={CLUSTER}"
    command = ["create", "-q", "-f", "qcow2", "-o", options, "-b", "base", "-F", "raw"]
    (path.parent / "base").write_bytes(b"b" * SIZE)
    qemu.img(*command, path, str(SIZE))
    qemu.io(path, "qcow2", "write -P 1 0 20k", "write -z 10k 5k", "write -P 3 70k 10k")
    qemu.io(path, "qcow2", *(f"write -c -P {i} {(60 + i) * CLUSTER} {CLUSTER}" for i in range(8)))
    return path.read_bytes()


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("qcow2") / "disk.qcow2"
    options = "extended_l2=on,cluster_size=16k,compression_type=zstd"
    qemu.img("create", "-q", "-f", "qcow2", "-o", options, path, "1M")
    qemu.io(path, "qcow2", "write -P 1 0 20k", "write -z 10k 5k", "write -P 3 70k 100k")
    qemu.io(path, "qcow2", "write -c -P 9 512k 16k")
    qemu.img("snapshot", "-c", "snap", path)
    return path.read_bytes()


def read_all(content: bytes, snapshot: str | None = None) -> Qcow2Disk:
    """Every byte that can be read, in not too many steps; broken ranges are passed over."""
    files = Files(content)
    disk = files.run(open_disk("disk.qcow2", len(content), snapshot))
    disk.facts()
    at = 0
    for _ in range(100):
        if at >= disk.size:
            break
        try:
            pieces = files.run(disk.map(at, disk.size - at))
            end = min(pieces.end, at + (1 << 20))
            files.content(pieces, at, end - at)
            at = pieces.end
        except ImgfsError:
            at += 16384
    return disk


def with_field(content: bytes, field: str, value: int) -> bytes:
    width = 8 if field in WIDE else 1 if field == "compression_type" else 4
    at = t.FIELD_OFFSETS[field]
    value &= (1 << 8 * width) - 1
    return content[:at] + value.to_bytes(width, "big") + content[at + width :]


WIDE = [
    "backing_file_offset",
    "size",
    "l1_table_offset",
    "refcount_table_offset",
    "snapshots_offset",
    "incompatible_features",
]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("magic", 0, CorruptImage),
        ("version", 0, UnsupportedFeature),
        ("version", 4, UnsupportedFeature),
        ("backing_file_offset", CLUSTER + 1, CorruptImage),
        ("backing_file_offset", -1, CorruptImage),
        ("backing_file_size", 1024, CorruptImage),
        ("backing_file_size", -1, CorruptImage),
        ("cluster_bits", 8, CorruptImage),
        ("cluster_bits", 22, CorruptImage),
        ("cluster_bits", -1, CorruptImage),
        ("size", -1, CorruptImage),
        ("size", 1 << 62, CorruptImage),
        ("crypt_method", -1, UnsupportedFeature),
        ("l1_size", 0, CorruptImage),
        ("l1_size", (32 << 20) // 8 + 1, CorruptImage),
        ("l1_size", -1, CorruptImage),
        ("l1_table_offset", 1, CorruptImage),
        ("l1_table_offset", -512, CorruptImage),
        ("refcount_table_offset", 1, CorruptImage),
        ("refcount_table_offset", -512, CorruptImage),
        ("refcount_table_clusters", 0, CorruptImage),
        ("refcount_table_clusters", -1, CorruptImage),
        ("nb_snapshots", 1, CorruptImage),
        ("nb_snapshots", 65537, CorruptImage),
        ("nb_snapshots", -1, CorruptImage),
        ("incompatible_features", -1, UnsupportedFeature),
        ("incompatible_features", 1 << 2, UnsupportedFeature),
        ("incompatible_features", 1 << 3, CorruptImage),
        ("incompatible_features", 1 << 4, CorruptImage),
        ("refcount_order", 7, CorruptImage),
        ("refcount_order", -1, CorruptImage),
        ("header_length", 103, CorruptImage),
        ("header_length", -1, CorruptImage),
        ("compression_type", 1, CorruptImage),
        ("compression_type", 2, UnsupportedFeature),
    ],
)
def test_absurd_fields(good: bytes, field: str, value: int, error: type[ImgfsError]) -> None:
    bad = with_field(good, field, value)
    if field == "nb_snapshots":
        bad = with_field(bad, "snapshots_offset", len(good) // CLUSTER * CLUSTER + CLUSTER)
    with pytest.raises(error, match=r"^disk\.qcow2: [^\n]+$"):
        read_all(bad)


def test_every_field_of_any_value(good: bytes) -> None:
    for field in t.FIELD_OFFSETS:
        for value in (0, 1, 511, 512, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 40, 1 << 63, -1):
            attempt(with_field(good, field, value))


def test_cut_at_each_structure(good: bytes, extended: bytes) -> None:
    for content in (good, extended):
        (l1,) = struct.unpack_from(">Q", content, 40)
        (snapshots,) = struct.unpack_from(">Q", content, 64)
        l2 = struct.unpack_from(">Q", content, l1)[0] & t.ENTRY_OFFSET
        for at in (0, 3, 71, 72, 103, 104, 200, l1, l1 + 4, l1 + 8, l2, l2 + 9, snapshots + 9):
            attempt(content[:at])
    for at in (0, 3, 71, 103):
        with pytest.raises(CorruptImage, match="is it cut"):
            read_all(good[:at])


def test_a_cut_l1_table_leaves_what_is_before(good: bytes) -> None:
    (l1,) = struct.unpack_from(">Q", good, 40)
    coverage = CLUSTER // 8 * CLUSTER
    moved = with_field(good, "l1_table_offset", -(-len(good) // CLUSTER) * CLUSTER)
    moved = moved.ljust(-(-len(good) // CLUSTER) * CLUSTER, b"\0") + good[l1 : l1 + 12]
    files = Files(moved)
    disk = files.run(open_disk("disk.qcow2", len(moved)))
    assert files.read(disk, 0, 10240) == b"\1" * 10240
    assert files.run(disk.map(0, disk.size)).end == coverage
    with pytest.raises(CorruptImage, match=r"L1 entry 1 at byte \d+ is past the end"):
        files.run(disk.map(coverage, 1))


def test_tables_that_are_one_another(good: bytes) -> None:
    """The L1 table is its own L2 table, and those of every entry."""
    (l1_size,) = struct.unpack_from(">I", good, 36)
    (l1,) = struct.unpack_from(">Q", good, 40)
    bad = good[:l1] + struct.pack(">Q", l1) * l1_size + good[l1 + 8 * l1_size :]
    with pytest.raises(CorruptImage, match="the L2 table of L1 entry 0 is in the place of the L1"):
        read_all(bad)


def test_a_snapshot_table_without_end(good: bytes) -> None:
    """Many entries of names of 64 KiB: more of a table than is ever read."""
    at = -(-len(good) // CLUSTER) * CLUSTER
    entry = t.SNAPSHOT.pack(CLUSTER, 1, 0xFFFF, 0xFFFF, 0, 0, 0, 0, 0)
    bad = with_field(with_field(good, "snapshots_offset", at), "nb_snapshots", 65536)
    bad = bad.ljust(at, b"\0") + entry.ljust(131112, b"x") * 200
    with pytest.raises(UnsupportedFeature, match=r"snapshot table at byte \d+ has more than"):
        read_all(bad)
    with pytest.raises(CorruptImage, match="extra_data_size of snapshot 0"):
        read_all(bad[: at + 36] + b"\xff" * 4 + bad[at + 40 :])


def attempt(content: bytes, snapshot: str | None = None) -> None:
    """Nothing but our own errors comes out, and soon."""
    start = time.process_time()
    try:
        read_all(content, snapshot)
    except ImgfsError as exc:
        assert "\n" not in str(exc)
    assert time.process_time() - start < 5  # of up to a hundred steps; each takes far less


def test_mutations(good: bytes, extended: bytes) -> None:
    rng = random.Random(5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(MUTATIONS):
        content = bytearray(rng.choice([good, extended]))
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(112) if rng.random() < 0.5 else rng.randrange(len(content) - 8)
            width = rng.choice([1, 1, 2, 4, 8])
            change = rng.choice([bytes(width), b"\xff" * width, rng.randbytes(width)])
            content[at : at + width] = change
        if rng.random() < 0.1:
            del content[rng.randrange(len(content)) :]
        attempt(bytes(content), rng.choice([None, "snap"]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
