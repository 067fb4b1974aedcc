"""exFAT: free is what its allocation bitmap says, as Microsoft's specification of 2019 has it."""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass

from imgfs._native._tables import clear_runs
from imgfs.guest.space import Filesystem
from imgfs.steps import Read, Steps, read, read_all

KIND = "exfat"

_REGION_SECTORS = 12  # of the main boot region; the last one is checksums
_FIELDS = struct.Struct("<QQIIIIIIHHBBB")  # from PartitionOffset on
_FIELDS_AT = 64
_FLAGS_AT = 106  # VolumeFlags, its low byte
_UNCHECKED = (106, 107, 112)  # VolumeFlags and PercentInUse
_REVISION = 1
_SECTOR_SHIFTS = range(9, 13)
_MOST_CLUSTER_SHIFT = 25
_SECOND_TABLE, _DIRTY, _MEDIA_FAILURE = 1, 2, 4
_MOST_CLUSTERS = 0xFFFFFFF5
_DIR_ENTRY = 32
_BITMAP, _LABEL = 0x81, 0x83
_ROOT_READ = 64 * 1024
_CHUNK = 4 << 20  # bytes of the bitmap at once


@dataclass(frozen=True, slots=True)
class _Layout:
    """Bytes from the filesystem's start."""

    sector: int
    size: int
    cluster: int
    clusters: int
    table: int
    data: int  #: where cluster 2 begins
    root: int  #: first cluster of the root directory
    serial: int

    def place(self, cluster: int) -> int:
        return self.data + (cluster - 2) * self.cluster


