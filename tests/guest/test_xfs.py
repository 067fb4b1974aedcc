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


@pytest.mark.parametrize("seed", range(40 if LONG else 4))
def test_filled_and_emptied(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(320 * MiB)
    run("mkfs.xfs", "-q", "-d", f"agcount={rng.randint(2, 4)}", "-m", f"rmapbt={seed % 2}", image)
    with mounted(image) as point:
        fragment(point, rng, 60 * MiB)
        kept = checksums(point)
        run("sync", "-f", point)
        shutil.copy(image, tmp_path / "crashed")
    assert seen(tmp_path / "crashed").left_whole
    found = seen(image)
    assert (runs(found.free), found.left_whole) == (free_of_xfs_db(image), "")
    zero_free(image, found)
    run("xfs_repair", "-n", image)
    with mounted(image) as point:
        assert checksums(point) == kept
