"""From a label of LVM2 to its text: which physical volume this is, and what is written on it.

The structures are those of lvm2's lib/format_text/layout.h and lib/label/label.c.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

from imgfs.guest.lvm_text import BadText, Section, parse
from imgfs.steps import Read, Steps, read_all

SECTOR = 512

_LABEL = struct.Struct("<8sQII8s")  # id, its sector, checksum, offset of what follows, type
_CHECKED_FROM = 20  # byte of the label
_UUID_LENGTH = 32
_AREA = struct.Struct("<QQ")  # offset, size; a list of them ends with zeroes
_MOST_AREAS = 16
_HEADER_SIZE = 512  # of a metadata area
_HEADER = struct.Struct("<I16sIQQ")  # checksum, magic, version, start, size
_MAGIC = b" LVM2 x[5A%r0N*>"
_PLACE = struct.Struct("<QQII")  # offset and size of the text, checksum, flags
_IGNORED = 1
_CRC_START = 0xF597A6CF
_MOST_TEXT = 2 << 20


@dataclass(slots=True)
class PhysicalVolume:
    """`start` and `size` are those of the range on the disk, in bytes.

    `texts` has what its metadata areas say, each once; `refused` why that cannot be trusted.
    """

    start: int
    size: int
    uuid: str = ""
    areas: list[tuple[int, int]] = field(default_factory=list)  #: metadata: offset, size
    texts: dict[bytes, Section] = field(default_factory=dict)
    refused: str = ""


def crc(data: bytes) -> int:
    """The CRC-32 that LVM2 has: another start, and not inverted at the end."""
    return zlib.crc32(data, _CRC_START ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def read_label(start: int, size: int, label: bytes, offset: int) -> PhysicalVolume:
    """The physical volume in that range; `label` is the sector at `offset` in it."""
    volume = PhysicalVolume(start, size)
    _, sector, checksum, follows, _ = _LABEL.unpack_from(label)
    if sector * SECTOR != offset:
        volume.refused = f"the label at byte {offset} says that it is in sector {sector}"
    elif crc(label[_CHECKED_FROM:]) != checksum:
        volume.refused = f"the label at byte {offset} has a wrong checksum"
    elif not _LABEL.size <= follows <= SECTOR - _UUID_LENGTH - 8:
        volume.refused = f"the label at byte {offset} ends at its byte {follows}"
    else:
        volume.uuid = label[follows : follows + _UUID_LENGTH].decode("ascii", "replace")
        _read_areas(volume, label, follows + _UUID_LENGTH + 8)
    return volume


def _read_areas(volume: PhysicalVolume, label: bytes, at: int) -> None:
    """Two lists: where data is (the text says it better), and where metadata is."""
    for is_metadata in (False, True):
        for _ in range(_MOST_AREAS):
            if at + _AREA.size > len(label):
                volume.refused = "the list of areas in its label has no end"
                return
            offset, size = _AREA.unpack_from(label, at)
            at += _AREA.size
            if not offset:
                break
            if is_metadata:
                if size < 2 * _HEADER_SIZE or offset + size > volume.size:
                    volume.refused = (
                        f"metadata of {size} bytes at byte {offset} is not in its {volume.size}"
                    )
                    return
                volume.areas.append((offset, size))
        else:
            volume.refused = f"its label lists more than {_MOST_AREAS} areas"
            return


def read_texts(volumes: list[PhysicalVolume]) -> Steps[None]:
    """Fill in `texts` and `refused` of all.  Two round trips."""
    areas = [(each, area) for each in volumes if not each.refused for area in each.areas]
    headers = yield from read_all(
        [Read(volume.start + offset, _HEADER_SIZE) for volume, (offset, _) in areas]
    )
    reads: list[Read] = []
    wanted: list[tuple[PhysicalVolume, int, int]] = []  # its text is of so many reads, checksum
    for (volume, area), header in zip(areas, headers, strict=True):
        place = _text_place(volume, area, header)
        if place is not None:
            parts = _text_reads(volume.start, area, *place[:2])
            wanted.append((volume, len(parts), place[2]))
            reads += parts
    found = iter((yield from _in_batches(reads)))
    for volume, count, checksum in wanted:
        _take_text(volume, b"".join(next(found) for _ in range(count)), checksum)


def _in_batches(reads: list[Read]) -> Steps[list[bytes]]:
    """At most eight texts at a time, for there may be as many volumes as partitions."""
    found: list[bytes] = []
    for at in range(0, len(reads), 8):
        found += yield from read_all(reads[at : at + 8])
    return found


def _text_place(
    volume: PhysicalVolume, area: tuple[int, int], header: bytes
) -> tuple[int, int, int] | None:
    """(offset in the area, length, checksum); None where there is no text, or `refused` is set."""
    offset, size = area
    checksum, magic, version, start, length = _HEADER.unpack_from(header)
    where = f"the metadata at byte {offset}"
    if magic != _MAGIC or version != 1:
        volume.refused = f"{where} has no header"
    elif crc(header[4:]) != checksum:
        volume.refused = f"{where} has a header with a wrong checksum"
    elif (start, length) != area:
        volume.refused = f"{where} says that it is {length} bytes at {start}, its label {size}"
    if volume.refused:
        return None
    at, text, text_crc, flags = _PLACE.unpack_from(header, _HEADER.size)
    if any(_PLACE.unpack_from(header, _HEADER.size + _PLACE.size)[:2]):
        volume.refused = f"{where} was being changed"
    elif not text or flags & _IGNORED:
        return None
    elif not _HEADER_SIZE <= at < size or text > min(size - _HEADER_SIZE, _MOST_TEXT):
        volume.refused = f"{where} has a text of {text} bytes at {at} of its {size}"
    return None if volume.refused else (at, text, text_crc)


def _text_reads(start: int, area: tuple[int, int], at: int, length: int) -> list[Read]:
    """A text that does not fit before the area's end goes on behind its header."""
    first = min(length, area[1] - at)
    reads = [Read(start + area[0] + at, first)]
    if first < length:
        reads.append(Read(start + area[0] + _HEADER_SIZE, length - first))
    return reads


def _take_text(volume: PhysicalVolume, text: bytes, checksum: int) -> None:
    if crc(text) != checksum:
        volume.refused = "its metadata has a wrong checksum"
    elif text not in volume.texts:
        try:
            volume.texts[text] = parse(text.rstrip(b"\0").decode("utf-8"))
        except (BadText, UnicodeDecodeError) as exc:
            volume.refused = f"its metadata cannot be read: {exc}"
