"""FAT12, FAT16 and FAT32: free is a cluster whose entry in every copy of the table is zero.

As in Microsoft's FAT specification of 2005 (fatgen103); how the three are told apart, and the
state byte, as Linux's fs/fat has them.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from itertools import pairwise

from imgfs._native._tables import runs
from imgfs.guest.space import Filesystem
from imgfs.steps import Read, Steps, read, read_all

KIND = "vfat"

_BOOT = 512
_BPB = struct.Struct("<HBHBHHBHHHII")  # from byte 11 on
_BPB_AT = 11
_BPB32 = struct.Struct("<IHHIHH")  # from byte 36 on, of a FAT32 only
_BPB32_AT = 36
_STATE, _STATE_32 = 37, 65  # bytes that Linux and Windows keep flags in
_SERIAL, _SERIAL_32 = 39, 67  # with the label behind it
_NOT_CLEAN = 3  # dirty, and a test of the surface is wanted
_DIR_ENTRY = 32
_LABEL_ENTRY = 0x08
_ATTRIBUTES = 11
_DELETED = 0xE5
_MOST_12, _MOST_16, _MOST_32 = 4084, 65524, 0x0FFFFFF4
_CHUNK = 4 << 20  # bytes of each table at once
_MOST_TABLES = 4
_ROOT_READ = 64 * 1024


@dataclass(frozen=True, slots=True)
class _Layout:
    """Bytes from the filesystem's start."""

    bits: int  #: 12, 16 or 32
    size: int
    cluster: int
    clusters: int
    tables: tuple[int, ...]  #: where each copy of the table begins
    table_size: int  #: as much of it as has entries
    data: int  #: where cluster 2 begins
    root: tuple[int, int]  #: offset and length of the root directory, or of its first cluster


def look(start: int, size: int) -> Steps[Filesystem]:
    """The filesystem at byte `start` of file 0, in a partition of `size` bytes."""
    boot = yield from read(start, min(size, _BOOT))
    layout = _layout(boot, size)
    if isinstance(layout, str):
        return _whole(size, layout)
    serial = _SERIAL_32 if layout.bits == 32 else _SERIAL
    if boot[_STATE_32 if layout.bits == 32 else _STATE] & _NOT_CLEAN:
        why = "it was not unmounted: the state in its first sector is dirty"
        return _whole(layout.size, why, not_shut_down=True)
    free = array("Q")
    label = b""
    for at in range(0, layout.table_size, _CHUNK):
        length = min(_CHUNK, layout.table_size - at)
        reads = [Read(start + table + at, length) for table in layout.tables]
        reads += [] if at else [Read(start + layout.root[0], layout.root[1])]
        found = yield from read_all(reads)
        first = found[0]
        if any(each != first for each in found[1 : len(layout.tables)]):
            return _whole(layout.size, f"its {len(layout.tables)} tables differ from byte {at} on")
        if at == 0:
            why = _not_clean(first, layout.bits)
            if why:
                return _whole(layout.size, why, not_shut_down=True)
            label = _label(found[-1])
        _add_free(free, first, at, layout)
    (number,) = struct.unpack_from("<I", boot, serial)
    count = sum(end - begin for begin, end in zip(free[::2], free[1::2], strict=True))
    return Filesystem(
        kind=KIND,
        size=layout.size,
        label=(label or _boot_label(boot[serial + 4 : serial + 15])).decode("cp437").rstrip(),
        uuid=f"{number >> 16:04X}-{number & 0xFFFF:04X}",
        used=layout.clusters * layout.cluster - count,
        free=free,
    )