def look(start: int, size: int) -> Steps[Filesystem]:
    """The filesystem at byte `start` of file 0, in a partition of `size` bytes."""
    boot = yield from read(start, min(size, _REGION_SECTORS << _SECTOR_SHIFTS[-1]))
    layout = _layout(boot, size)
    if isinstance(layout, str):
        return _whole(size, layout)
    if boot[_FLAGS_AT] & _DIRTY:
        why = f"it was not unmounted: VolumeFlags {boot[_FLAGS_AT]:#x}"
        return _whole(layout.size, why, not_shut_down=True)
    root_at = start + layout.place(layout.root)
    root = yield from read(root_at, min(layout.cluster, _ROOT_READ))
    label, bitmaps = _root_entries(root)
    if len(bitmaps) != 1:
        return _whole(layout.size, f"{len(bitmaps)} bitmaps begin in its root directory")
    first, length = bitmaps[0]
    span = -(-length // layout.cluster)
    if length < -(-layout.clusters // 8) or not 2 <= first <= layout.clusters + 2 - span:
        return _whole(layout.size, f"a bitmap of {length} bytes in cluster {first}")
    length = -(-layout.clusters // 8)
    span = -(-length // layout.cluster)
    free = array("Q")
    for at in range(0, length, _CHUNK):
        # The bitmap's own chain of clusters is read along: a cluster that is elsewhere shows there.
        some = range(at // layout.cluster, min(-(-(at + _CHUNK) // layout.cluster), span))
        bits, chain = yield from read_all(
            [
                Read(start + layout.place(first) + at, min(_CHUNK, length - at)),
                Read(start + layout.table + (first + some.start) * 4, len(some) * 4),
            ]
        )
        for index, link in zip(some, struct.unpack(f"<{len(some)}I", chain), strict=True):
            if index + 1 < span and link != first + index + 1:
                return _whole(layout.size, f"its bitmap goes on in cluster {link}")
        _add_free(free, bits, at, layout)
    unused = sum(end - begin for begin, end in zip(free[::2], free[1::2], strict=True))
    return Filesystem(
        kind=KIND,
        size=layout.size,
        label=label,
        uuid=f"{layout.serial >> 16:04X}-{layout.serial & 0xFFFF:04X}",
        used=layout.clusters * layout.cluster - unused,
        free=free,
    )


def _layout(boot: bytes, size: int) -> _Layout | str:
    """Where everything is, or what is wrong with the boot region."""
    if len(boot) < _FIELDS_AT + _FIELDS.size:
        return f"the partition has {size} bytes"
    fields = _FIELDS.unpack_from(boot, _FIELDS_AT)
    _, sectors, table, table_sectors, heap, clusters, root, serial = fields[:8]
    revision, flags, sector_shift, cluster_shift, tables = fields[8:]
    if sector_shift not in _SECTOR_SHIFTS or sector_shift + cluster_shift > _MOST_CLUSTER_SHIFT:
        return f"sectors of 2^{sector_shift} bytes, clusters of 2^{cluster_shift} sectors"
    sector = 1 << sector_shift
    if not _checksum_fits(boot, sector):
        return "its boot region has a wrong checksum"
    if revision >> 8 != _REVISION or tables != 1 or flags & _SECOND_TABLE:
        return f"revision {revision:#x} with {tables} tables, VolumeFlags {flags:#x}"
    if flags & _MEDIA_FAILURE:
        return f"it had errors: VolumeFlags {flags:#x}"
    if sectors * sector > size:
        return f"it has {sectors} sectors of {sector} bytes, and its partition {size} bytes"
    if table < 2 * _REGION_SECTORS or table + table_sectors > heap:
        return f"its table of {table_sectors} sectors is at sector {table}, its clusters at {heap}"
    if not 0 < clusters <= _MOST_CLUSTERS or (clusters + 2) * 4 > table_sectors * sector:
        return f"{clusters} clusters in a table of {table_sectors} sectors"
    if heap + (clusters << cluster_shift) > sectors:
        return f"{clusters} clusters from sector {heap} on, of {sectors}"
    if not 2 <= root < clusters + 2:
        return f"its root directory is in cluster {root} of {clusters}"
    cluster = sector << cluster_shift
    size = sectors * sector
    return _Layout(sector, size, cluster, clusters, table * sector, heap * sector, root, serial)


def _checksum_fits(boot: bytes, sector: int) -> bool:
    """The last sector of the region repeats the checksum of those before."""
    end = (_REGION_SECTORS - 1) * sector
    if len(boot) < end + sector:
        return False
    checksum = 0
    for at, byte in enumerate(boot[:end]):
        if at not in _UNCHECKED:
            checksum = ((checksum >> 1 | checksum << 31) + byte) & 0xFFFFFFFF
    return boot[end : end + sector] == struct.pack("<I", checksum) * (sector // 4)


def _root_entries(root: bytes) -> tuple[str, list[tuple[int, int]]]:
    """The label, and (first cluster, bytes) of the bitmaps."""
    label, bitmaps = "", []
    for at in range(0, len(root) - _DIR_ENTRY + 1, _DIR_ENTRY):
        kind, count = root[at], root[at + 1]
        if kind == 0:
            break
        if kind == _BITMAP:
            bitmaps.append(struct.unpack_from("<IQ", root, at + 20))
        elif kind == _LABEL:
            label = root[at + 2 : at + 2 + 2 * min(count, 11)].decode("utf-16-le", "replace")
    return label, bitmaps


def _add_free(free: array[int], bits: bytes, at: int, layout: _Layout) -> None:
    """Append what is free in this part of the bitmap, which begins at its byte `at`."""
    first = at * 8
    clear = clear_runs(bits, min(len(bits) * 8, layout.clusters - first))
    for begin, end in zip(clear[::2], clear[1::2], strict=True):
        start = layout.data + (first + begin) * layout.cluster
        stop = layout.data + (first + end) * layout.cluster
        if free and free[-1] == start:
            free[-1] = stop
        else:
            free.extend((start, stop))


def _whole(size: int, why: str, *, not_shut_down: bool = False) -> Filesystem:
    return Filesystem(KIND, size, left_whole=why, not_shut_down=not_shut_down)
