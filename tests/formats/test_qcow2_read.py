"""qcow2 files that qemu has written, against what qemu reads from them and where."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from imgfs.formats import qcow2_tables as t
from imgfs.formats.qcow2 import MOST_PIECES, SLICE, Qcow2Disk, open_disk
from imgfs.pieces import Kind
from tests.drive import Files
from tests.formats import qemu

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
SEEDS = 400 if LONG else 24


@dataclass
class Image:
    path: Path
    options: list[str]
    size: int
    backing: Path | None = None


def random_options(rng: random.Random) -> tuple[int, list[str]]:
    """(size of a cluster, options for qemu-img create)"""
    if rng.random() < 0.15:
        bits = rng.choice([9, 10, 12, 16, 21])
        return 1 << bits, [f"cluster_size={1 << bits}", "compat=0.10"]
    extended = rng.random() < 0.4
    bits = rng.randint(14 if extended else 9, 21)
    options = [f"cluster_size={1 << bits}"]
    if extended:
        options.append("extended_l2=on")
    options.append(f"refcount_bits={rng.choice([1, 2, 4, 8, 16, 32, 64])}")
    options.append(f"compression_type={rng.choice(['zlib', 'zstd'])}")
    if rng.random() < 0.2 and "refcount_bits=1" not in options:
        options.append("lazy_refcounts=on")
    return 1 << bits, options


def random_writes(rng: random.Random, image: Image, cluster: int) -> list[str]:
    size, options = image.size, ",".join(image.options)
    commands = []
    if "data_file" not in options and "preallocation" not in options:
        # Only into clusters that are free, or qemu refuses.
        clusters = -(-size // cluster)
        for index in rng.sample(range(clusters), min(clusters, rng.randint(0, 5))):
            length = min(cluster, size - index * cluster)
            commands.append(f"write -c -P {index % 255 + 1} {index * cluster} {length}")
    for number in range(rng.randint(1, 12)):
        unit = rng.choice([512, 512, 4096, cluster])
        length = min(rng.randint(1, 20) * unit, size)
        offset = rng.randrange(0, size - length + 1, 512)
        how = rng.choice(["write -P", "write -P", "write -P", "zero", "discard"])
        if how == "write -P":
            commands.append(f"write -P {number + 1} {offset} {length}")
        elif how == "discard":
            commands.append(f"discard {offset} {length}")
        elif "compat" not in options:
            commands.append(f"write -z {rng.choice(['', '-u'])} {offset} {length}")
    return commands


def random_image(rng: random.Random, directory: Path) -> Image:
    cluster, options = random_options(rng)
    version = 2 if "compat=0.10" in options else 3
    size = rng.choice([1, 3, 40, 200]) * max(cluster // 4, 512) + 512 * rng.randint(0, 9)
    size = min(size, 8 << 20)
    image = Image(directory / "disk.qcow2", options, size)
    create: list[str | Path] = ["create", "-q", "-f", "qcow2"]
    if rng.random() < 0.3:
        image.backing = directory / "base.raw"
        image.backing.write_bytes(rng.randbytes(rng.randint(1, 2 * size // 512) * 512))
        create += ["-b", image.backing, "-F", "raw"]
    elif rng.random() < 0.3:
        options.append(f"preallocation={rng.choice(['metadata', 'falloc', 'full'])}")
    elif version == 3 and rng.random() < 0.3:
        options += [f"data_file={directory / 'data'}", f"data_file_raw={rng.choice(['on', 'off'])}"]
    qemu.img(*create, "-o", ",".join(options), image.path, str(size))
    qemu.io(image.path, "qcow2", *random_writes(rng, image, cluster))
    return image


def opened(image: Image) -> tuple[Files, Qcow2Disk]:
    data = image.path.with_name("data")
    files = Files(image.path, {str(data): data} if data.exists() else {})
    return files, files.run(open_disk(image.path.name, image.path.stat().st_size))


def joined(
    runs: Iterator[tuple[int, int, str, int | None]],
) -> list[tuple[int, int, str, int | None]]:
    """Runs that continue each other as one."""
    found: list[tuple[int, int, str, int | None]] = []
    for start, end, kind, at in runs:
        if found and found[-1][2] == kind != "coded":
            before = found[-1]
            if at is None or before[3] == at - (start - before[0]):
                found[-1] = (before[0], end, kind, before[3])
                continue
        found.append((start, end, kind, at))
    return found


def our_map(files: Files, disk: Qcow2Disk) -> list[tuple[int, int, str, int | None]]:
    def runs() -> Iterator[tuple[int, int, str, int | None]]:
        at = 0
        while at < disk.size:
            pieces = files.run(disk.map(at, disk.size - at))
            assert pieces.start <= at < pieces.end
            for piece in pieces.between(at, pieces.end):
                offset = piece.offset if piece.kind == Kind.DATA else None
                yield piece.start, piece.end, piece.kind.name.lower(), offset
            at = pieces.end

    return joined(run if run[2] != "coded" else (*run[:2], "data", None) for run in runs())


def qemu_map(image: Image) -> list[tuple[int, int, str, int | None]]:
    def runs() -> Iterator[tuple[int, int, str, int | None]]:
        listed = json.loads(qemu.img("map", "--output=json", "-f", "qcow2", image.path))
        for entry in listed:
            start, end = entry["start"], entry["start"] + entry["length"]
            if image.backing and (entry["depth"] or not entry["present"]):
                yield start, end, "below", None
            elif entry["data"]:
                yield start, end, "data", entry.get("offset")
            else:
                yield start, end, "zero", None

    return joined(runs())


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_images(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    image = random_image(rng, tmp_path)
    files, disk = opened(image)
    wanted = qemu.raw(image.path, "qcow2")
    assert disk.size == len(wanted), image
    below = None
    if image.backing is not None:
        assert disk.backing is not None
        assert (disk.backing.name, disk.backing.format) == (str(image.backing), "raw")
        base = image.backing.read_bytes().ljust(disk.size, b"\0")
        below = lambda offset, length: base[offset : offset + length]  # noqa: E731
    assert files.read(disk, 0, disk.size, below) == wanted, image
    for _ in range(20):
        offset = rng.randrange(disk.size)
        length = rng.randint(1, min(disk.size - offset, 3 << 16))
        assert files.read(disk, offset, length, below) == wanted[offset : offset + length], image
    assert our_map(files, disk) == qemu_map(image), image


def test_all_compressed(tmp_path: Path) -> None:
    rng = random.Random(1)
    source = tmp_path / "source.raw"
    source.write_bytes(b"".join(rng.randbytes(3000) + bytes([i]) * 9000 for i in range(200)))
    for kind, cluster in (("zlib", 512), ("zlib", 65536), ("zstd", 4096), ("zstd", 2 << 20)):
        path = tmp_path / "disk.qcow2"
        options = f"compression_type={kind},cluster_size={cluster}"
        qemu.img("convert", "-f", "raw", "-O", "qcow2", "-c", "-o", options, source, path)
        files = Files(path)
        disk = files.run(open_disk("disk.qcow2", path.stat().st_size))
        pieces = files.run(disk.map(0, disk.size))
        assert Kind.CODED in {piece.kind for piece in pieces}
        assert files.read(disk, 0, disk.size) == qemu.raw(path, "qcow2")
        assert files.read(disk, 70000, 5) == qemu.raw(path, "qcow2")[70000:70005]


def test_a_disk_of_no_bytes(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", path, "0")
    assert Files(path).run(open_disk("disk.qcow2", path.stat().st_size)).size == 0


def test_many_terabytes_open_in_few_reads(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    size = 16 << 40
    qemu.img("create", "-q", "-f", "qcow2", path, str(size))
    rng = random.Random(2)
    places = sorted(rng.randrange(size >> 16) << 16 for _ in range(1000 if LONG else 50))
    qemu.io(path, "qcow2", *(f"write -P 7 {place} 64k" for place in places))
    files = Files(path)
    disk = files.run(open_disk("disk.qcow2", path.stat().st_size))
    assert files.read(disk, places[5], 100) == b"\7" * 100
    assert files.reads <= 4
    assert files.bytes_read < 512 << 10
    found = [start for start, _, kind, _ in our_map(files, disk) if kind == "data"]
    assert found == places


def test_l1_tables_too_long_to_be_kept(tmp_path: Path) -> None:
    """With clusters of 512 bytes this one has 4 MiB."""
    path = tmp_path / "disk.qcow2"
    size = 16 << 30
    qemu.img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, str(size))
    places = [0, 5 << 30, size - 512]
    qemu.io(path, "qcow2", *(f"write -P 7 {place} 512" for place in places))
    files = Files(path)
    disk = files.run(open_disk("disk.qcow2", path.stat().st_size))
    assert files.reads == 1
    for place in places:
        assert files.read(disk, place, 512) == b"\7" * 512
    assert [run[0] for run in our_map(files, disk) if run[2] == "data"] == places


@pytest.mark.parametrize("bitmap", [None, 0x5555_5555])
def test_scattered_tables_are_mapped_in_steps(bitmap: int | None) -> None:
    """Full tables of which no entry continues the one before: as many pieces as there can be."""
    cluster, tables = 65536, 20 if bitmap is None else 2
    entries = tables * cluster // (8 if bitmap is None else 16)
    hosts = [(index * 7 % entries + 100) * cluster for index in range(entries)]
    l1 = b"".join(t.ENTRY.pack((3 + i) * cluster) for i in range(tables))
    header = t.HEADER_V2.pack(
        *(t.MAGIC, 3, 0, 0, 16, entries * cluster, 0, tables, 2 * cluster, cluster, 1, 0, 0)
    ) + t.HEADER_V3.pack(0 if bitmap is None else t.Incompatible.EXTENDED_L2, 0, 0, 4, 104)
    rest = b"" if bitmap is None else t.ENTRY.pack(bitmap)
    content = (header.ljust(2 * cluster, b"\0") + l1).ljust(3 * cluster, b"\0")
    content += b"".join(t.ENTRY.pack(host) + rest for host in hosts)
    files = Files(content)
    disk = files.run(open_disk("disk.qcow2", (entries + 100) * cluster))
    at = steps = 0
    while at < disk.size:
        pieces = files.run(disk.map(at, disk.size - at))
        assert len(pieces) <= MOST_PIECES + SLICE // 2
        if at == 0:
            assert pieces.end < disk.size
        for piece in pieces.between(at, pieces.end):
            if piece.kind == Kind.DATA:
                assert piece.offset == hosts[piece.start // cluster] + piece.start % cluster
        at, steps = pieces.end, steps + 1
    assert steps > entries // MOST_PIECES
