"""Random operations on one file against a model in memory: after fsx of the BSDs and xfstests.

    .venv/bin/python -m tests.fsx FILE [--count 10000] [--seed 1]

The file is changed; what it holds at the beginning is the model's beginning.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 0x10
PAGE = 4096
MOST = 64 << 10  # bytes of one operation
LIBC = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Raises OSError."""
    if LIBC.fallocate64(fd, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Fsx:
    """`path` as one process sees it that does one thing after the other."""

    def __init__(self, path: Path, seed: int, *, resizes: bool = True) -> None:
        self.path = path
        self.rng = random.Random(seed)
        self.model = bytearray(path.read_bytes())
        self.most = len(self.model) * 5 // 4
        self.fd = os.open(path, os.O_RDWR)
        self.ranged: list[Callable[[int, int], None]] = [
            self.read, self.read, self.write, self.write, self.write, self.direct, self.copy,
            self.map_read, self.map_write, self.punch, self.zero,
        ]  # fmt: skip
        self.others = [self.sync, self.reopen, self.seek]
        self.others += [self.shrink_or_grow, self.append_some] if resizes else []
        self.log: deque[str] = deque(maxlen=20)

    def run(self, count: int) -> None:
        """Raises AssertionError with the last operations."""
        try:
            for _ in range(count):
                number = self.rng.randrange(len(self.ranged) + len(self.others))
                if number < len(self.others):
                    self.others[number]()
                else:
                    self.ranged[number - len(self.others)](*self.range())
            self.end()
        except (AssertionError, OSError) as exc:
            raise AssertionError("\n".join([*self.log, repr(exc)])) from exc

    def end(self) -> None:
        """Compare all of it, and close."""
        try:
            self.check(0, len(self.model), os.pread(self.fd, len(self.model) + 1, 0))
        finally:
            os.close(self.fd)

    def range(self) -> tuple[int, int]:
        """A place in the file, which is not empty; often at the beginning of a sector or page."""
        offset = self.rng.randrange(len(self.model))
        offset -= offset % self.rng.choice([1, 1, 512, PAGE])
        length = min(self.rng.randrange(1, MOST), len(self.model) - offset)
        return offset, length - length % PAGE if length > PAGE and offset % PAGE == 0 else length

    def note(self, what: str, offset: int = 0, length: int = 0) -> None:
        self.log.append(f"{what} {offset} {length} of {len(self.model)}")

    def check(self, offset: int, length: int, found: bytes) -> None:
        wanted = self.model[offset : offset + length]
        if found != wanted:
            at = next((i for i in range(length) if found[i : i + 1] != wanted[i : i + 1]), length)
            raise AssertionError(f"differs at {offset + at}: {len(found)} bytes of {length}")

    def read(self, offset: int, length: int) -> None:
        self.note("read", offset, length)
        self.check(offset, length, os.pread(self.fd, length, offset))

    def write(self, offset: int, length: int) -> None:
        self.note("write", offset, length)
        data = self.rng.randbytes(length)
        assert os.pwrite(self.fd, data, offset) == length
        self.model[offset : offset + length] = data

    def direct(self, offset: int, length: int) -> None:
        """Write and read what is whole blocks of it past the page cache."""
        offset -= offset % PAGE
        length -= length % PAGE
        if length == 0:
            return
        self.note("direct", offset, length)
        data = self.rng.randbytes(length)
        buffer = mmap.mmap(-1, length)
        buffer[:] = data
        fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        try:
            assert os.pwrite(fd, buffer, offset) == length
            self.model[offset : offset + length] = data
            assert os.preadv(fd, [buffer], offset) == length
            self.check(offset, length, buffer[:])
        finally:
            os.close(fd)
            buffer.close()

    def map_read(self, offset: int, length: int) -> None:
        self.note("mmap read", offset, length)
        with mmap.mmap(self.fd, len(self.model), prot=mmap.PROT_READ) as mapped:
            self.check(offset, length, mapped[offset : offset + length])

    def map_write(self, offset: int, length: int) -> None:
        self.note("mmap write", offset, length)
        data = self.rng.randbytes(length)
        with mmap.mmap(self.fd, len(self.model)) as mapped:
            mapped[offset : offset + length] = data
            if self.rng.random() < 0.5:
                mapped.flush()
        self.model[offset : offset + length] = data

    def copy(self, offset: int, length: int) -> None:
        """To somewhere else in the file."""
        target = self.rng.randrange(len(self.model))
        length = min(length, abs(target - offset), len(self.model) - target)
        self.note(f"copy to {target}", offset, length)
        done = 0
        while done < length:
            count = os.copy_file_range(
                self.fd, self.fd, length - done, offset + done, target + done
            )
            assert count > 0
            done += count
        self.model[target : target + length] = self.model[offset : offset + length]

    def punch(self, offset: int, length: int) -> None:
        self.note("punch", offset, length)
        fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
        self.model[offset : offset + length] = bytes(length)

    def zero(self, offset: int, length: int) -> None:
        self.note("zero", offset, length)
        fallocate(self.fd, ZERO_RANGE | KEEP_SIZE, offset, length)
        self.model[offset : offset + length] = bytes(length)

    def shrink_or_grow(self) -> None:
        self.truncate(self.rng.randrange(self.most // 2, self.most))

    def truncate(self, size: int) -> None:
        self.note("truncate", size)
        os.ftruncate(self.fd, size)
        self.model[:] = self.model[:size].ljust(size, b"\0")

    def append_some(self) -> None:
        length = min(self.rng.randrange(1, MOST), self.most - len(self.model))
        if length > 0:
            self.write(len(self.model), length)

    def sync(self) -> None:
        self.note("fsync")
        os.fsync(self.fd)

    def reopen(self) -> None:
        self.note("reopen")
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR)
        assert os.fstat(self.fd).st_size == len(self.model)

    def seek(self) -> None:
        """What is called a hole reads as zeroes."""
        offset = self.rng.randrange(len(self.model))
        self.note("seek", offset)
        hole = os.lseek(self.fd, offset, os.SEEK_HOLE)
        if hole < len(self.model):
            try:
                end = os.lseek(self.fd, hole, os.SEEK_DATA)
            except OSError:
                end = len(self.model)
            assert not any(self.model[hole:end]), f"[{hole}, {end}) is no hole"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    Fsx(options.file, options.seed).run(options.count)


if __name__ == "__main__":
    main()