def _layout(boot: bytes, size: int) -> _Layout | str:
    """Where everything is, or what is wrong with the first sector."""
    if len(boot) < _BOOT:
        return f"the partition has {size} bytes"
    fields = _BPB.unpack_from(boot, _BPB_AT)
    sector, per_cluster, reserved, tables, root_entries, sectors, _, table_sectors = fields[:8]
    if sector not in (512, 1024, 2048, 4096):
        return f"sectors of {sector} bytes"
    if per_cluster.bit_count() != 1 or not reserved or not 0 < tables <= _MOST_TABLES:
        return f"{per_cluster} sectors a cluster, {reserved} reserved sectors, {tables} tables"
    is_32 = table_sectors == 0
    sectors = sectors or fields[11]
    root_cluster = 0
    if is_32:
        table_sectors, flags, version, root_cluster, _, _ = _BPB32.unpack_from(boot, _BPB32_AT)
        if flags & 0x80 or version:
            return f"FAT32 with the flags {flags:#x} and version {version:#x}"
        if root_entries:
            return f"FAT32 with {root_entries} entries in its root directory"
    if sectors * sector > size:
        return f"it has {sectors} sectors of {sector} bytes, and its partition {size} bytes"
    root_at = (reserved + tables * table_sectors) * sector
    root_length = -(-root_entries * _DIR_ENTRY // sector) * sector
    cluster = sector * per_cluster
    clusters = (sectors * sector - root_at - root_length) // cluster
    bits = 32 if is_32 else 12 if clusters <= _MOST_12 else 16
    most = {12: _MOST_12, 16: _MOST_16, 32: _MOST_32}[bits]
    length = -(-(clusters + 2) * bits // 8)
    if not 0 < clusters <= most or length > table_sectors * sector:
        return f"{clusters} clusters in tables of {table_sectors} sectors, with {bits} bits each"
    data = root_at + root_length
    if is_32:
        if not 2 <= root_cluster < clusters + 2:
            return f"its root directory is in cluster {root_cluster} of {clusters}"
        root_at, root_length = data + (root_cluster - 2) * cluster, cluster
    elif not root_length:
        return "its root directory has no entries"
    return _Layout(
        bits=bits,
        size=sectors * sector,
        cluster=cluster,
        clusters=clusters,
        tables=tuple((reserved + each * table_sectors) * sector for each in range(tables)),
        table_size=length,
        data=data,
        root=(root_at, min(root_length, _ROOT_READ)),
    )


def _not_clean(table: bytes, bits: int) -> str:
    """The second entry has a bit for a clean end, and one for no errors, both set when all is
    well; FAT12 has neither."""
    if bits == 12:
        return ""
    entry = int.from_bytes(table[bits // 8 : bits // 4], "little")
    clean, no_errors = (0x8000, 0x4000) if bits == 16 else (0x08000000, 0x04000000)
    if not entry & clean:
        return f"it was not unmounted: entry 1 of its table is {entry:#x}"
    return "" if entry & no_errors else f"it had errors: entry 1 of its table is {entry:#x}"


def _add_free(free: array[int], table: bytes, at: int, layout: _Layout) -> None:
    """Append what is free in this part of the table, which begins at its byte `at`."""
    if layout.bits == 32:
        spans = _zero_runs(table)
    else:
        spans = _zeroes(_entries_12(table) if layout.bits == 12 else _entries_16(table))
    first = at * 8 // layout.bits
    for begin, end in spans:
        low, high = max(first + begin, 2), min(first + end, layout.clusters + 2)
        if low >= high:
            continue
        start = layout.data + (low - 2) * layout.cluster
        stop = layout.data + (high - 2) * layout.cluster
        if free and free[-1] == start:
            free[-1] = stop
        else:
            free.extend((start, stop))


def _zero_runs(table: bytes) -> list[tuple[int, int]]:
    """The runs [start, end) of zeroes among entries of 32 bits."""
    found = runs(table, 4, False, 1)
    spans, at = [], 0
    for count, value, step in zip(found[::3], found[1::3], found[2::3], strict=True):
        if value == 0:
            spans.append((at, at + (1 if step else count)))
        at += count
    return spans


def _zeroes(entries: list[int]) -> list[tuple[int, int]]:
    edges = [-1, *(index for index, value in enumerate(entries) if value), len(entries)]
    return [(before + 1, after) for before, after in pairwise(edges) if before + 1 < after]


def _entries_16(table: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(table) // 2}H", table))


def _entries_12(table: bytes) -> list[int]:
    """Two entries are in three bytes."""
    entries = []
    for at in range(0, len(table) - 2, 3):
        both = int.from_bytes(table[at : at + 3], "little")
        entries += [both & 0xFFF, both >> 12]
    if len(table) % 3 == 2:
        entries.append(int.from_bytes(table[-2:], "little") & 0xFFF)
    return entries


def _label(directory: bytes) -> bytes:
    """The entry of the root directory that is the volume's name."""
    for at in range(0, len(directory) - _DIR_ENTRY + 1, _DIR_ENTRY):
        entry = directory[at : at + _DIR_ENTRY]
        if entry[0] == 0:
            break
        if entry[0] != _DELETED and entry[_ATTRIBUTES] & 0x3F == _LABEL_ENTRY:
            return entry[:_ATTRIBUTES]
    return b""


def _boot_label(name: bytes) -> bytes:
    return b"" if name == b"NO NAME    " else name.rstrip(b"\0 ")


def _whole(size: int, why: str, *, not_shut_down: bool = False) -> Filesystem:
    return Filesystem(KIND, size, left_whole=why, not_shut_down=not_shut_down)
