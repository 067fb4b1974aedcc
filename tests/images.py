"""Images that the tests make."""

from __future__ import annotations

import os
import random
from pathlib import Path

BLOCK = 4096
LONGEST = 1024  # blocks of one run


def fill(path: Path, size: int) -> None:
    """`size` bytes of random data, synced."""
    with path.open("wb") as file:
        for offset in range(0, size, 1 << 20):
            file.write(os.urandom(min(1 << 20, size - offset)))
        os.fsync(file.fileno())


def scatter(path: Path, size: int, data: int, seed: int = 0) -> int:
    """`data` bytes of random data in runs of 4 KiB to 4 MiB over `size` bytes, synced.

    The layout depends on `seed` alone, the bytes do not.  Returns the number of runs.
    """
    rng = random.Random(seed)
    runs, left = [], data // BLOCK
    while left:
        runs.append(min(left, int(LONGEST ** rng.random())))
        left -= runs[-1]
    # A gap of a block at least before each, or two runs would be one.
    spare = (size - data) // BLOCK - len(runs)
    if spare < 0:
        raise ValueError(f"{len(runs)} runs do not fit in {size} bytes")
    starts = sorted(rng.randint(0, spare) for _ in runs)
    with path.open("wb") as file:
        before = 0
        for index, (start, length) in enumerate(zip(starts, runs, strict=True)):
            file.seek((start + before + index + 1) * BLOCK)
            file.write(os.urandom(length * BLOCK))
            before += length
        file.truncate(size)
        os.fsync(file.fileno())
    return len(runs)
