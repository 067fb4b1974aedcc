"""A picture of what a disk is made of, for a report: one small square a piece, all to one scale."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from math import ceil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from imgfs.guest.usage import OUTSIDE, Amounts, Part, Usage
from imgfs.units import format_size
from imgfs.url.text import one_line

COLUMNS = 150
ROWS = 56  # of the whole disk, at most
SQUARE, GAP = 8, 2
MARGIN = 48
BAR_TOP, BAR = 164, 40  # where it begins, and how high it is
HEAD = 276  # all that is above the first part
MOST_PARTS = 40  # a hostile table could ask for a picture of any size
MOST_LETTERS = 300  # of one text
LEAST_SQUARE = 512  # bytes

Colour = tuple[int, int, int]
PAPER: Colour = (255, 255, 255)
INK: Colour = (33, 37, 41)
FAINT: Colour = (108, 117, 125)
WARNING: Colour = (176, 60, 32)
HOLE: Colour = (233, 236, 239)
DATA: Colour = (38, 99, 171)
DELETED: Colour = (240, 140, 46)
LEAST_SHADE = 0.35  # of a square with a single stored byte
# No more colours than a palette has, which makes the file half as large: SHADES * (MIXTURES + 1) of
# squares, and LEVELS of each ink.
SHADES, MIXTURES, LEVELS = 16, 8, 16

WIDTH = COLUMNS * (SQUARE + GAP) - GAP
RIGHT = MARGIN + WIDTH


def save(path: Path, title: str, usage: Usage, parts: Sequence[Part], about: str) -> None:
    """Write a PNG; `about` is a word or two on the disk.  Raises OSError."""
    square = square_of(usage.size)
    shown = sorted(sorted(parts, key=lambda p: -p.amounts.size)[:MOST_PARTS], key=parts.index)
    heights = [_height(part, square) for part in shown]
    left_out = len(parts) - len(shown)
    height = HEAD + sum(heights) + (40 if left_out else 0) + 64
    sheet = _Sheet(height)
    sheet.header(title, usage, about)
    sheet.bar(usage, [p for p in shown if not p.is_volume and p.name != OUTSIDE], BAR_TOP)
    at = HEAD
    for part, room in zip(shown, heights, strict=True):
        sheet.part(part, usage, square, at)
        at += room
    if left_out:
        sheet.text(MARGIN, at, f"and {left_out} smaller ones", 18, FAINT)
        at += 40
    sheet.legend(at + 8, square, with_deleted=usage.amounts(0, usage.size).deleted > 0)
    sheet.image.quantize(256).save(path, format="PNG", optimize=True)


def square_of(size: int) -> int:
    """How many bytes a square stands for, a power of two, on a disk of `size` bytes."""
    square = LEAST_SQUARE
    while square * COLUMNS * ROWS < size:
        square *= 2
    return square


def _height(part: Part, square: int) -> int:
    rows = -(-_squares(part, square) // COLUMNS)
    return 34 + (24 if part.left_whole else 0) + rows * (SQUARE + GAP) + 26


def _squares(part: Part, square: int) -> int:
    return -(-part.amounts.size // square)


def colour_of(amounts: Amounts) -> Colour:
    """Whatever is stored can be seen, however little it is."""
    stored = amounts.data + amounts.deleted
    if not stored:
        return HOLE
    shade = LEAST_SHADE + (1 - LEAST_SHADE) * ceil(SHADES * stored / amounts.size) / SHADES
    mixture = round(MIXTURES * amounts.deleted / stored) / MIXTURES
    return _mixed(HOLE, _mixed(DATA, DELETED, mixture), shade)


def _mixed(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


class _Sheet:
    """The paper; all numbers are pixels, from its upper left corner."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH + 2 * MARGIN, height), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(self, x: int, y: int, text: str, size: int, colour: Colour, room: int = WIDTH) -> int:
        """Returns how wide it is; what finds no room is cut."""
        font = _font(size)
        text = one_line(text[:MOST_LETTERS])
        if self._draw.textlength(text, font=font) > room:

            def width(letters: int) -> int:
                return ceil(self._draw.textlength(text[:letters] + "…", font=font))

            text = text[: max(0, bisect_right(range(len(text)), room, key=width) - 1)] + "…"
        length = self._draw.textlength(text, font=font)
        ink = Image.new("L", (ceil(length) + size, 2 * size))
        ImageDraw.Draw(ink).text((0, 0), text, fill=255, font=font)
        step = 255 // (LEVELS - 1)
        self.image.paste(colour, (x, y), ink.point(lambda level: level // step * step))
        return int(length)

    def text_right(self, y: int, text: str, size: int, colour: Colour) -> int:
        width = int(self._draw.textlength(text, font=_font(size)))
        return self.text(RIGHT - width, y, text, size, colour)

    def header(self, title: str, usage: Usage, about: str) -> None:
        self.text(MARGIN, 40, title, 36, INK)
        total = usage.amounts(0, usage.size)
        said = " · ".join((format_size(usage.size), about, _told(total)))
        self.text(MARGIN, 96, said, 22, FAINT)

    def bar(self, usage: Usage, parts: Sequence[Part], top: int) -> None:
        """All of the disk in one line, and where its parts begin."""
        size = usage.size
        for x in range(WIDTH if size else 0):
            start, end = x * size // WIDTH, max((x + 1) * size // WIDTH, x * size // WIDTH + 1)
            colour = colour_of(usage.amounts(start, min(end, size)))
            self._draw.line([(MARGIN + x, top), (MARGIN + x, top + BAR - 1)], fill=colour)
        for part in parts:
            for start, end in part.ranges:
                left, right = MARGIN + start * WIDTH // size, MARGIN + end * WIDTH // size
                for x in (left, right):
                    self._draw.line([(x, top - 6), (x, top + BAR + 5)], fill=INK)
                name = part.name.removeprefix("partition ")
                if right - left > 24:
                    self.text(left + 6, top + BAR + 8, name, 18, FAINT, right - left - 8)

    def part(self, part: Part, usage: Usage, square: int, top: int) -> None:
        room = WIDTH - self.text_right(top + 2, _told(part.amounts), 18, FAINT) - 24
        told = self.text(MARGIN, top, part.name, 22, INK, room)
        self.text(MARGIN + told + 14, top, part.holds, 22, FAINT, max(0, room - told - 14))
        top += 34
        if part.left_whole:
            self.text(MARGIN, top - 2, f"left whole: {part.left_whole}", 18, WARNING)
            top += 24
        for index, amounts in enumerate(_in_squares(part, usage, square)):
            x = MARGIN + index % COLUMNS * (SQUARE + GAP)
            y = top + index // COLUMNS * (SQUARE + GAP)
            end = (x + SQUARE - 1, y + SQUARE - 1)
            self._draw.rectangle([(x, y), end], fill=colour_of(amounts))

    def legend(self, top: int, square: int, *, with_deleted: bool) -> None:
        deleted = [(DELETED, "deleted, and still stored")] if with_deleted else []
        x = MARGIN
        for colour, text in ((DATA, "data"), *deleted, (HOLE, "hole")):
            self._draw.rectangle([(x, top), (x + 19, top + 19)], fill=colour)
            x += 30 + self.text(x + 30, top - 2, text, 20, INK) + 36
        self.text_right(top - 2, f"each square is {format_size(square)}", 20, FAINT)


def _told(amounts: Amounts) -> str:
    told = [f"{format_size(amounts.data)} data"]
    if amounts.deleted:
        told.append(f"{format_size(amounts.deleted)} deleted")
    return " · ".join([*told, f"{format_size(amounts.hole)} holes"])


def _in_squares(part: Part, usage: Usage, square: int) -> list[Amounts]:
    """The part's ranges one behind the other, in pieces of a square."""
    found: list[Amounts] = []
    filled = square
    for start, end in part.ranges:
        while start < end:
            if filled == square:
                found.append(Amounts())
                filled = 0
            step = min(square - filled, end - start)
            found[-1] += usage.amounts(start, start + step)
            filled += step
            start += step
    return found
