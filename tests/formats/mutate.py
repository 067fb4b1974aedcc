"""Files with a few bytes changed: only errors of imgfs may come of them, and soon."""

from __future__ import annotations

import os
import random
import time
import tracemalloc
from collections.abc import Callable, Sequence

from imgfs.errors import ImgfsError
from imgfs.formats.disk import Disk
from imgfs.pieces import Kind
from imgfs.steps import Steps
from tests.drive import Files

COUNT = 5_000 if os.environ.get("IMGFS_TEST_LONG") else 300
LONGEST_S = 1.0
MOST_MEMORY = 100 << 20
_VALUES = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 1 << 63)


def mutated(rng: random.Random, file: bytes, places: Sequence[tuple[int, int]]) -> bytearray:
    """The file with one to four changes in the ranges `places`; sometimes also cut short."""
    found = bytearray(file)
    for _ in range(rng.randint(1, 4)):
        start, end = rng.choice(places)
        at, width = rng.randrange(start, end), rng.choice((1, 1, 2, 4, 8))
        value = rng.choice((*_VALUES, (1 << 64) - 1, rng.getrandbits(64)))
        coded = (value & ((1 << 8 * width) - 1)).to_bytes(width, rng.choice(("little", "big")))
        found[at : at + width] = coded[: max(0, len(found) - at)]
    if rng.random() < 0.1:
        del found[rng.randrange(len(found)) :]
    return found


def check(
    open_disk: Callable[[str, int], Steps[Disk]],
    file: bytes,
    places: Sequence[tuple[int, int]],
    seed: int = 0,
    repair: Callable[[bytearray], None] = lambda changed: None,
) -> None:
    """`repair` makes checksums right again; it is done to half of the files."""
    tracemalloc.start()
    opened = 0
    try:
        for number in range(seed, seed + COUNT):
            rng = random.Random(number)
            changed = mutated(rng, file, places)
            if rng.random() < 0.5:
                repair(changed)
            tracemalloc.reset_peak()
            before, memory = time.monotonic(), tracemalloc.get_traced_memory()[0]
            opened += _use(open_disk, bytes(changed), rng)
            taken = time.monotonic() - before
            assert taken < LONGEST_S, f"{number}: {taken} s"
            peak = tracemalloc.get_traced_memory()[1] - memory - 2 * len(changed)
            assert peak < MOST_MEMORY, f"{number}: {peak} bytes"
    finally:
        tracemalloc.stop()
    assert 0 < opened < COUNT, "all of the files were good, or none was"


def _use(open_disk: Callable[[str, int], Steps[Disk]], file: bytes, rng: random.Random) -> bool:
    """Open it and map some of it.  Whether all of that went well."""
    files = Files(file)
    try:
        disk = files.run(open_disk("fuzz", len(file)))
        for _ in range(4 if disk.size else 0):
            offset = rng.randrange(disk.size)
            pieces = files.run(disk.map(offset, rng.randint(1, disk.size - offset)))
            assert 0 <= pieces.start <= offset < pieces.end <= disk.size
            for piece in pieces:
                if piece.kind == Kind.DATA:
                    assert piece.offset + piece.end - piece.start <= len(file)
    except ImgfsError:
        return False
    return True
