"""Real filesystems in images: mounting them, leaving pieces of free space, seeing them intact."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from imgfs.guest.space import Filesystem

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))


def run(*command: object, codes: Sequence[int] = (0,), text: str = "") -> str:
    """What it printed.  Fails when it ends with another code."""
    words = [str(word) for word in command]
    done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode in codes, (words, done.returncode, done.stdout, done.stderr)
    return done.stdout


@contextmanager
def mounted(image: Path, *options: str) -> Iterator[Path]:
    """The image's filesystem, on a loop device that goes with the mount."""
    point = image.with_name(image.name + ".mounted")
    point.mkdir(exist_ok=True)
    run("mount", "-o", ",".join(("loop", *options)), image, point)
    try:
        yield point
        run("umount", point)
        # What has copied the mounts of this machine meanwhile (unshare) keeps this one, too.
        deadline = time.monotonic() + 60
        while run("losetup", "-j", image):
            assert time.monotonic() < deadline, f"{image} is still mounted somewhere"
            time.sleep(0.05)
    finally:
        if os.path.ismount(point):
            subprocess.run(["umount", "-l", point], timeout=60)


def fragment(point: Path, rng: random.Random, room: int) -> None:
    """Write files of many sizes, up to `room` bytes, and delete half of them; punch holes too."""
    left, names = room, []
    while left > 0 and len(names) < 400:
        size = min(left, int(4 ** rng.uniform(0, 10.5)))
        folder = point / f"d{rng.randrange(9)}"
        folder.mkdir(exist_ok=True)
        path = folder / f"{len(names)}"
        path.write_bytes(rng.randbytes(1024) * -(-size // 1024))
        names.append(path)
        left -= size
    os.sync()
    for path in names:
        chance = rng.random()
        if chance < 0.5:
            path.unlink()
        elif chance < 0.6:
            os.truncate(path, path.stat().st_size // 2)
        elif chance < 0.7:
            subprocess.run(
                ["fallocate", "-p", "-o", "4096", "-l", "20000", path],
                stderr=subprocess.DEVNULL,  # ext2 and ext3 have none of it
                timeout=60,
            )
    (point / "link").symlink_to("d1")


def checksums(point: Path) -> dict[str, str]:
    found = {}
    for path in sorted(point.rglob("*")):
        kind = str(path.readlink()) if path.is_symlink() else ""
        if path.is_file() and not kind:
            kind = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(point))] = kind
    return found


def runs(free: array[int]) -> list[tuple[int, int]]:
    return list(zip(free[::2], free[1::2], strict=True))


def in_order(found: Filesystem) -> None:
    """What must hold of every answer."""
    bounds = [0, *found.free, found.size]
    assert all(low < high for low, high in pairwise(bounds[1:-1])), bounds
    assert not found.free or found.free[-1] <= found.size
    assert not (found.left_whole and found.free)
    assert "\n" not in found.left_whole


def zero_free(image: Path, found: Filesystem, byte: int = 0) -> None:
    """Overwrite all that is free."""
    with image.open("r+b") as file:
        for start, end in runs(found.free):
            file.seek(start)
            while file.tell() < end:
                file.write(bytes([byte]) * min(1 << 20, end - file.tell()))


def free_of_domain(text: str) -> list[tuple[int, int]]:
    """Of partclone's domain log: what is not used, in bytes."""
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    rows = [(int(at, 16), int(size, 16), sign) for at, size, sign in lines[1:]]
    return joined((at, at + size) for at, size, sign in rows if sign == "?")


def joined(ranges: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """In order, those that touch as one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return found
