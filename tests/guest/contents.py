"""Files that come, grow, and go in a mounted filesystem, and what they hold."""

from __future__ import annotations

import hashlib
import random
from array import array
from pathlib import Path

FEWEST = 6
SIZES = (0, 100, 700, 3000, 9000, 40_000, 300_000)


def churn(root: Path, rng: random.Random, room: int, steps: int = 250) -> None:
    """Make, append to and delete files, of about `room` bytes at most; some stay."""
    folders = [root]
    files: list[Path] = []
    used = 0
    for step in range(steps):
        choice = rng.random()
        if choice < 0.05:
            folders.append(rng.choice(folders) / f"folder {step}")
            folders[-1].mkdir()
        elif (choice < 0.4 and len(files) > FEWEST) or used > room:
            gone = files.pop(rng.randrange(len(files)))
            used -= gone.stat().st_size
            gone.unlink()
        else:
            fresh = choice < 0.85 or not files
            name = f"{step} {'é' * rng.randrange(40)}"
            path = rng.choice(folders) / name if fresh else rng.choice(files)
            if fresh:
                files.append(path)
            size = rng.randrange(1 + min(rng.choice(SIZES), room // 10))
            with path.open("ab") as file:
                file.write(rng.randbytes(size))
            used += size


def checksums(root: Path) -> dict[str, str]:
    """Of every file below."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def zero(image: Path, free: array[int], start: int = 0) -> None:
    """Overwrite what is said to be free."""
    with image.open("r+b") as file:
        for begin, end in zip(free[::2], free[1::2], strict=True):
            for at in range(begin, end, 1 << 20):
                file.seek(start + at)
                length = min(1 << 20, end - at)
                if any(file.read(length)):
                    file.seek(start + at)
                    file.write(bytes(length))
