"""Whether the log of xfs ends with the record of an unmount: then nothing waits in it.

The log is a ring of sectors of 512 bytes.  Each begins with the number of the round (cycle) in
which it was written, or is a record's header and has it next.  The head is where the
numbers change.
"""

from __future__ import annotations

import struct

from imgfs.guest.doubt import Doubt, NotShutDown, read_whole
from imgfs.steps import Read, Steps

SECTOR = 512
_MAGIC = 0xFEEDBABE
_HEADER_COVERS = 32768  # bytes of a record; longer ones have more headers
_LARGEST_RECORD = 256 << 10
_PROBES = 16  # sectors looked at together
_UNMOUNT = 0x20  # flag of an operation
_UNMOUNT_MAGICS = (0x556E, 0x6E55)  # in the byte order of the machine that wrote it
_LOG_CLIENT = 0xAA


def check_unmounted(start: int, length: int, uuid: bytes) -> Steps[None]:
    """Of the log at bytes [start, start + length) of file 0.  Raises Doubt where it may have
    something to say that is not in the filesystem yet."""
    sectors = length // SECTOR
    head, last = yield from _find_head(start, sectors)
    window = min(_LARGEST_RECORD // SECTOR + 16, sectors)
    first = head - window  # negative where the ring goes on before its first sector
    reads = [Read(start + max(first, 0) * SECTOR, min(window, head) * SECTOR)]
    if first < 0:
        reads.append(Read(start + (sectors + first) * SECTOR, -first * SECTOR))
    if last is not None:
        reads.append(Read(start + head * SECTOR, min(window, sectors - head) * SECTOR))
    found = yield from read_whole(reads)
    if last is not None and any(
        _cycle(found[-1], at) != last for at in range(0, len(found[-1]), SECTOR)
    ):
        raise NotShutDown(f"the log was being written beyond sector {head}")
    newest = found[1] + found[0] if first < 0 else found[0]
    _check_record(newest, head, sectors, uuid)


def _cycle(data: bytes, at: int = 0) -> int:
    first, second = struct.unpack_from(">2I", data, at)
    return int(second if first == _MAGIC else first)


def _find_head(start: int, sectors: int) -> Steps[tuple[int, int | None]]:
    """The sector after the newest, and the cycle of those behind it; None where it is the end of
    the log."""
    reads = [Read(start, SECTOR), Read(start + (sectors - 1) * SECTOR, SECTOR)]
    first, last = (_cycle(data) for data in (yield from read_whole(reads)))
    if first == last:
        return sectors, None
    if first != last + 1:
        raise Doubt(f"the log begins with cycle {first} and ends with {last}")
    newer, older = 0, sectors - 1
    while older - newer > 1:
        step = max(1, (older - newer) // (_PROBES + 1))
        probes = range(newer + step, older, step)
        found = yield from read_whole([Read(start + at * SECTOR, SECTOR) for at in probes])
        for at, data in zip(probes, found, strict=True):
            cycle = _cycle(data)
            if cycle == last:
                older = at
                break
            if cycle != first:
                raise Doubt(f"sector {at} of the log has cycle {cycle}, not {first} or {last}")
            newer = at
    return older, last


def _check_record(data: bytes, head: int, sectors: int, uuid: bytes) -> None:
    """Of sectors up to the head, the last record must be that of an unmount, and end there."""
    at = len(data) - SECTOR
    while at >= 0 and int.from_bytes(data[at : at + 4], "big") != _MAGIC:
        at -= SECTOR
    if at < 0:
        raise Doubt(f"no record of the log ends before sector {head}")
    (cycle, version, length, lsn) = struct.unpack_from(">3IQ", data, at + 4)
    (operations,) = struct.unpack_from(">I", data, at + 40)
    (size,) = struct.unpack_from(">I", data, at + 320)
    sector = (head - (len(data) - at) // SECTOR) % sectors
    headers = max(1, -(-size // _HEADER_COVERS)) if version & 2 else 1
    payload = at + headers * SECTOR
    named = f"the record at sector {sector} of the log"
    if lsn != cycle << 32 | sector or data[at + 304 : at + 320] != uuid:
        raise Doubt(f"{named} is not of this log")
    if payload + -(-length // SECTOR) * SECTOR != len(data) or length < 20:
        raise Doubt(f"{named} has {length} bytes and does not end at sector {head}")
    (client, flags, _, magic) = struct.unpack_from(">2BHH", data, payload + 8)
    unmount = flags == _UNMOUNT and magic in _UNMOUNT_MAGICS
    if operations != 1 or client != _LOG_CLIENT or not unmount:
        raise NotShutDown(f"{named} is not an unmount record: the log needs recovery")
