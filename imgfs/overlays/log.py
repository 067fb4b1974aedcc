"""A layer's log: which blocks are its own.

    header   magic, version, block size, size of the disk when it was made, checksum
    batch    magic, count of records, sequence number, size of the disk from now on, checksum
      record   start, end, kind
    zeroes   which the next batches overwrite; or nothing

Batches are written by imgfs/_native/log.c, but for the one that a compacted log has.

All numbers are little-endian; a checksum is the CRC-32 of all that stands before and behind it in
its header or batch.
"""

from __future__ import annotations

import os
import struct
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from operator import lt

from imgfs.errors import CorruptSnapshot, OtherVersion

BLOCK = 4096
VERSION = 2
_KNOWN = (1, 2)  # a layer of version 1 was made without sums
_HEADER = struct.Struct("<8sIIQI")
_BATCH = struct.Struct("<8sQQQI")
_RECORD = 24  # bytes: three numbers of 64 bits
_MAGIC = b"imgfslog"
_BATCH_MAGIC = b"imgfsbat"


class Kind(IntEnum):
    BELOW = 0
    DATA = 1
    ZERO = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """`records` are start, end, kind, start, end, kind …; `size` is the disk's, in bytes."""

    sequence: int
    size: int
    records: array[int]

    def columns(self) -> tuple[array[int], array[int], bytes]:
        """Starts, ends and kinds."""
        return self.records[0::3], self.records[1::3], bytes(self.records[2::3].tolist())

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        numbers = iter(self.records)
        return zip(numbers, numbers, numbers, strict=True)


def header(size: int) -> bytes:
    packed = _HEADER.pack(_MAGIC, VERSION, BLOCK, size, 0)[:-4]
    return packed + struct.pack("<I", zlib.crc32(packed))


def encode(batch: Batch) -> bytes:
    records = batch.records.tobytes()
    count = len(batch.records) // 3
    packed = _BATCH.pack(_BATCH_MAGIC, count, batch.sequence, batch.size, 0)[:-4]
    return packed + struct.pack("<I", zlib.crc32(records, zlib.crc32(packed))) + records


def decode(content: bytes, where: str) -> tuple[list[Batch], int, int]:
    """The batches, where the last good one ends, and the size of the disk before them.

    Raises CorruptSnapshot, which begins with `where`, when anything but the end is damaged.
    """
    size = _read_header(content, where)
    batches: list[Batch] = []
    at = _HEADER.size
    while at < len(content):
        batch, end = _read_batch(content, at)
        if batch is None or batch.sequence != len(batches) + 1 or not _is_sound(batch):
            if batch is not None or _has_batch_after(content, at):
                raise CorruptSnapshot(f"{where}: the batch at byte {at} is damaged")
            break
        batches.append(batch)
        at = end
    return batches, at, size


def has_sums(content: bytes) -> bool:
    """Was the layer made with sums, by its log's header, which is right?"""
    return int(_HEADER.unpack_from(content)[1]) > 1


def _read_header(content: bytes, where: str) -> int:
    if len(content) < _HEADER.size:
        raise CorruptSnapshot(f"{where}: has {len(content)} bytes, less than a header")
    magic, version, block, size, checksum = _HEADER.unpack_from(content)
    if magic != _MAGIC or checksum != zlib.crc32(content[: _HEADER.size - 4]):
        raise CorruptSnapshot(f"{where}: the header is damaged")
    if version not in _KNOWN or block != BLOCK:
        raise OtherVersion(
            f"{where}: version {version} with blocks of {block} is not known; it is of another "
            "imgfs: use that"
        )
    return int(size)


def _read_batch(content: bytes, at: int) -> tuple[Batch | None, int]:
    if len(content) - at < _BATCH.size:
        return None, at
    magic, count, sequence, size, checksum = _BATCH.unpack_from(content, at)
    first, end = at + _BATCH.size, at + _BATCH.size + count * _RECORD
    if magic != _BATCH_MAGIC or end > len(content):
        return None, at
    found = zlib.crc32(content[first:end], zlib.crc32(content[at : first - 4]))
    if found != checksum:
        return None, at
    return Batch(sequence, size, array("Q", content[first:end])), end


def _is_sound(batch: Batch) -> bool:
    """Ranges need not be whole blocks: a disk that ended inside of one may have grown there."""
    if batch.size >= 1 << 63:
        return False
    starts, ends, kinds = (batch.records[column::3] for column in range(3))
    if not starts:
        return True
    is_in_order = all(map(lt, starts, ends))
    return is_in_order and max(ends) <= batch.size and max(kinds) <= Kind.ZERO


def _has_batch_after(content: bytes, at: int) -> bool:
    """Is there a good one behind this place?  Then it was not a crash that left it so."""
    while (at := content.find(_BATCH_MAGIC, at + 1)) >= 0:
        if _read_batch(content, at)[0] is not None:
            return True
    return False


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Raises OSError; what was written of it by then is behind the last good batch."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        offset, view = offset + count, view[count:]
