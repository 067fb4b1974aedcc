"""Filesystems of a few MiB, which are full soon, and calls that fail."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

BLOCK = 4096


def run(*words: object) -> None:
    command = [str(word) for word in words]
    subprocess.run(command, check=True, timeout=30, capture_output=True)


@contextlib.contextmanager
def tmpfs(at: Path, size: str) -> Iterator[None]:
    at.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "none", at)
    try:
        yield
    finally:
        run("umount", "-l", at)


@contextlib.contextmanager
def ext4(at: Path, image: Path, mib: int, *options: str) -> Iterator[None]:
    """By a loop device; with no blocks kept for root."""
    at.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(mib << 20)
    run("mkfs.ext4", "-q", "-m", "0", *options, image)
    run("mount", "-o", "loop", image, at)
    try:
        yield
    finally:
        run("umount", "-l", at)


def resize(at: Path, size: str) -> None:
    """Of a tmpfs."""
    run("mount", "-o", f"remount,size={size}", at)


def fill(path: Path) -> None:
    """Take all the room that is left."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(BLOCK))


def scatter(raw: Path, blocks: range, *, byte: bytes = b"x", size: int = BLOCK) -> list[int]:
    """Write these blocks, without fsync, until there is no room; which were written."""
    written = []
    fd = os.open(raw, os.O_RDWR)
    try:
        for block in blocks:
            try:
                assert os.pwrite(fd, byte * size, block * BLOCK) == size
            except OSError as exc:
                assert exc.errno == errno.ENOSPC
                break
            written.append(block)
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)
    return written


def holds(raw: Path, blocks: list[int], byte: bytes = b"x") -> bool:
    with raw.open("rb") as file:
        for block in blocks:
            if os.pread(file.fileno(), BLOCK, block * BLOCK) != byte * BLOCK:
                return False
    return True


@contextlib.contextmanager
def faults(pid: int, path: Path, inject: str) -> Iterator[None]:
    """In it system calls of the process on this file fail, as strace's -e inject= has it."""
    command = ["strace", "-f", "-p", str(pid), "-P", str(path), "-o", "/dev/null"]
    tracer = subprocess.Popen(
        [*command, "-e", f"inject={inject}"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        yield
    finally:
        tracer.terminate()
        tracer.communicate(timeout=20)
