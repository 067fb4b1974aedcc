"""How large the sectors are that a DOS partition table counts: it does not say.

They are those of the disk that it was made on: 512 bytes mostly, 2048 on cameras' cards and
magneto-optical disks, 4096 behind USB bridges and on 4Kn disks.  What tells is where the table's
partitions, with each of the sizes, begin with something that is known.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from imgfs.guest.mbr import EXTENDED, Entry, entries
from imgfs.guest.signature import HEAD, Sample, signatures
from imgfs.guest.tables import SECTOR
from imgfs.steps import Read, Steps, read_all

_OTHERS = (4096, 2048, 1024)
_AT_THE_END = 2 << 20  # a last partition that ends so close to the disk's end ends there
_BPB = struct.Struct("<H")  # bytes of a sector, of FAT and NTFS
_BPB_AT, _HIDDEN_AT = 11, 28  # the latter: sectors before the partition


@dataclass(frozen=True, slots=True)
class _Evidence:
    """Where partitions begin with something known, if the sectors have this size."""

    sector: int
    places: frozenset[int]
    is_said: bool  #: a filesystem says itself that it has sectors like that, as many before it


def find_sector(
    size: int, primary: Sequence[Entry], known: Collection[int]
) -> Steps[tuple[int, str]]:
    """Of a disk of `size` bytes with these entries: bytes of a sector, and why that cannot be
    told, or nothing.

    `known` are the bytes at which partitions begin with something that is known, primary and
    logical ones and the tables of these, if the sectors have 512 bytes.
    """
    used = [each for each in primary if each.type]
    if all(each.first * SECTOR in known for each in used):
        return SECTOR, ""
    end = max(each.first + each.sectors for each in used)
    fitting = [each for each in _OTHERS if end * each <= size]
    # A medium of which only the beginning was copied has partitions past its end.
    tried = fitting if known else _OTHERS
    if not tried:
        return SECTOR, ""
    found = yield from _look(size, used, [SECTOR, *tried])
    small = _Evidence(SECTOR, found[0].places | frozenset(known), found[0].is_said)
    best = small
    for other in found[1:]:
        if other.places > best.places:
            best = other
        elif other.places == best.places and other.places and other.is_said != best.is_said:
            best = other if other.is_said else best
    rivals = [each for each in (small, *found[1:]) if each is not best]
    for each in rivals:
        if not each.places < best.places and each.places and not _is_settled(best, each):
            why = f"of {best.sector} or of {each.sector} bytes: there is something at the places of"
            return SECTOR, f"it cannot be told whether its sectors are {why} both"
    if not best.places:
        for sector in fitting:
            if size - end * sector < _AT_THE_END:
                why = f"its partitions end where the disk does if its sectors have {sector} bytes"
                return SECTOR, f"{why}, and nothing that is known is in them if these have 512"
    return best.sector, ""


def _is_settled(best: _Evidence, other: _Evidence) -> bool:
    return best.places == other.places and best.is_said and not other.is_said


def _look(size: int, used: Sequence[Entry], sectors: Sequence[int]) -> Steps[list[_Evidence]]:
    places = [(sector, each) for sector in sectors for each in used]
    reads = [Read(each.first * sector, HEAD) for sector, each in places]
    inside = [each for each in reads if each.offset < size]
    heads = dict(zip(inside, (yield from read_all(inside)), strict=True))
    found = []
    for sector in sectors:
        known, is_said = set(), False
        for (of, entry), read in zip(places, reads, strict=True):
            head = heads.get(read, b"")
            if of == sector and _is_known(entry, head, sector):
                known.add(read.offset)
                is_said = is_said or _says(entry, head, sector)
        found.append(_Evidence(sector, frozenset(known), is_said))
    return found


def _is_known(entry: Entry, head: bytes, sector: int) -> bool:
    if entry.type in EXTENDED:
        return any(each.type for each in entries(head[:SECTOR]) or ())
    return bool(signatures(Sample(max(entry.sectors * sector, len(head)), ((0, head),))))


def _says(entry: Entry, head: bytes, sector: int) -> bool:
    if len(head) < SECTOR or head[510:512] != b"\x55\xaa" or entry.type in EXTENDED:
        return False
    (size,) = _BPB.unpack_from(head, _BPB_AT)
    hidden = int.from_bytes(head[_HIDDEN_AT : _HIDDEN_AT + 4], "little")
    return size == sector and hidden == entry.first
