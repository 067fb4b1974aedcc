"""Generated files, checked: against qemu-img, against our own readers, and piece by piece."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from imgfs.extents import ExtentList, from_data_ranges
from imgfs.formats.disk import Disk
from imgfs.formats.layout import About, Layout
from imgfs.pieces import Kind
from imgfs.steps import Steps
from tests.drive import Files, pread
from tests.formats import qemu

PART = 64 << 20
MOST_LITERAL = 1 << 20

Ranges = list[tuple[int, int]]


def extents_of(ranges: Ranges, size: int) -> ExtentList:
    return from_data_ranges(iter(ranges), size)


def make_raw(path: Path, ranges: Ranges, size: int, seed: int = 0) -> ExtentList:
    """A sparse file with random bytes in the ranges."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for start, end in ranges:
            file.seek(start)
            file.write(rng.randbytes(end - start))
    return extents_of(ranges, size)


def some_ranges(rng: random.Random, size: int, count: int, longest: int) -> Ranges:
    """Up to `count`, apart, not aligned to anything."""
    found: Ranges = []
    at = 0
    for _ in range(count):
        start = at + rng.randint(1, max(1, size // count))
        end = start + rng.randint(1, longest)
        if end > size:
            break
        found.append((start, end))
        at = end
    return found


def write_out(
    layout: Layout, read: Callable[[int, int], bytes], disk_size: int, target: Path
) -> None:
    """The generated file, sparse, checking each piece on the way; `read` gives the disk's bytes."""
    with target.open("wb") as file:
        file.truncate(layout.size)
        for offset in range(0, layout.size, PART):
            length = min(PART, layout.size - offset)
            pieces = layout.map(offset, length)
            assert (pieces.start, pieces.end) == (offset, offset + length)
            for piece in pieces:
                if piece.kind == Kind.ZERO:
                    continue
                if piece.kind == Kind.DATA:
                    end = piece.offset + piece.end - piece.start
                    assert piece.file == 0
                    assert end <= disk_size
                    content = read(piece.offset, piece.end - piece.start)
                else:
                    assert isinstance(piece.detail, bytes)
                    content = piece.detail
                    assert len(content) <= MOST_LITERAL
                os.pwrite(file.fileno(), content, piece.start)


def check(
    make: Callable[[ExtentList, About], Layout],
    open_disk: Callable[[str, int], Steps[Disk]],
    image_format: str,
    raw: Path,
    extents: ExtentList,
    seed: int = 0,
) -> Path:
    """All that must hold of the generated file, which is returned."""
    about = About(f"disk.{image_format}", f"test:{seed}", 1_700_000_000 + seed)
    layout, target = make(extents, about), raw.with_suffix(f".{image_format}")
    write_out(layout, partial(pread, raw), raw.stat().st_size, target)
    assert target.stat().st_size == layout.size
    _check_random_ranges(layout, raw, target, seed)
    qemu.img("compare", "-f", "raw", "-F", image_format, raw, target)
    files = Files(target)
    disk = files.run(open_disk(target.name, layout.size))
    assert disk.size == -(-extents.end // 512) * 512
    stored = Files(raw)
    for start, end in extents.data_ranges():
        assert files.read(disk, start, end - start) == pread(stored.opened[0], start, end - start)
    _check_holes(files, disk, extents)
    return target


def _check_random_ranges(layout: Layout, raw: Path, target: Path, seed: int) -> None:
    rng, files = random.Random(seed), Files(raw)
    interesting = [piece.start for piece in layout.map(0, min(layout.size, PART))]
    for _ in range(40):
        offset = max(0, rng.choice(interesting) + rng.randint(-600, 600))
        if rng.random() < 0.3:
            offset = rng.randrange(layout.size)
        length = min(rng.choice((1, 7, 512, 4096, 100_000)), layout.size - offset)
        if length > 0:
            found = files.content(layout.map(offset, length), offset, length)
            assert found == pread(target, offset, length)


def _check_holes(files: Files, disk: Disk, extents: ExtentList) -> None:
    """What has no data anywhere near is no data in the opened disk either."""
    at = 0
    data = 0
    while at < disk.size:
        pieces = files.run(disk.map(at, min(1 << 30, disk.size - at)))
        data += sum(p.end - p.start for p in pieces.between(at, pieces.end) if p.kind == Kind.DATA)
        at = pieces.end
    wanted = sum(end - start for start, end in extents.data_ranges())
    assert data >= wanted
    if not wanted:
        assert data == 0
