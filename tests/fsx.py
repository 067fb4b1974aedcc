"""Random operations on one file against a model in memory: after fsx of the BSDs and xfstests.

    .venv/bin/python -m tests.fsx FILE [--count 10000] [--seed 1] [--other FILE]

The file is changed; what it holds at the beginning is the model's beginning.  From the other one,
which nobody changes, ranges are copied to it.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import mmap
import os
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 0x10
PAGE = 4096
MOST = 64 << 10  # bytes of one operation
LARGE = 300 << 10  # bytes of a few of them, which may go another way
LIBC = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Raises OSError."""
    if LIBC.fallocate64(fd, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Fsx:
    """`path` as one process sees it that does one thing after the other."""

    def __init__(
        self, path: Path, seed: int, *, resizes: bool = True, other: Path | None = None
    ) -> None:
        self.path = path
        self.other = other
        self.content = b"" if other is None else other.read_bytes()
        self.rng = random.Random(seed)
        self.model = bytearray(path.read_bytes())
        self.most = len(self.model) * 5 // 4
        self.fd = os.open(path, os.O_RDWR)
        self.ranged: list[Callable[[int, int], None]] = [
            self.read, self.read, self.write, self.write, self.write, self.write_in_parts,
            self.write_only, self.direct, self.copy, self.map_read, self.map_write, self.punch,
            self.zero,
        ]  # fmt: skip
        self.ranged += [self.copy_from_other] * 2 if other is not None else []
        self.resizes = resizes
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
        most = LARGE if self.rng.random() < 0.05 else MOST
        length = min(self.rng.randrange(1, most), len(self.model) - offset)
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

    def write_in_parts(self, offset: int, length: int) -> None:
        """Often from the beginning of a page, and large enough to be passed on by reference."""
        for _ in range(3):
            part = min(MOST + length, len(self.model) - offset)
            if part == 0:
                return
            self.write(offset, part)
            offset += part

    def write_only(self, offset: int, length: int) -> None:
        """As dd and cp open files."""
        self.note("write only", offset, length)
        data = self.rng.randbytes(length)
        fd = os.open(self.path, os.O_WRONLY)
        try:
            assert os.pwrite(fd, data, offset) == length
        finally:
            os.close(fd)
        self.model[offset : offset + length] = data
        self.check(offset, length, os.pread(self.fd, length, offset))

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
        """To somewhere else in the file; where that overlaps it is refused, and nothing happens."""
        target = self.place(length)
        if abs(target - offset) < length:
            self.note(f"overlapping copy to {target}", offset, length)
            try:
                os.copy_file_range(self.fd, self.fd, length, offset, target)
            except OSError as exc:
                assert exc.errno == errno.EINVAL
            else:
                raise AssertionError("was not refused")
            length = abs(target - offset)
        self.note(f"copy to {target}", offset, length)
        self.copy_file_range(self.fd, bytes(self.model[offset : offset + length]), offset, target)

    def copy_from_other(self, offset: int, length: int) -> None:
        """Mostly to the same place: a snapshot's own base is there already."""
        assert self.other is not None
        if self.rng.random() < 0.05:
            offset, length = 0, len(self.content)
        offset %= len(self.content)
        length = min(length, len(self.content) - offset)
        target = self.place(length)
        if self.rng.random() < 0.7 and (self.resizes or offset + length <= len(self.model)):
            target = offset
        self.note(f"copy from the other to {target}", offset, length)
        fd = os.open(self.other, os.O_RDONLY)
        try:
            self.copy_file_range(fd, self.content[offset : offset + length], offset, target)
        finally:
            os.close(fd)

    def place(self, length: int) -> int:
        """Where such a range may be put."""
        most = self.most if self.resizes else len(self.model)
        place = self.rng.randrange(max(1, min(len(self.model) + PAGE, most - length + 1)))
        return place - place % self.rng.choice([1, 1, 512, PAGE])

    def copy_file_range(self, fd: int, data: bytes, offset: int, target: int) -> None:
        done = 0
        while done < len(data):
            left = len(data) - done
            count = os.copy_file_range(fd, self.fd, left, offset + done, target + done)
            assert count > 0
            done += count
        if data:
            self.model.extend(bytes(max(0, target - len(self.model))))
            self.model[target : target + len(data)] = data

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
    parser.add_argument("--other", type=Path)
    options = parser.parse_args()
    Fsx(options.file, options.seed, other=options.other).run(options.count)


if __name__ == "__main__":
    main()
