"""Whatever qemu writes, alone or in a chain: bytes, and what is zero, as qemu has it."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from imgfs.config.options import parse_options
from imgfs.extents import ExtentList
from imgfs.opener.disks import open_disk
from tests.formats import qemu

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
SEEDS = range(300 if LONG else 12)
MIB = 1 << 20


@dataclass(frozen=True)
class Kind:
    """A format as qemu calls it, and how a file of it may be made."""

    format: str
    options: tuple[str, ...]
    writable: bool = True  #: by qemu-io
    has_backing: bool = False


KINDS = {
    "raw": Kind("raw", ("",)),
    "qcow2": Kind(
        "qcow2",
        (
            "cluster_size=512",
            "cluster_size=4k,refcount_bits=1",
            "cluster_size=64k,lazy_refcounts=on",
            "cluster_size=2M",
            "compat=0.10,cluster_size=1k",
            "extended_l2=on,cluster_size=16k",
            "extended_l2=on,cluster_size=64k,compression_type=zstd",
            "compression_type=zstd",
        ),
        has_backing=True,
    ),
    "vmdk": Kind("vmdk", ("", "zeroed_grain=on", "compat6"), has_backing=True),
    "vmdk-flat": Kind("vmdk", ("subformat=monolithicFlat", "subformat=twoGbMaxExtentFlat")),
    "vmdk-parts": Kind("vmdk", ("subformat=twoGbMaxExtentSparse",)),
    "vmdk-stream": Kind("vmdk", ("subformat=streamOptimized",), writable=False),
    "vdi": Kind("vdi", ("", "static=on")),
    "vhd": Kind("vpc", ("force_size=on", "subformat=fixed,force_size=on", "")),
    "vhdx": Kind("vhdx", ("block_size=1M", "block_size=8M", "subformat=fixed", "log_size=2M")),
    "qed": Kind("qed", ("cluster_size=4k", ""), has_backing=True),
    "qcow": Kind("qcow", ("",), has_backing=True),
    "parallels": Kind("parallels", ("", "cluster_size=64k")),
}
OVER = [
    name for name, kind in KINDS.items() if kind.has_backing and kind.format in ("qcow2", "vmdk")
]


def make(
    rng: random.Random, name: str, path: Path, size: int, below: tuple[str, Path] | None
) -> None:
    kind, options = KINDS[name], rng.choice(KINDS[name].options)
    words = ["create", "-q", "-f", kind.format, *(["-o", options] if options else [])]
    if below is not None:
        words += ["-b", below[1].name, "-F", KINDS[below[0]].format]
    commands = qemu.scribble(rng, size, rng.randint(0, 9))
    for _ in range(rng.randint(0, 3)):
        start = rng.randrange(0, size, 65536)
        commands.append(f"write -z {start} {min(rng.randint(1, 9) * 65536, size - start)}")
    if not kind.writable:
        raw = path.with_suffix(".source")
        qemu.img("create", "-q", "-f", "raw", raw, str(size))
        qemu.io(raw, "raw", *commands)
        qemu.img("convert", "-f", "raw", "-O", kind.format, "-o", options, raw, path)
        return
    qemu.img(*words, path, str(size))
    if kind.format == "vmdk" and below is not None:  # qemu's vmdk cannot write such zeroes
        commands = [each for each in commands if "-z" not in each]
    if kind.format == "qcow2" and "compat" not in options:
        cluster = rng.randrange(size // (4 * MIB) + 1) * 4 * MIB
        commands.insert(0, f"write -c -P 77 {cluster} {min(2 * MIB, size - cluster) or 512}")
    qemu.io(path, kind.format, *commands)


def zero_ranges(extents: ExtentList) -> list[tuple[int, int]]:
    return [(start, end) for start, end in extents.hole_ranges(extents.start, extents.end)]


def qemu_zeroes(path: Path, format: str) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for each in json.loads(qemu.img("map", "--output=json", "-f", format, path)):
        start, end = each["start"], each["start"] + each["length"]
        if each["zero"] and found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        elif each["zero"]:
            found.append((start, end))
    return found


def check(path: Path, wanted: bytes, rng: random.Random, *options: str) -> list[tuple[int, int]]:
    """Where our view says that there are zeroes; its bytes are these."""

    async def main() -> list[tuple[int, int]]:
        async with open_disk(str(path), parse_options(options)) as (_, chain):
            disk = chain.disk
            assert disk.size == len(wanted)
            assert bytes(await disk.read(0, disk.size)) == wanted
            for _ in range(8):
                start = rng.randrange(disk.size)
                length = rng.randint(1, min(MIB, disk.size - start))
                assert bytes(await disk.read(start, length)) == wanted[start : start + length]
            return zero_ranges(await disk.extents(0, disk.size))

    return trio.run(main)


@pytest.mark.timeout(3600 if LONG else 120)
@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_and_zeroes(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    names = list(KINDS)
    below: tuple[str, Path] | None = None
    for depth in range(rng.choice((1, 1, 2, 3))):
        # Each kind has its turn at the bottom.
        name = names[seed % len(names)] if not depth else rng.choice(OVER)
        if below is not None and name == "vmdk" and KINDS[below[0]].format != "vmdk":
            name = "qcow2"  # a vmdk stands on a vmdk only
        path = tmp_path / f"disk{depth}.{KINDS[name].format}"
        make(rng, name, path, rng.randint(1, 24 * MIB // 512) * 512, below)
        below = name, path
    assert below is not None
    name, path = below
    format = KINDS[name].format
    zeroes = check(path, qemu.raw(path, format), rng, f"format={format}")
    theirs = qemu_zeroes(path, format)
    kinds = {each.suffix for each in tmp_path.iterdir()}
    if not kinds & {".vpc", ".vhdx"}:  # there qemu does not look for the holes of the file
        assert zeroes == theirs
    for start, end in theirs:  # and never more than we do
        assert any(a <= start and end <= b for a, b in zeroes), (start, end)


@pytest.mark.parametrize("seed", range(60 if LONG else 3))
def test_snapshots_inside(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path, size = tmp_path / "disk.qcow2", rng.randint(1, 16 * MIB // 512) * 512
    make(rng, "raw", tmp_path / "base.raw", size, None)
    make(rng, "qcow2", path, size, ("raw", tmp_path / "base.raw"))
    for number in range(3):
        qemu.img("snapshot", "-c", f"snap{number}", path)
        qemu.io(path, "qcow2", *qemu.scribble(rng, size, 4))
    for number in range(3):
        out = tmp_path / "out"
        qemu.img("convert", "-f", "qcow2", "-l", f"snap{number}", "-O", "raw", path, out)
        check(path, out.read_bytes(), rng, f"snapshot=snap{number}")
    check(path, qemu.raw(path, "qcow2"), rng)
