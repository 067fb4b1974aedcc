"""The structures of NTFS, as the Linux-NTFS documentation and the headers of ntfs-3g have them.

Everything is little-endian.  Nothing here reads; what cannot be raises Doubt.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from imgfs.guest.doubt import Doubt

BOOT_SIZE = 512
_OEM = b"NTFS    "
_BOOT = struct.Struct("<3x8sHBH")  # sector size, sectors per cluster, reserved sectors
_BOOT_SIZES = struct.Struct("<QQQb3xb3xQ")  # sectors, MFT, mirror, record size, index size, serial
_BOOT_SIZES_AT = 40
_SECTORS = (512, 1024, 2048, 4096)
_MOST_CLUSTER = 2 << 20
_RECORD_SIZES = (512, 1024, 2048, 4096)
_MOST_CLUSTERS = 1 << 32  # Windows has no more either

# Numbers of records of the MFT
MFT, LOGFILE, VOLUME, ROOT, BITMAP = 0, 2, 3, 5, 6

# Types of attributes
ATTRIBUTE_LIST, VOLUME_NAME, VOLUME_INFORMATION = 0x20, 0x60, 0x70
DATA, INDEX_ROOT, INDEX_ALLOCATION = 0x80, 0x90, 0xA0
_END = 0xFFFFFFFF
COMPRESSED, ENCRYPTED = 0x00FF, 0x4000  # flags of attributes

_FIXUP_STRIDE = 512  # whatever the sector size is
_RECORD = struct.Struct("<HH8xH2xHHIIQ")  # from the fixups' offset on, to the base record
_IN_USE = 1
_ATTRIBUTE = struct.Struct("<IIBBHH2x")
_RESIDENT = struct.Struct("<IH")
_NON_RESIDENT = struct.Struct("<QQH6xQQQ")  # VCNs, runs at, allocated, size, initialized
_ATTRIBUTE_BODY = 16
_LIST_ENTRY = struct.Struct("<IHBBQQ")
_NUMBER_MASK = (1 << 48) - 1

INDEX_HEADER = struct.Struct("<III")  # first entry, end of the entries, allocated
INDEX_ROOT_SIZE, INDEX_BLOCK_HEADER = 16, 24  # bytes before the index header
INDEX_BLOCK_SIZE_AT = 8  # in the index root
_INDEX_ENTRY = struct.Struct("<QHHH2x")
_HAS_NODE, _LAST = 1, 2
_NAME_LENGTH_AT, _NAME_AT = 64, 66  # in a file name

VOLUME_INFO = struct.Struct("<8xBBH")  # major and minor version, flags
VERSIONS = ((1, 1), (1, 2), (3, 0), (3, 1))
# Those that tell of the past, or of the journal's size; 0x80 is set by Windows 8 and later.
HARMLESS_FLAGS = 0x8000 | 0x0080 | 0x0008 | 0x0002
DIRTY = 1

RESTART_MAGIC = b"RSTR"
RESTART_HEADER = struct.Struct("<16xIIHhh")  # system and log page, area at, minor and major version
RESTART_AREA = struct.Struct("<Q4xHH")  # current LSN, clients in use, flags
NO_CLIENT, VOLUME_IS_CLEAN = 0xFFFF, 2
LOG_MAJOR = 1  # Windows 8 and later have 2 while they may have metadata in memory

# Volume shadow copies: libvshadow's "Volume Shadow Snapshot (VSS) format"
SHADOW_AT = 0x1E00
SHADOW_ID = bytes.fromhex("6b87083876c1484eb7ae04046e6cc752")
SHADOW_HEADER = struct.Struct("<16sIIQ16xQ")  # version, record type, own offset, catalog
CATALOG_HEADER = struct.Struct("<16sIIQQQ")  # relative, own and next block's offset
VOLUME_RECORD, CATALOG_RECORD = 1, 2
CATALOG_BLOCK, CATALOG_ENTRY = 16 << 10, 128
COPY_ENTRIES = (2, 3)


@dataclass(frozen=True, slots=True)
class Boot:
    """Sizes are bytes."""

    sector: int
    sectors: int  #: without the last one, which has the copy of the first
    cluster: int
    clusters: int
    mft: int  #: its first cluster
    record: int  #: size of the MFT's records
    serial: int


class Run(NamedTuple):
    """So many clusters of a stream, from its `vcn` on: at cluster `lcn`, or, if None, a hole."""

    vcn: int
    clusters: int
    lcn: int | None


class Reference(NamedTuple):
    """A record of the MFT, and how often it had been used."""

    number: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Attribute:
    """Of a non-resident one this is an extent: its clusters from `vcn` on."""

    kind: int
    name: bytes  #: UTF-16
    flags: int
    value: bytes | None  #: of a resident one
    vcn: int = 0
    runs: tuple[Run, ...] = ()
    size: int = 0  #: these two in bytes, and only in the first extent
    initialized: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    number: int
    sequence: int
    base: Reference
    attributes: tuple[Attribute, ...]


class ListEntry(NamedTuple):
    kind: int
    name: bytes
    vcn: int
    reference: Reference


class IndexEntry(NamedTuple):
    reference: Reference
    name: bytes  #: UTF-16; empty in the last one
    node: int | None  #: VCN of what comes before it


def reference(value: int) -> Reference:
    return Reference(value & _NUMBER_MASK, value >> 48)


def parse_boot(data: bytes) -> Boot:
    oem, sector, per_cluster, reserved = _BOOT.unpack_from(data)
    sectors, mft, _, per_record, _, serial = _BOOT_SIZES.unpack_from(data, _BOOT_SIZES_AT)
    if oem != _OEM:
        raise Doubt(f"its boot sector is of {oem!r}")
    if sector not in _SECTORS or reserved:
        raise Doubt(f"sectors of {sector} bytes, {reserved} of them reserved")
    if per_cluster > 0x80:
        per_cluster = 1 << (0x100 - per_cluster)
    cluster = sector * per_cluster
    if per_cluster & (per_cluster - 1) or not 0 < cluster <= _MOST_CLUSTER:
        raise Doubt(f"{per_cluster} sectors of {sector} bytes in a cluster")
    clusters = sectors // per_cluster
    if not 0 < clusters <= _MOST_CLUSTERS or not 0 < mft < clusters:
        raise Doubt(f"the MFT begins in cluster {mft} of {clusters}")
    record = per_record * cluster if per_record > 0 else 1 << -per_record
    if record not in _RECORD_SIZES:
        raise Doubt(f"clusters_per_mft_record is {per_record}: records of {record} bytes")
    return Boot(sector, sectors, cluster, clusters, mft, record, serial)


def fixed_up(data: bytes, magic: bytes, what: str) -> bytes:
    """A record as it was before the last two bytes of each 512 were replaced by a number that
    tells whether all of it was written."""
    if data[:4] != magic:
        raise Doubt(f"{what} begins with {data[:4]!r}, not {magic!r}")
    at, count = struct.unpack_from("<HH", data, 4)
    strides = len(data) // _FIXUP_STRIDE
    if count != strides + 1 or at + 2 * count > _FIXUP_STRIDE - 2:
        raise Doubt(f"{what} has {count} fixups at {at}")
    number = data[at : at + 2]
    fixed = bytearray(data)
    for stride in range(1, count):
        end = stride * _FIXUP_STRIDE
        if data[end - 2 : end] != number:
            raise Doubt(f"{what} was not written whole: its fixup {stride} does not match")
        fixed[end - 2 : end] = data[at + 2 * stride : at + 2 * stride + 2]
    return bytes(fixed)


def parse_record(data: bytes, number: int, clusters: int) -> Record:
    """A record of the MFT of a filesystem with so many clusters."""
    what = f"record {number} of the MFT"
    data = fixed_up(data, b"FILE", what)
    _, _, sequence, first, flags, used, _, base = _RECORD.unpack_from(data, 4)
    if not flags & _IN_USE:
        raise Doubt(f"{what} is not in use")
    if not _RECORD.size <= first <= used <= len(data):
        raise Doubt(f"{what} has attributes from {first} to {used}")
    attributes = tuple(_attributes(data[:used], first, clusters, what))
    return Record(number, sequence, reference(base), attributes)


def _attributes(data: bytes, at: int, clusters: int, what: str) -> Iterator[Attribute]:
    while True:
        if at + 4 > len(data):
            raise Doubt(f"{what} has no end")
        if struct.unpack_from("<I", data, at) == (_END,):
            return
        if at + _ATTRIBUTE.size > len(data):
            raise Doubt(f"{what} has part of an attribute at {at}")
        kind, length, nonresident, name_length, name_at, flags = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE_BODY + _RESIDENT.size or length % 8 or at + length > len(data):
            raise Doubt(f"{what} has an attribute of {length} bytes at {at}")
        body = data[at : at + length]
        name = body[name_at : name_at + 2 * name_length]
        if not nonresident:
            size, start = _RESIDENT.unpack_from(body, _ATTRIBUTE_BODY)
            if start + size > length:
                raise Doubt(f"{what} has an attribute {kind:#x} with {size} bytes at {start}")
            value = body[start : start + size]
            yield Attribute(kind, name, flags, value, size=size, initialized=size)
        else:
            yield _extent(body, kind, name, flags, clusters, f"attribute {kind:#x} of {what}")
        at += length


def _extent(body: bytes, kind: int, name: bytes, flags: int, clusters: int, what: str) -> Attribute:
    if len(body) < _ATTRIBUTE_BODY + _NON_RESIDENT.size:
        raise Doubt(f"{what} has {len(body)} bytes")
    first, last, at, _, size, initialized = _NON_RESIDENT.unpack_from(body, _ATTRIBUTE_BODY)
    runs = tuple(_runs(body[at:], first, clusters, what))
    end = runs[-1].vcn + runs[-1].clusters if runs else first
    if end != (last + 1) & 0xFFFFFFFFFFFFFFFF:
        raise Doubt(f"{what} has runs up to {end}, not {last + 1}")
    return Attribute(kind, name, flags, None, first, runs, size, initialized)


def _runs(data: bytes, vcn: int, clusters: int, what: str) -> Iterator[Run]:
    """Each is a byte with two lengths, then a count, then how far it is from the one before."""
    at = lcn = 0
    while at < len(data) and data[at]:
        of_count, of_offset = data[at] & 15, data[at] >> 4
        count_end = at + 1 + of_count
        end = count_end + of_offset
        count = int.from_bytes(data[at + 1 : count_end], "little", signed=True)
        if end > len(data) or count <= 0:
            raise Doubt(f"{what} has a run of {count} clusters")
        if of_offset:
            lcn += int.from_bytes(data[count_end:end], "little", signed=True)
            if not 0 <= lcn <= clusters - count:
                raise Doubt(f"{what} has {count} clusters at {lcn}, of {clusters}")
        yield Run(vcn, count, lcn if of_offset else None)
        vcn += count
        at = end


def list_entries(data: bytes, what: str) -> Iterator[ListEntry]:
    """Of an attribute list."""
    at = 0
    while at < len(data):
        if at + _LIST_ENTRY.size > len(data):
            raise Doubt(f"the attribute list of {what} has part of an entry at {at}")
        kind, length, name_length, name_at, vcn, where = _LIST_ENTRY.unpack_from(data, at)
        if length < _LIST_ENTRY.size or at + length > len(data):
            raise Doubt(f"the attribute list of {what} has an entry of {length} bytes at {at}")
        name = data[at + name_at : at + name_at + 2 * name_length]
        yield ListEntry(kind, name, vcn, reference(where))
        at += length


def index_entries(data: bytes, header_at: int, what: str) -> Iterator[IndexEntry]:
    """Of one node of a directory, whose index header is at `header_at`."""
    if header_at + INDEX_HEADER.size > len(data):
        raise Doubt(f"{what} has {len(data)} bytes")
    first, end, _ = INDEX_HEADER.unpack_from(data, header_at)
    at, end = header_at + first, header_at + end
    while True:
        if at + _INDEX_ENTRY.size > end or end > len(data):
            raise Doubt(f"{what} has part of an entry at {at}, and ends at {end}")
        where, length, key_length, flags = _INDEX_ENTRY.unpack_from(data, at)
        if length < _INDEX_ENTRY.size + 8 * (flags & _HAS_NODE) or at + length > end:
            raise Doubt(f"{what} has an entry of {length} bytes at {at}")
        node = None
        if flags & _HAS_NODE:
            (node,) = struct.unpack_from("<Q", data, at + length - 8)
        name = b""
        if not flags & _LAST:
            key = data[at + _INDEX_ENTRY.size : at + _INDEX_ENTRY.size + key_length]
            if len(key) < _NAME_AT or key_length > length - _INDEX_ENTRY.size:
                raise Doubt(f"{what} has a name of {key_length} bytes at {at}")
            name = key[_NAME_AT : _NAME_AT + 2 * key[_NAME_LENGTH_AT]]
        yield IndexEntry(reference(where), name, node)
        if flags & _LAST:
            return
        at += length
