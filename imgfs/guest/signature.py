"""What a partition, a logical volume or a whole disk holds, by its signatures.

All of them count, also those that lie where the filesystem in it would not look: an old one that
nobody wiped is told from what is in use by nothing that could be relied upon.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from imgfs.guest import signature_tables as tables
from imgfs.steps import Read, Steps, read_all

FILESYSTEMS = ("ext", "xfs", "ntfs", "vfat", "exfat", "btrfs", "swap")

HEAD = 136 * 1024 + 4096
_TAIL = 132 * 1024
_SECTOR = 512


@dataclass(frozen=True, slots=True)
class Sample:
    """Those bytes of a range in which signatures are: its two ends, and a few in between."""

    size: int  #: of the range, in bytes
    parts: tuple[tuple[int, bytes], ...]  #: (offset in the range, bytes)

    def at(self, offset: int, length: int) -> bytes:
        """The bytes there, or none where they are not in the range or were not read."""
        if offset < 0:
            return b""
        for start, data in self.parts:
            if start <= offset and offset + length <= start + len(data):
                return data[offset - start : offset - start + length]
        return b""


def sample(start: int, size: int) -> Steps[Sample]:
    """Of the range of `size` bytes at byte `start` of file 0.  One round trip."""
    wanted = _places(size)
    found = yield from read_all([Read(start + offset, length) for offset, length in wanted])
    parts = tuple((place[0], data) for place, data in zip(wanted, found, strict=True))
    return Sample(size, parts)


def _places(size: int) -> list[tuple[int, int]]:
    """(offset, length) of what a `Sample` has, none of them empty or past the end."""
    tail = max(size - _TAIL, 0) // _SECTOR * _SECTOR
    places = [(0, HEAD), (tail, size - tail)]
    places += [(offset, _SECTOR) for offset in tables.LUKS2_SECOND]
    places += [
        (label + tables.ZFS_CHECK, tables.ZFS_ROOT + tables.ZFS_ROOTS_READ - tables.ZFS_CHECK)
        for label in _zfs_labels(size)
    ]
    for offset, magic, _ in tables.MAGICS:
        at = _place(offset, size)
        if at + len(magic) > HEAD and at < tail:
            places.append((at, len(magic)))
    clipped = [(at, min(length, size - at)) for at, length in places if 0 <= at < size]
    return list(dict.fromkeys(place for place in clipped if place[1]))


def signatures(found: Sample) -> list[str]:
    """The names of all, each once: one of `FILESYSTEMS`, or what else it is."""
    names = [name for offset, magic, name in tables.MAGICS if _is_there(found, offset, magic)]
    names += ["vfat"] if _is_vfat(found) else []
    names += [tables.LVM2] if lvm_label(found) >= 0 else []
    names += ["RAID member (md)"] if _is_md(found) else []
    names += ["ZFS"] if any(_is_zfs(found, label) for label in _zfs_labels(found.size)) else []
    names += _second_luks2(found) if "LUKS2" not in names else []
    return list(dict.fromkeys(names))


def _is_there(found: Sample, offset: int, magic: bytes) -> bool:
    return found.at(_place(offset, found.size), len(magic)) == magic


def _place(offset: int, size: int) -> int:
    """What counts from the end counts in whole sectors."""
    return offset if offset >= 0 else size // _SECTOR * _SECTOR + offset


def lvm_label(found: Sample) -> int:
    """The offset of a physical volume's label, in one of the first four sectors; -1: none."""
    for offset in range(0, 4 * _SECTOR, _SECTOR):
        if found.at(offset, 8) == b"LABELONE" and found.at(offset + 24, 8) == b"LVM2 001":
            return offset
    return -1


def _is_vfat(found: Sample) -> bool:
    """The first sector makes sense as that of a FAT: it need not have a signature of its own."""
    sector = found.at(0, _SECTOR)
    if len(sector) < _SECTOR or sector[510:] != b"\x55\xaa" or sector[0] not in (0xEB, 0xE9):
        return False
    sector_size, cluster, reserved, fats = struct.unpack_from("<HBHB", sector, 11)
    return (
        sector_size in (512, 1024, 2048, 4096)
        and cluster.bit_count() == 1
        and reserved > 0
        and fats > 0
        and (sector[21] == 0xF0 or sector[21] >= 0xF8)
        and sector[54:62] not in (b"JFS     ", b"HPFS    ")  # OS/2 writes half of a FAT's there
    )


def _is_md(found: Sample) -> bool:
    if found.size > tables.MD_90_ALIGN:
        aligned = found.size // tables.MD_90_ALIGN * tables.MD_90_ALIGN
        magic = found.at(aligned - tables.MD_90_ALIGN, 4)
        if magic in (struct.pack("<I", tables.MD_MAGIC), struct.pack(">I", tables.MD_MAGIC)):
            return True
    for offset in (0, 4096, found.size // 4096 * 4096 - 8192):
        head = found.at(offset, 256)
        if len(head) == 256 and struct.unpack_from("<II", head) == (tables.MD_MAGIC, 1):
            (sector,) = struct.unpack_from("<Q", head, tables.MD_1_SUPER_OFFSET)
            # Or else it is that of the last partition, seen from the disk, or of another disk.
            if sector * _SECTOR == offset:
                return True
    return False


def _zfs_labels(size: int) -> list[int]:
    whole = size // tables.ZFS_LABEL * tables.ZFS_LABEL
    ends = [whole - 2 * tables.ZFS_LABEL, whole - tables.ZFS_LABEL]
    return [0, tables.ZFS_LABEL, *(each for each in ends if each > tables.ZFS_LABEL)]


def _is_zfs(found: Sample, label: int) -> bool:
    check = tables.ZFS_CHECK_MAGIC
    if found.at(label + tables.ZFS_CHECK, 8) in (
        struct.pack("<Q", check),
        struct.pack(">Q", check),
    ):
        return True
    root = tables.ZFS_ROOT_MAGIC
    return any(
        found.at(label + tables.ZFS_ROOT + slot, 8)
        in (struct.pack("<Q", root), struct.pack(">Q", root))
        for slot in range(0, tables.ZFS_ROOTS_READ, 1024)
    )


def _second_luks2(found: Sample) -> list[str]:
    for offset in tables.LUKS2_SECOND:
        head = found.at(offset, _SECTOR)
        if head.startswith(tables.LUKS2_SECOND_MAGIC):
            (at,) = struct.unpack_from(">Q", head, tables.LUKS2_HEADER_OFFSET)
            if at == offset:
                return [tables.SECOND_LUKS2]
    return []
