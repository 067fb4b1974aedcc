"""What can happen to the bytes of a file, as new contents of it."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))


def flipped(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def swapped(content: bytes, first: int, second: int, length: int) -> bytes:
    """Two ranges that do not overlap, each in the other's place."""
    first, second = sorted((first, second))
    a, b = content[first : first + length], content[second : second + length]
    return content[:first] + b + content[first + length : second] + a + content[second + length :]


def flips(content: bytes) -> Iterator[bytes]:
    """One bit of every byte, another one each time; all of them in the long form."""
    for at in range(len(content)):
        for bit in range(8) if LONG else (at % 8,):
            yield flipped(content, at, bit)


def cuts(content: bytes) -> Iterator[bytes]:
    """At every length, and with zeroes where the rest was."""
    for length in range(len(content)):
        yield content[:length]
        if LONG or length % 16 == 0:
            yield content[:length] + bytes(len(content) - length)


def swaps(content: bytes, length: int) -> Iterator[bytes]:
    """Any two aligned parts of this length; in the short form 40 of them."""
    places = range(0, len(content) - length + 1, length)
    pairs = list(itertools.combinations(places, 2))
    if not LONG and len(pairs) > 40:
        pairs = random.Random(length).sample(pairs, 40)
    for first, second in pairs:
        yield swapped(content, first, second, length)


def all_of(content: bytes, other: bytes = b"", seed: int = 0) -> Iterator[bytes]:
    """Of a small file.  `other` is another file of the kind, parts of which may come here."""
    yield from flips(content)
    yield from cuts(content)
    for length in (8, 16, 64, 512):
        yield from swaps(content, length)
    lines = content.split(b"\n")
    for first in range(len(lines)):
        yield b"\n".join(lines[:first] + lines[first + 1 :])
        for second in range(len(lines)):
            copied = [*lines]
            copied[second] = lines[first]
            yield b"\n".join(copied)
    yield other
    for length in (1, 8, 64, 512) if LONG else (16, 64, 512):
        for at in range(0, len(content), length):
            yield content[:at] + other[at : at + length] + content[at + length :]
    rng = random.Random(seed)
    for _ in range(1000 if LONG else 50):
        at, length = rng.randrange(len(content)), rng.randrange(1, 40)
        yield content[:at] + rng.randbytes(length) + content[at + length :]
