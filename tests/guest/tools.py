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
