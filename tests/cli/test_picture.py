"""The picture: every stored byte can be seen, in its colour, at its place; bounded in size."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from PIL import Image

from imgfs.cli import picture
from imgfs.extents import from_data_ranges
from imgfs.guest.usage import Amounts, Part, Usage

MIB = 1 << 20


def part(name: str, usage: Usage, *ranges: tuple[int, int], why: str = "") -> Part:
    amounts = sum((usage.amounts(*each) for each in ranges), Amounts())
    return Part(name, ranges, amounts, "ext4 root", why)


def squares(image: Image.Image, top: int, count: int) -> list[tuple[int, ...]]:
    step = picture.SQUARE + picture.GAP
    pixels = (
        image.getpixel(
            (picture.MARGIN + n % picture.COLUMNS * step, top + n // picture.COLUMNS * step)
        )
        for n in range(count)
    )
    return [pixel for pixel in pixels if isinstance(pixel, tuple)]


def test_squares_are_what_is_there(tmp_path: Path) -> None:
    size = 64 * MIB  # squares of 8 KiB
    usage = Usage(from_data_ranges(iter([(0, 3 << 13), (5 << 13, 9 << 13)]), size), [7 << 13, size])
    picture.save(tmp_path / "a.png", "disk", usage, [part("disk", usage, (0, size))], "about")
    with Image.open(tmp_path / "a.png") as file:
        assert file.format == "PNG"
        image = file.convert("RGB")
        found = squares(image, picture.HEAD + 34, size // picture.square_of(size))
    data, hole, deleted = picture.DATA, picture.HOLE, picture.DELETED
    assert found[:10] == [data] * 3 + [hole] * 2 + [data] * 2 + [deleted] * 2 + [hole]
    assert set(found[10:]) == {hole}


def test_the_palette_has_every_colour(tmp_path: Path) -> None:
    size, rng = 64 * MIB, random.Random(1)
    bounds = [n << 9 for n in sorted(rng.sample(range(size >> 9), 30_000))]
    free = [n << 9 for n in sorted(rng.sample(range(size >> 9), 10_000))]
    usage = Usage(from_data_ranges(zip(bounds[::2], bounds[1::2], strict=True), size), free)
    square = picture.square_of(size)
    colours = [picture.colour_of(usage.amounts(n, n + square)) for n in range(0, size, square)]
    assert len(set(colours)) > 100
    disk = part("disk", usage, (0, size), why="doubt")
    picture.save(tmp_path / "a.png", "disk", usage, [disk], "about")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        assert squares(image.convert("RGB"), picture.HEAD + 34 + 24, len(colours)) == colours


def test_a_single_byte_can_be_seen() -> None:
    size = 1 << 50
    usage = Usage(from_data_ranges(iter([(12345, 12346)]), size))
    colour = picture.colour_of(usage.amounts(0, picture.square_of(size)))
    assert max(abs(a - b) for a, b in zip(colour, picture.HOLE, strict=True)) > 50
    assert picture.colour_of(usage.amounts(12346, size)) == picture.HOLE


@pytest.mark.parametrize("size", [0, 1, 511, 513, 8 << 30, (1 << 63) - 1])
def test_any_size(tmp_path: Path, size: int) -> None:
    usage = Usage(from_data_ranges(iter([(0, size // 2)] if size > 1 else []), size))
    parts = [part("disk", usage, (0, size))] if size else []
    picture.save(tmp_path / "a.png", "disk", usage, parts, "about")
    assert size <= picture.square_of(size) * picture.COLUMNS * picture.ROWS
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == picture.WIDTH + 2 * picture.MARGIN
        assert image.height < 1400


def test_what_a_guest_wrote_is_only_text(tmp_path: Path) -> None:
    """Many partitions, names that are long, not printable, or of no alphabet that the font has."""
    usage = Usage(from_data_ranges(iter(()), 500 * MIB))
    parts = [
        part(name, usage, (n * MIB, (n + 1) * MIB), why="\x1b[31m" + "x" * 5000)
        for n, name in enumerate(["\ud800\x00\n", "日本 🙂", "l" * 10_000, *map(str, range(400))])
    ]
    picture.save(tmp_path / "a.png", "t" * 10_000, usage, parts, "about")
    with Image.open(tmp_path / "a.png") as image:
        assert image.height < 6000
