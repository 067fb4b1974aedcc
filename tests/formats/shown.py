"""Files that layouts make, written out, and disks to make them of."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

from imgfs.extents import ExtentList, from_data_ranges
from imgfs.formats.layout import About, Layout
from imgfs.pieces import Kind
from tests.drive import Files, pread

ABOUT = About("disk.vmdk", "stat:1:2:3", 1_700_000_000)
WINDOW = 3 << 20  # bytes that are mapped at once: of no format's units a multiple


def make_disk(path: Path, size: int, ranges: list[tuple[int, int]], seed: int = 0) -> ExtentList:
    """A raw disk with random bytes in these ranges, and its extents."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        for start, end in ranges:
            file.seek(start)
            file.write(rng.randbytes(end - start))
        file.truncate(size)
    return from_data_ranges(iter(ranges), size)


def random_ranges(rng: random.Random, size: int, count: int) -> list[tuple[int, int]]:
    """Ascending and apart."""
    cuts = sorted(rng.sample(range(size + 1), min(2 * count, size // 2 * 2)))
    return [(a, b) for a, b in zip(cuts[0::2], cuts[1::2], strict=True) if a < b]


def windows(layout: Layout) -> Iterator[tuple[int, int]]:
    for offset in range(0, layout.size, WINDOW):
        yield offset, min(WINDOW, layout.size - offset)


def materialise(layout: Layout, disk: Path, out: Path) -> None:
    """The file that the layout says, sparse."""
    files = Files(disk)
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.ftruncate(fd, layout.size)
        for offset, length in windows(layout):
            pieces = layout.map(offset, length)
            assert (pieces.start, pieces.end) == (offset, offset + length)
            for piece in pieces:
                assert piece.kind != Kind.LITERAL or piece.end - piece.start <= 1 << 20
                if piece.kind != Kind.ZERO:
                    length = piece.end - piece.start
                    os.pwrite(fd, files.content(pieces, piece.start, length), piece.start)
    finally:
        os.close(fd)


def check_random_access(layout: Layout, disk: Path, out: Path, rng: random.Random) -> None:
    """What any range says is what the materialised file holds there."""
    files = Files(disk)
    for _ in range(60):
        length = rng.choice([1, 2, 7, 512, 4096, 70_000])
        offset = rng.randrange(layout.size)
        length = min(length, layout.size - offset)
        found = files.content(layout.map(offset, length), offset, length)
        assert found == pread(out, offset, length), (offset, length)
