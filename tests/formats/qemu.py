"""qemu-img and qemu-io as oracles."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path


def img(*args: str | Path) -> str:
    return subprocess.run(
        ["qemu-img", *map(str, args)], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def io(path: Path, image_format: str, *commands: str) -> None:
    args = [arg for command in commands for arg in ("-c", command)]
    subprocess.run(
        ["qemu-io", "-f", image_format, *args, str(path)],
        check=True,
        capture_output=True,
        timeout=60,
    )


def raw(path: Path, image_format: str) -> bytes:
    """What qemu says that the disk holds."""
    out = path.with_suffix(".oracle")
    img("convert", "-f", image_format, "-O", "raw", path, out)
    found = out.read_bytes()
    out.unlink()
    return found


def data_ranges(path: Path, image_format: str) -> list[tuple[int, int]]:
    """Where `qemu-img map` finds data, joined."""
    ranges: list[tuple[int, int]] = []
    for entry in json.loads(img("map", "--output=json", "-f", image_format, path)):
        start, end = entry["start"], entry["start"] + entry["length"]
        if not entry["data"]:
            continue
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((start, end))
    return ranges


def scribble(rng: random.Random, size: int, writes: int, longest: int = 200 << 10) -> list[str]:
    """Commands for qemu-io that write here and there, not aligned to anything."""
    commands = []
    for number in range(writes):
        length = min(rng.randint(1, longest // 512) * 512, size)
        offset = rng.randrange(0, size - length + 1, 512)
        commands.append(f"write -P {number % 255 + 1} {offset} {length}")
    return commands
