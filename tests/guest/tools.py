"""Making guests' disks with the tools that people make them with."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imgfs.guest.disk import Guest, look_at_disk
from tests.drive import Files

MIB = 1 << 20
LONG = bool(os.environ.get("IMGFS_TEST_LONG"))


def run(*command: str | Path, stdin: str = "") -> str:
    """What it prints; its errors when it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def loop(path: Path, sector: int = 512) -> Iterator[str]:
    """A loop device of the file."""
    device = run("losetup", "--find", "--show", "--sector-size", str(sector), path).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


def empty(path: Path, size: int) -> Path:
    """A sparse file of nothing but zeroes."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path


def put(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def put_file(path: Path, offset: int, source: Path) -> None:
    """The source's data at that byte; its holes stay what was there."""
    with source.open("rb") as file, path.open("r+b") as target:
        while chunk := file.read(MIB):
            if any(chunk):
                target.seek(offset + file.tell() - len(chunk))
                target.write(chunk)


def look(disk: Path | bytes | bytearray) -> Guest:
    size = disk.stat().st_size if isinstance(disk, Path) else len(disk)
    return Files(disk).run(look_at_disk(size))


def free_of(guest: Guest) -> list[tuple[int, int]]:
    return list(zip(guest.free[::2], guest.free[1::2], strict=True))


def domain_map(kind: str, path: Path) -> list[tuple[int, int]]:
    """The ranges that partclone calls unused."""
    domain = path.with_suffix(".domain")
    log = path.with_suffix(".log")
    run(f"partclone.{kind}", "-D", "-F", "-s", path, "-o", domain, "-L", log, "-B")
    free: list[tuple[int, int]] = []
    for line in domain.read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "?" and words[0].startswith("0x"):
            start, length = int(words[0], 16), int(words[1], 16)
            if free and free[-1][1] == start:
                free[-1] = (free[-1][0], start + length)
            else:
                free.append((start, start + length))
    return free


def zeroed(path: Path, ranges: list[tuple[int, int]], target: Path) -> Path:
    """A copy in which the ranges read as zeroes."""
    run("cp", "--sparse=always", path, target)
    with target.open("r+b") as file:
        for start, end in ranges:
            file.seek(start)
            while file.tell() < end:
                file.write(bytes(min(MIB, end - file.tell())))
    return target
