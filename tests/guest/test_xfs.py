"""Free space of xfs that mkfs made and the kernel filled, against xfs_db."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest

from imgfs.guest.space import Filesystem
from imgfs.guest.xfs import look
from tests.drive import Bytes, Files, size_of
from tests.guest.mounted import (
    LONG,
    checksums,
    fragment,
    in_order,
    joined,
    mounted,
    run,
    runs,
    zero_free,
)

MiB = 1 << 20


def seen(image: Bytes) -> Filesystem:
    found = Files(image).run(look(0, size_of(image)))
    in_order(found)
    return found


def free_of_xfs_db(image: Path) -> list[tuple[int, int]]:
    """Without the free lists, which its freesp counts as free."""
    fields = run("xfs_db", "-r", "-c", "sb 0", "-c", "p blocksize agblocks agcount", image)
    block, per_group, groups = (int(value) for value in re.findall(r"= (\d+)", fields))
    kept = set()
    for number in range(groups):
        agf = run("xfs_db", "-r", "-c", f"agf {number}", "-c", "p flfirst flcount", image)
        first, count = (int(value) for value in re.findall(r"= (\d+)", agf))
        listed = run("xfs_db", "-r", "-c", f"agfl {number}", "-c", "p bno", image)
        entries = re.findall(r"\d+:(\w+)", listed)
        kept |= {(number, int(entries[(first + i) % len(entries)])) for i in range(count)}
    rows = re.findall(
        r"^ +(\d+) +(\d+) +(\d+)$", run("xfs_db", "-r", "-c", "freesp -d", image), re.M
    )
    found = []
    for row in rows:
        number, at, length = (int(value) for value in row)
        if (number, at) not in kept:
            start = (number * per_group + at) * block
            found.append((start, start + length * block))
    return joined(iter(found))


def made(image: Path, size: int, *options: object) -> Path:
    with image.open("wb") as file:
        file.truncate(size)
    run("mkfs.xfs", "-q", *options, image)
    return image


def random_image(image: Path, rng: random.Random, seed: int) -> Path:
    """Blocks may be larger than the kernel's pages."""
    block = (1024, 65536, 4096, 2048)[seed] if seed < 4 else 1 << rng.randint(10, 16)
    sector = rng.choice([each for each in (512, 1024, 4096) if each <= block])
    features = [f"rmapbt={rng.randrange(2)}", f"reflink={rng.randrange(2)}"]
    finobt = rng.randrange(2)
    features += [f"finobt={finobt}", f"inobtcount={finobt}", f"bigtime={rng.randrange(2)}"]
    options = ["-b", f"size={block}", "-s", f"size={sector}", "-m", ",".join(features)]
    groups = rng.randint(2, 4)
    return made(image, 320 * MiB, *options, "-d", f"agcount={groups}", "-L", f"seed {seed}")


@pytest.mark.parametrize("seed", range(40 if LONG else 4))
def test_filled_and_emptied(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    image = random_image(tmp_path / "disk", rng, seed)
    with mounted(image) as point:
        fragment(point, rng, 60 * MiB)
        kept = checksums(point)
        run("sync", "-f", point)
        shutil.copy(image, tmp_path / "crashed")
    assert seen(tmp_path / "crashed").left_whole
    found = seen(image)
    assert (runs(found.free), found.left_whole) == (free_of_xfs_db(image), "")
    assert found.label == f"seed {seed}"
    zero_free(image, found)
    run("xfs_repair", "-n", image)
    with mounted(image) as point:
        assert checksums(point) == kept


@pytest.mark.parametrize(("block", "holes", "levels"), [(1024, 12_000, 3), (4096, 3000, 2)])
def test_scattered(block: int, holes: int, levels: int, tmp_path: Path) -> None:
    """Btrees of several levels."""
    image = made(tmp_path / "disk", 320 * MiB, "-b", f"size={block}", "-d", "agcount=2")
    with mounted(image) as point:
        run("fallocate", "-l", 2 * holes * block, point / "file")
        commands = [f"fpunch {2 * hole * block} {block}" for hole in range(holes)]
        run("xfs_io", point / "file", text="\n".join(commands))
    depths = [run("xfs_db", "-r", "-c", f"agf {n}", "-c", "p bnolevel", image) for n in range(2)]
    assert max(int(depth.split()[-1]) for depth in depths) == levels
    found = seen(image)
    assert (runs(found.free), found.left_whole) == (free_of_xfs_db(image), "")
    assert len(found.free) > holes
