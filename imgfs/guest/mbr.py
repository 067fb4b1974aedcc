"""The DOS partition table, with logical partitions, as fdisk and Linux's block/partitions/msdos.c
have it.  Its numbers are sectors of the disk; how large these are it does not say (see
`mbr_sector`)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from imgfs.guest.tables import SECTOR, Slot, Table, refuse_misplaced
from imgfs.steps import Steps, read

PROTECTIVE = 0xEE

_ENTRIES = 446
_ENTRY = struct.Struct("<B3xB3xII")  # status, type, first sector, sectors
_SIGNATURE = b"\x55\xaa"
EXTENDED = (0x05, 0x0F, 0x85)
MOST_PRIMARY = 4
_MOST_LOGICAL = 128


@dataclass(frozen=True, slots=True)
class Entry:
    """Sectors; those of a logical partition count from where its own table or the first one is."""

    type: int
    first: int
    sectors: int


def entries(sector: bytes) -> list[Entry] | None:
    """The four of a table, also the empty ones; None where the sector is no table."""
    if len(sector) < SECTOR or sector[SECTOR - 2 : SECTOR] != _SIGNATURE:
        return None
    found = []
    for index in range(MOST_PRIMARY):
        status, kind, first, sectors = _ENTRY.unpack_from(sector, _ENTRIES + index * _ENTRY.size)
        if status not in (0, 0x80):
            return None
        used = kind and sectors
        found.append(Entry(kind, first, sectors) if used else Entry(0, 0, 0))
    return found


def read_table(size: int, primary: list[Entry], sector: int = SECTOR) -> Steps[Table]:
    """The partitions of a disk of `size` bytes, in sectors of `sector` bytes, with these entries.
    A round trip for each logical partition: where the next one is described is known only then."""
    slots: list[Slot] = []
    kept = [(0, SECTOR, "the partition table")]
    reasons = []
    number = 5
    for index, entry in enumerate(primary):
        if entry.type in EXTENDED:
            chain = yield from _logical(size, entry, number, sector)
            slots += chain.slots
            kept += chain.tables
            number += len(chain.slots)
            if chain.broken:
                reasons.append(f"extended partition {index + 1}: {chain.broken}")
        elif entry.type:
            slots.append(_slot(index + 1, entry, 0, sector))
    outside = _outside_of_extended(primary, slots, sector)
    placed = refuse_misplaced(outside, size, kept)
    return Table("mbr", placed, "; ".join(reasons), sector)


def _slot(number: int, entry: Entry, base: int, sector: int) -> Slot:
    start = (base + entry.first) * sector
    return Slot(number, start, entry.sectors * sector, f"0x{entry.type:02x}")


def _outside_of_extended(primary: list[Entry], slots: list[Slot], sector: int) -> list[Slot]:
    """Primary partitions may not lie in an extended one."""
    checked = []
    for slot in slots:
        for entry in primary:
            start, end = entry.first * sector, (entry.first + entry.sectors) * sector
            if (
                slot.number <= MOST_PRIMARY
                and entry.type in EXTENDED
                and slot.start < end
                and start < slot.end
            ):
                why = f"it overlaps the extended partition at byte {start}"
                slot = Slot(slot.number, slot.start, slot.size, slot.type, refused=why)
        checked.append(slot)
    return sorted(checked, key=lambda each: each.number)


@dataclass(slots=True)
class _Chain:
    slots: list[Slot]
    tables: list[tuple[int, int, str]]
    broken: str = ""


def _logical(size: int, extended: Entry, number: int, sector: int) -> Steps[_Chain]:
    """The logical partitions: each table describes one, and where the next table is."""
    chain = _Chain([], [])
    first, end = extended.first, extended.first + extended.sectors
    at, seen = first, set[int]()
    while True:
        if at in seen:
            chain.broken = f"its tables go round in a circle at sector {at}"
            return chain
        if not first <= at < end or at * sector + SECTOR > size:
            chain.broken = f"the next table, at sector {at}, is outside of it or of the disk"
            return chain
        if len(seen) == _MOST_LOGICAL:
            chain.broken = f"it has more than {_MOST_LOGICAL} logical partitions"
            return chain
        seen.add(at)
        found = entries((yield from read(at * sector, SECTOR)))
        if found is None:
            chain.broken = f"there is no partition table at sector {at}"
            return chain
        start = at * sector
        chain.tables.append((start, start + SECTOR, f"the table at sector {at}"))
        links = [each for each in found if each.type in EXTENDED]
        data = [each for each in found if each.type and each.type not in EXTENDED]
        if len(links) > 1 or len(data) > 1:
            chain.broken = f"the table at sector {at} has more than a partition and the next table"
            return chain
        for entry in data:
            slot = _slot(number + len(chain.slots), entry, at, sector)
            if slot.start < first * sector or slot.end > end * sector:
                why = f"it is not in the extended partition, sectors {first} to {end}"
                slot = Slot(slot.number, slot.start, slot.size, slot.type, refused=why)
            chain.slots.append(slot)
        if not links:
            return chain
        at = first + links[0].first
