"""What a qcow2's header turns on, one by one."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from imgfs.errors import CorruptImage, SnapshotNotFound, UnsupportedFeature
from imgfs.formats.qcow2 import Qcow2Disk, open_disk
from imgfs.pieces import Kind
from tests.drive import Files
from tests.formats import qemu

CLUSTER = 65536


def made(path: Path, *options: str, size: int = 1 << 20) -> Path:
    qemu.img("create", "-q", "-f", "qcow2", *options, path, str(size))
    return path


def patched(path: Path, offset: int, data: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)
    return path


def opened(path: Path, snapshot: str | None = None) -> tuple[Files, Qcow2Disk]:
    files = Files(path)
    return files, files.run(open_disk(path.name, path.stat().st_size, snapshot))


def test_internal_snapshots(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2")
    qemu.io(path, "qcow2", "write -P 1 0 1M")
    qemu.img("snapshot", "-c", "first", path)
    qemu.img("resize", "-q", path, "3M")
    qemu.io(path, "qcow2", "write -P 2 512k 2M")
    qemu.img("snapshot", "-c", "1", path)  # an id is looked for first
    qemu.img("snapshot", "-c", "third", path)
    qemu.io(path, "qcow2", "write -z 0 3M")
    files, disk = opened(path)
    assert [(s.id, s.name, s.size) for s in disk.snapshots] == [
        ("1", "first", 1 << 20),
        ("2", "1", 3 << 20),
        ("3", "third", 3 << 20),
    ]
    assert files.read(disk, 0, disk.size) == bytes(3 << 20)
    assert sum(name == "snapshot" and "'first'" in value for name, value in disk.facts()) == 1
    for wanted in ("first", "1"):
        files, disk = opened(path, wanted)
        assert files.read(disk, 0, disk.size) == b"\1" * (1 << 20)
    files, disk = opened(path, "third")
    out = tmp_path / "third.raw"
    qemu.img("convert", "-l", "third", "-O", "raw", path, out)
    assert files.read(disk, 0, disk.size) == out.read_bytes()
    with pytest.raises(SnapshotNotFound, match=r"disk\.qcow2: no snapshot .*'fourth'.*'first'"):
        opened(path, "fourth")


def test_many_snapshots_are_read_in_parts(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2")
    names = [f"{i}-" + "x" * 200 for i in range(30)]
    for name in names:
        qemu.img("snapshot", "-c", name, path)
    _, disk = opened(path)
    assert [s.name for s in disk.snapshots] == names


def test_backing_of_version_2(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 5000)
    path = made(tmp_path / "disk.qcow2", "-o", "compat=0.10", "-b", str(base), "-F", "raw")
    files, disk = opened(path)
    assert disk.backing is not None
    assert (disk.backing.name, disk.backing.format) == (str(base), "raw")
    assert [p.kind for p in files.run(disk.map(0, disk.size))] == [Kind.BELOW]


def test_backing_without_a_format(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2", "-u", "-b", "nbd://host/x", "-F", "raw")
    content = path.read_bytes()
    at = content.index(struct.pack(">II", 0xE2792ACA, 3))
    _, disk = opened(patched(path, at, struct.pack(">I", 0x12345678)))  # to be ignored
    assert disk.backing is not None
    assert (disk.backing.name, disk.backing.format) == ("nbd://host/x", None)


def test_header_extensions_beyond_the_first_read(tmp_path: Path) -> None:
    """One of 8 KiB that nobody knows stands in front of the backing format and name."""
    path = made(tmp_path / "disk.qcow2", "-u", "-b", "base.raw", "-F", "raw")
    content = path.read_bytes()
    unknown = struct.pack(">II", 0x1234, 8192) + bytes(8192)
    name_at, length = struct.unpack(">QI", content[8:20])
    head = content[:112] + unknown + content[112 : name_at + length]
    patched(patched(path, 0, head), 8, struct.pack(">Q", name_at + len(unknown)))
    assert "backing file: base.raw" in qemu.img("info", path)
    files, disk = opened(path)
    assert disk.backing is not None
    assert (disk.backing.name, disk.backing.format) == ("base.raw", "raw")
    assert files.reads == 4


def test_external_data_file(tmp_path: Path) -> None:
    data = tmp_path / "data"
    path = made(tmp_path / "disk.qcow2", "-o", f"data_file={data},data_file_raw=on")
    qemu.io(path, "qcow2", "write -P 1 0 64k", "write -P 2 512k 1000")
    files = Files(path, {str(data): data})
    disk = files.run(open_disk("disk.qcow2", path.stat().st_size))
    assert files.read(disk, 0, disk.size) == data.read_bytes()
    assert ("data file", f"{str(data)!r} (raw)") in disk.facts()
    pieces = list(files.run(disk.map(0, CLUSTER)))
    assert (pieces[0].kind, pieces[0].file, pieces[0].offset) == (Kind.DATA, 1, 0)
    # An entry whose host offset is not the guest's is broken, as qemu has it.
    (entry_at,) = struct.unpack_from(">Q", path.read_bytes(), 40)
    l2 = struct.unpack_from(">Q", path.read_bytes(), entry_at)[0] & (1 << 56) - 512
    patched(path, l2, struct.pack(">Q", 1 << 63 | CLUSTER))
    files = Files(path, {str(data): data})
    disk = files.run(open_disk("disk.qcow2", path.stat().st_size))
    with pytest.raises(CorruptImage, match=r"external data file it must be the guest's"):
        files.run(disk.map(0, 1))
    assert files.read(disk, 512 << 10, 1000) == b"\2" * 1000


@pytest.mark.parametrize(("bits", "fact"), [(1, "dirty"), (2, "corrupt")])
def test_dirty_and_corrupt_are_read_and_told(bits: int, fact: str, tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2")
    qemu.io(path, "qcow2", "write -P 1 0 1M")
    files, disk = opened(patched(path, 72, struct.pack(">Q", bits)))
    assert fact in dict(disk.facts())
    assert files.read(disk, 0, disk.size) == qemu.raw(path, "qcow2")


def test_unknown_incompatible_features_are_named(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2")
    content = path.read_bytes()
    at = content.index(struct.pack(">I", 0x6803F857)) + 8
    patched(path, at, struct.pack(">BB46s", 0, 9, b"time travel"))
    patched(path, 72, struct.pack(">Q", 1 << 9 | 1 << 40))
    with pytest.raises(
        UnsupportedFeature, match=r"disk\.qcow2: .* at byte 72 .*'time travel', bit 40"
    ):
        opened(path)


def test_features_that_may_be_ignored(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2", "-o", "lazy_refcounts=on")
    qemu.img("bitmap", "--add", path, "b0")
    qemu.io(path, "qcow2", "write -P 1 0 1M")
    unknown = struct.pack(">QQ", 1 << 33 | 1, 1 << 34 | 1)  # compatible, autoclear
    files, disk = opened(patched(path, 80, unknown))
    assert ("lazy refcounts", "yes") in disk.facts()
    assert files.read(disk, 0, disk.size) == b"\1" * (1 << 20)


@pytest.mark.parametrize(("method", "name"), [(1, "AES"), (2, "LUKS"), (3, "method 3")])
def test_encrypted_disks_are_refused(method: int, name: str, tmp_path: Path) -> None:
    path = patched(made(tmp_path / "disk.qcow2"), 32, struct.pack(">I", method))
    with pytest.raises(UnsupportedFeature, match=f"encrypted \\({name}\\)"):
        opened(path)


def test_a_size_that_is_not_of_whole_sectors(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2")
    qemu.io(path, "qcow2", "write -P 1 0 1M")
    files, disk = opened(patched(path, 24, struct.pack(">Q", 100_001)))
    assert files.read(disk, 0, disk.size) == qemu.raw(path, "qcow2")


def test_a_file_that_ends_in_a_cluster(tmp_path: Path) -> None:
    """There it reads as zeroes, as in qemu; what is wholly behind its end is an error."""
    path = made(tmp_path / "disk.qcow2")
    qemu.io(path, "qcow2", "write -P 1 0 1M")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - CLUSTER - 1000)
    files, disk = opened(path)
    readable = disk.size - CLUSTER
    wanted = b"\1" * (readable - 1000) + bytes(1000)
    assert files.read(disk, 0, readable) == wanted == qemu.raw(path, "qcow2")[:readable]
    with pytest.raises(CorruptImage, match=r"for byte 983040 of the disk.* is it cut\?"):
        files.run(disk.map(readable, 1))


def test_a_broken_entry_takes_no_other_with_it(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2")
    qemu.io(path, "qcow2", "write -P 1 0 1M")
    content = path.read_bytes()
    (l1,) = struct.unpack_from(">Q", content, 40)
    l2 = struct.unpack_from(">Q", content, l1)[0] & (1 << 56) - 512
    patched(path, l2 + 8 * 5, struct.pack(">Q", 1 << 63 | 5 * CLUSTER + 512))
    files, disk = opened(path)
    assert files.read(disk, 0, 5 * CLUSTER) == b"\1" * 5 * CLUSTER
    assert files.read(disk, 6 * CLUSTER, 10 * CLUSTER) == b"\1" * 10 * CLUSTER
    for offset in (5 * CLUSTER, 6 * CLUSTER - 1):
        with pytest.raises(CorruptImage, match=f"L2 entry at byte {l2 + 40}, .*not aligned"):
            files.run(disk.map(offset, 1))


def test_zero_flag_in_version_2(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2", "-o", "compat=0.10")
    qemu.io(path, "qcow2", "write -P 1 0 1M")
    content = path.read_bytes()
    (l1,) = struct.unpack_from(">Q", content, 40)
    l2 = struct.unpack_from(">Q", content, l1)[0] & (1 << 56) - 512
    patched(path, l2, struct.pack(">Q", 1))
    files, disk = opened(path)
    with pytest.raises(CorruptImage, match="zero flag"):
        files.run(disk.map(0, 1))


@pytest.mark.parametrize("bitmap", [1 << 32 | 1, (1 << 64) - 1])
def test_impossible_subclusters(bitmap: int, tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2", "-o", "extended_l2=on")
    qemu.io(path, "qcow2", "write -P 1 0 1M")
    content = path.read_bytes()
    (l1,) = struct.unpack_from(">Q", content, 40)
    l2 = struct.unpack_from(">Q", content, l1)[0] & (1 << 56) - 512
    patched(path, l2 + 16 * 3 + 8, struct.pack(">Q", bitmap))
    files, disk = opened(path)
    with pytest.raises(CorruptImage, match=f"at byte {l2 + 48}.* bitmap {bitmap:#x}"):
        files.run(disk.map(3 * CLUSTER, 1))
    assert files.read(disk, 0, 3 * CLUSTER) == b"\1" * 3 * CLUSTER
    assert files.read(disk, 4 * CLUSTER, CLUSTER) == b"\1" * CLUSTER
