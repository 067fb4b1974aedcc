"""The GUID partition table, as chapter 5 of the UEFI specification has it."""

from __future__ import annotations

import struct
import uuid
import zlib
from dataclasses import dataclass

from imgfs.guest.mbr import PROTECTIVE, Entry
from imgfs.guest.signature import Sample
from imgfs.guest.tables import Slot, Table, refuse_misplaced
from imgfs.steps import Steps, read

SIGNATURE = b"EFI PART"
SECTOR_SIZES = (512, 4096, 1024, 2048)

_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")
_CRC = slice(16, 20)
_REVISION = 0x00010000
_MOST_BYTES = 1 << 20  # of all entries


@dataclass(frozen=True, slots=True)
class _Header:
    sector: int  #: its size in bytes
    at: int  #: sector that the header is in
    first_usable: int
    last_usable: int
    entries_at: int
    entries: int
    entry_size: int
    entries_crc: int


def is_signed(ends: Sample) -> bool:
    """Whether there is the signature of a header where one may be."""
    return any(_header(ends, *place).startswith(SIGNATURE) for place in _places(ends.size))


def read_table(protective: list[Entry], ends: Sample) -> Steps[Table]:
    """The partitions of a disk whose MBR has the `protective` entries.  Mostly the sample of its
    ends has all of the table; else a round trip for each array of entries that is tried."""
    wrong = []
    for sector, at in _places(ends.size):
        data = _header(ends, sector, at)
        if not data.startswith(SIGNATURE):
            continue
        header = _parse(data, sector, at, ends.size)
        if isinstance(header, str):
            wrong.append(f"the header in sector {at} is bad: {header}")
            continue
        start, length = header.entries_at * sector, header.entries * header.entry_size
        found = ends.at(start, length) or (yield from read(start, length))
        if len(found) < length or zlib.crc32(found) != header.entries_crc:
            wrong.append(f"the entries of the header in sector {at} have a wrong checksum")
            continue
        return _table(ends.size, header, found, protective)
    return Table(
        "gpt", refused="; ".join(wrong) or "its MBR says that there is a GPT; there is none"
    )


def _places(size: int) -> list[tuple[int, int]]:
    """(sector size, sector) where a header may be: behind the first sector, and in the last."""
    first = [(each, 1) for each in SECTOR_SIZES]
    return first + [(each, size // each - 1) for each in SECTOR_SIZES]


def _header(ends: Sample, sector: int, at: int) -> bytes:
    return ends.at(at * sector, sector)


def _parse(data: bytes, sector: int, at: int, size: int) -> _Header | str:
    """The header, or what is wrong with it."""
    _, revision, length, crc, _, mine, _, first, last, *rest = _HEADER.unpack_from(data)
    _, entries_at, count, each, entries_crc = rest
    if revision != _REVISION:
        return f"revision {revision:#x}"
    if not _HEADER.size <= length <= len(data):
        return f"its size is {length}"
    checked = bytearray(data[:length])
    checked[_CRC] = bytes(4)
    if zlib.crc32(checked) != crc:
        return f"its checksum is not {crc:#010x}"
    if mine != at:
        return f"it says that it is in sector {mine}"
    if each < _ENTRY.size or each & (each - 1) or not 0 < count * each <= _MOST_BYTES:
        return f"it has {count} entries of {each} bytes"
    if not first <= last < size // sector:
        return f"sectors {first} to {last} of {size // sector} are said to be usable"
    behind = entries_at + -(-count * each // sector)
    if entries_at < 2 or behind > size // sector or (entries_at <= last and behind > first):
        return f"its entries are in sector {entries_at}, among the partitions or not on the disk"
    return _Header(sector, at, first, last, entries_at, count, each, entries_crc)


def _table(size: int, header: _Header, data: bytes, protective: list[Entry]) -> Table:
    slots = []
    for index in range(header.entries):
        entry = _ENTRY.unpack_from(data, index * header.entry_size)
        kind, _, first, last, _, name = entry
        if not any(kind):
            continue
        refused = ""
        if not header.first_usable <= first <= last <= header.last_usable:
            refused = (
                f"sectors {first} to {last} are not in the usable ones, "
                f"{header.first_usable} to {header.last_usable}"
            )
        slots.append(
            Slot(
                number=index + 1,
                start=first * header.sector,
                size=max(last + 1 - first, 0) * header.sector,
                type=str(uuid.UUID(bytes_le=kind)),
                name=name.decode("utf-16-le", "replace").partition("\0")[0],
                refused=refused,
            )
        )
    placed = refuse_misplaced(slots, size, ())
    return Table("gpt", placed, _hybrid(header, slots, protective), header.sector)


def _hybrid(header: _Header, slots: list[Slot], protective: list[Entry]) -> str:
    """Why the MBR of a GPT disk says something else than the GPT; or nothing."""
    real = {(slot.start, slot.size) for slot in slots}
    for index, entry in enumerate(protective):
        place = (entry.first * header.sector, entry.sectors * header.sector)
        if entry.type not in (0, PROTECTIVE) and place not in real:
            where = f"at sector {entry.first}"
            return f"partition {index + 1} of the hybrid MBR, {where}, is none of the GPT"
    return ""
