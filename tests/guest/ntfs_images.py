"""NTFS images by mkntfs and ntfs-3g, and a way to change what is in their records."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imgfs.guest.ntfs_tables import Boot, fixed_up, parse_boot


def make(path: Path, size: int, *options: str) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    command = ["mkntfs", "--force", "--fast", "--quiet", *options, path]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return path


@contextmanager
def mounted(image: Path) -> Iterator[Path]:
    at = image.with_suffix(".mounted")
    at.mkdir(exist_ok=True)
    subprocess.run(["ntfs-3g", image, at], check=True, capture_output=True, timeout=60)
    try:
        yield at
    finally:
        # ntfs-3g may outlive the unmount, and keeps the image locked until it has written all.
        subprocess.run(["umount", at], check=True, timeout=60)
        subprocess.run(["flock", image, "true"], check=True, timeout=60)


class Image:
    """The bytes of an image, whose records can be changed."""

    def __init__(self, path: Path) -> None:
        self.data = bytearray(path.read_bytes())

    @property
    def boot(self) -> Boot:
        return parse_boot(bytes(self.data[:512]))

    def put(self, at: int, content: bytes) -> None:
        self.data[at : at + len(content)] = content

    def record(self, number: int) -> bytearray:
        """Without its fixups."""
        at = self._place(number)
        raw = bytes(self.data[at : at + self.boot.record])
        return bytearray(fixed_up(raw, b"FILE", f"record {number}"))

    def put_record(self, number: int, record: bytes) -> None:
        self.put(self._place(number), with_fixups(record))

    def _place(self, number: int) -> int:
        return self.boot.mft * self.boot.cluster + number * self.boot.record

    def replace(self, number: int, kind: int, new: bytes) -> None:
        """Put others, with their headers, where the first attribute of that type is."""
        record = self.record(number)
        at, length = find(record, kind)
        (used,) = struct.unpack_from("<I", record, 24)
        content = bytes(record[:at]) + new + bytes(record[at + length : used])
        assert len(content) <= len(record)
        changed = bytearray(content.ljust(len(record), b"\0"))
        struct.pack_into("<I", changed, 24, len(content))
        self.put_record(number, changed)

    def clusters(self, number: int, kind: int) -> tuple[int, int]:
        """The first one, and how many, of an attribute that is in one run."""
        record = self.record(number)
        at, _ = find(record, kind)
        runs = at + struct.unpack_from("<H", record, at + 32)[0]
        middle = runs + 1 + (record[runs] & 15)
        count = int.from_bytes(record[runs + 1 : middle], "little")
        return int.from_bytes(record[middle : middle + (record[runs] >> 4)], "little"), count


def find(record: bytes, kind: int) -> tuple[int, int]:
    """Where the first attribute of that type is, and its length."""
    (at,) = struct.unpack_from("<H", record, 20)
    while True:
        found, length = struct.unpack_from("<II", record, at)
        if found == kind:
            return at, length
        assert found != 0xFFFFFFFF, f"no attribute {kind:#x}"
        at += length


def with_fixups(record: bytes) -> bytes:
    done = bytearray(record)
    at, count = struct.unpack_from("<HH", done, 4)
    number = bytes(done[at : at + 2])
    for stride in range(1, count):
        end = stride * 512
        done[at + 2 * stride : at + 2 * stride + 2] = done[end - 2 : end]
        done[end - 2 : end] = number
    return bytes(done)


def resident(kind: int, value: bytes) -> bytes:
    """An attribute without a name."""
    body = struct.pack("<IHH", len(value), 24, 0) + value
    length = -(-(16 + len(body)) // 8) * 8
    return (struct.pack("<IIBBHHH", kind, length, 0, 0, 24, 0, 9) + body).ljust(length, b"\0")


def non_resident(kind: int, size: int, cluster: int, *runs: tuple[int, int | None]) -> bytes:
    """An attribute without a name, of runs of (clusters, first cluster or None)."""
    pairs, before = b"", 0
    for count, lcn in runs:
        pairs += b"\x04" if lcn is None else b"\x44"
        pairs += struct.pack("<i", count)
        if lcn is not None:
            pairs += struct.pack("<i", lcn - before)
            before = lcn
    clusters = sum(count for count, _ in runs)
    body = struct.pack("<QqHH4xQQQ", 0, clusters - 1, 64, 0, clusters * cluster, size, size) + pairs
    length = -(-(16 + len(body) + 1) // 8) * 8
    return (struct.pack("<IIBBHHH", kind, length, 1, 0, 64, 0, 9) + body).ljust(length, b"\0")


def restart_page(
    lsn: int, *, page: int = 4096, in_use: int = 0, flags: int = 0, major: int = 1
) -> bytes:
    """As Windows writes two of them at the beginning of $LogFile."""
    fixups = page // 512 + 1
    area = -(-(30 + 2 * fixups) // 8) * 8
    head = struct.pack("<4sHHQIIHhh", b"RSTR", 30, fixups, 0, page, page, area, 1, major)
    content = (head + b"\1\0").ljust(area, b"\0")
    content += struct.pack("<QHHHH", lsn, 1, 0xFFFF, in_use, flags)
    return with_fixups(content.ljust(page, b"\0"))
