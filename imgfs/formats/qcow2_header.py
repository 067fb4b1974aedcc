"""What stands in a qcow2's first cluster, and its list of internal snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from imgfs.errors import CorruptImage, UnsupportedFeature
from imgfs.formats import qcow2_tables as t
from imgfs.formats.disk import Backing
from imgfs.pieces import Codec
from imgfs.steps import Steps, read
from imgfs.units import format_size

FIRST_READ = 4096  # what qemu writes into the first cluster fits
MOST_SNAPSHOT_TABLE = 16 << 20


@dataclass(frozen=True, slots=True)
class Header:
    version: int
    cluster_bits: int
    size: int  #: bytes of the disk, as stored
    l1_table_offset: int
    l1_size: int  #: entries
    refcount_table_offset: int
    refcount_table_size: int  #: bytes
    snapshots_offset: int
    nb_snapshots: int
    incompatible: t.Incompatible
    lazy_refcounts: bool
    raw_data_file: bool
    refcount_bits: int
    codec: Codec
    bitmap_directory: tuple[int, int]  #: of persistent bitmaps: start and end; (0, 0): none
    backing: Backing | None
    data_file: str | None

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & t.Incompatible.EXTENDED_L2)

    @property
    def entry_size(self) -> int:
        """Bytes of an L2 entry."""
        return 16 if self.extended_l2 else 8

    @property
    def l1_coverage(self) -> int:
        """Bytes of the disk that one L1 entry is for."""
        return self.cluster_size // self.entry_size * self.cluster_size


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An internal snapshot, as the snapshot table has it."""

    id: str
    name: str
    size: int  #: bytes of the disk
    date_s: int  #: since 1970
    l1_table_offset: int
    l1_size: int  #: entries


def read_header(name: str) -> Steps[Header]:
    """Raises CorruptImage and UnsupportedFeature for what qemu would not open either."""
    head = yield from read(0, FIRST_READ)
    if len(head) < t.HEADER_V2_LENGTH:
        raise CorruptImage(
            f"{name}: {len(head)} bytes are too short for a qcow2 header; is it cut?"
        )
    fixed = t.HeaderV2(*t.HEADER_V2.unpack_from(head))
    if fixed.magic != t.MAGIC:
        _wrong(name, "magic", hex(fixed.magic), "this is not a qcow2 file")
    if fixed.version not in (2, 3):
        raise UnsupportedFeature(f"{name}: qcow2 version {fixed.version}; only 2 and 3 are known")
    if not t.MIN_CLUSTER_BITS <= fixed.cluster_bits <= t.MAX_CLUSTER_BITS:
        why = f"must be from {t.MIN_CLUSTER_BITS} to {t.MAX_CLUSTER_BITS}"
        _wrong(name, "cluster_bits", fixed.cluster_bits, why)
    more = _version_3(name, fixed, head)
    if fixed.backing_file_offset > 1 << fixed.cluster_bits:
        why = "must be in the first cluster"
        _wrong(name, "backing_file_offset", fixed.backing_file_offset, why)
    extensions = yield from _read_extensions(
        name, head, more.header_length, fixed.backing_file_offset or 1 << fixed.cluster_bits
    )
    incompatible = _known_features(name, more.incompatible_features, extensions)
    if fixed.crypt_method:
        method = t.CRYPT_METHODS.get(fixed.crypt_method, f"method {fixed.crypt_method}")
        raise UnsupportedFeature(f"{name}: the disk is encrypted ({method}); decrypt it first")
    header = Header(
        version=fixed.version,
        cluster_bits=fixed.cluster_bits,
        size=fixed.size,
        l1_table_offset=fixed.l1_table_offset,
        l1_size=fixed.l1_size,
        refcount_table_offset=fixed.refcount_table_offset,
        refcount_table_size=fixed.refcount_table_clusters << fixed.cluster_bits,
        snapshots_offset=fixed.snapshots_offset,
        nb_snapshots=fixed.nb_snapshots,
        incompatible=incompatible,
        lazy_refcounts=bool(more.compatible_features & t.COMPATIBLE_LAZY_REFCOUNTS),
        raw_data_file=bool(more.autoclear_features & t.AUTOCLEAR_RAW_DATA_FILE),
        refcount_bits=1 << more.refcount_order,
        codec=_codec(name, head, more.header_length, incompatible),
        bitmap_directory=_bitmaps(name, fixed, more.autoclear_features, extensions),
        backing=(yield from _read_backing(name, head, fixed, extensions)),
        data_file=_data_file(name, incompatible, extensions),
    )
    _check_tables(name, fixed, header)
    return header


def _wrong(name: str, field: str, value: object, why: str) -> NoReturn:
    raise CorruptImage(f"{name}: {field} at byte {t.FIELD_OFFSETS[field]} is {value}: {why}")


def _version_3(name: str, fixed: t.HeaderV2, head: bytes) -> t.HeaderV3:
    if fixed.version == 2:
        return t.HeaderV3()
    if len(head) < t.HEADER_V3_LENGTH:
        raise CorruptImage(
            f"{name}: {len(head)} bytes are too short for a qcow2 header; is it cut?"
        )
    more = t.HeaderV3(*t.HEADER_V3.unpack_from(head, t.HEADER_V2_LENGTH))
    if not t.HEADER_V3_LENGTH <= more.header_length <= 1 << fixed.cluster_bits:
        why = f"must be from {t.HEADER_V3_LENGTH} to the size of a cluster"
        _wrong(name, "header_length", more.header_length, why)
    if more.refcount_order > t.MAX_REFCOUNT_ORDER:
        why = f"must be at most {t.MAX_REFCOUNT_ORDER}"
        _wrong(name, "refcount_order", more.refcount_order, why)
    return more


def _read_extensions(name: str, head: bytes, at: int, end: int) -> Steps[dict[int, bytes]]:
    """By type, the first ones; those that nobody asks for are left out."""
    asked = (
        t.EXTENSION_BACKING_FORMAT,
        t.EXTENSION_BITMAPS,
        t.EXTENSION_DATA_FILE,
        t.EXTENSION_FEATURE_NAMES,
    )
    found: dict[int, bytes] = {}
    while at < end:
        if at + t.EXTENSION.size > len(head) == FIRST_READ:
            head = yield from read(0, end)
        if at + t.EXTENSION.size > len(head):
            break  # the file ends: as good as the end of the extensions, to qemu too
        kind, length = t.EXTENSION.unpack_from(head, at)
        if kind == t.EXTENSION_END:
            break
        at += t.EXTENSION.size
        if length > end - at:
            raise CorruptImage(
                f"{name}: header extension {kind:#x} at byte {at - t.EXTENSION.size} has"
                f" {length} bytes, more than there is room for"
            )
        if at + length > len(head) == FIRST_READ:
            head = yield from read(0, end)
        if kind in asked:
            found.setdefault(kind, head[at : at + length])
        at += -(-length // 8) * 8
    return found


def _known_features(name: str, bits: int, extensions: Mapping[int, bytes]) -> t.Incompatible:
    unknown = bits & ~t.INCOMPATIBLE_KNOWN
    if not unknown:
        return t.Incompatible(bits)
    table = extensions.get(t.EXTENSION_FEATURE_NAMES, b"")
    names = {
        bit: text.rstrip(b"\0").decode("utf-8", "replace")
        for kind, bit, text in t.FEATURE_NAME.iter_unpack(
            table[: len(table) // t.FEATURE_NAME.size * t.FEATURE_NAME.size]
        )
        if kind == t.FEATURE_INCOMPATIBLE
    }
    told = [
        repr(names[bit]) if names.get(bit) else f"bit {bit}"
        for bit in range(64)
        if unknown >> bit & 1
    ]
    raise UnsupportedFeature(
        f"{name}: incompatible_features at byte {t.FIELD_OFFSETS['incompatible_features']} is"
        f" {bits:#x}: this qcow2 needs {', '.join(told)}, which imgfs does not know"
    )


def _codec(name: str, head: bytes, header_length: int, features: t.Incompatible) -> Codec:
    at = t.FIELD_OFFSETS["compression_type"]
    kind = head[at] if header_length > at and len(head) > at else t.COMPRESSION_DEFLATE
    if kind not in (t.COMPRESSION_DEFLATE, t.COMPRESSION_ZSTD):
        raise UnsupportedFeature(
            f"{name}: compression_type at byte {at} is {kind}; 0 and 1 are known"
        )
    if bool(kind) != bool(features & t.Incompatible.COMPRESSION):
        told = "set" if kind == t.COMPRESSION_DEFLATE else "clear"
        _wrong(name, "compression_type", kind, f"but its bit 3 in incompatible_features is {told}")
    return Codec.ZSTD if kind == t.COMPRESSION_ZSTD else Codec.DEFLATE


def _bitmaps(
    name: str, fixed: t.HeaderV2, autoclear: int, extensions: Mapping[int, bytes]
) -> tuple[int, int]:
    """The place of their directory.  Without the autoclear bit that is out of date."""
    data = extensions.get(t.EXTENSION_BITMAPS)
    if data is None or not autoclear & t.AUTOCLEAR_BITMAPS:
        return 0, 0
    if len(data) != t.BITMAPS.size:
        raise CorruptImage(f"{name}: the header extension of bitmaps has {len(data)} bytes")
    count, size, offset = t.BITMAPS.unpack(data)
    if not 0 < count <= t.MAX_BITMAPS or not 0 < size <= t.MAX_BITMAP_DIRECTORY:
        raise CorruptImage(f"{name}: {count} bitmaps in a directory of {size} bytes cannot be")
    if offset % (1 << fixed.cluster_bits) or not 0 < offset <= t.MAX_HOST_OFFSET:
        why = f"must be a multiple of {1 << fixed.cluster_bits}, below 2^56"
        raise CorruptImage(f"{name}: the offset of the directory of bitmaps is {offset}: {why}")
    return offset, offset + size


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _read_backing(
    name: str, head: bytes, fixed: t.HeaderV2, extensions: Mapping[int, bytes]
) -> Steps[Backing | None]:
    at, length = fixed.backing_file_offset, fixed.backing_file_size
    if not at or not length:
        return None
    room = min(t.MAX_BACKING_NAME, (1 << fixed.cluster_bits) - at)
    if length > room:
        _wrong(name, "backing_file_size", length, f"there is room for {room} bytes")
    found = head[at : at + length]
    if len(found) < length:
        found = yield from read(at, length)
    if len(found) < length:
        _wrong(name, "backing_file_offset", at, "the name is past the end of the file; is it cut?")
    kind = extensions.get(t.EXTENSION_BACKING_FORMAT, b"")
    if len(kind) > t.MAX_BACKING_FORMAT:
        raise CorruptImage(
            f"{name}: the name of the backing file's format has {len(kind)} bytes, and may have"
            f" {t.MAX_BACKING_FORMAT}"
        )
    return Backing(_text(found), _text(kind) or None) if _text(found) else None


def _data_file(name: str, features: t.Incompatible, extensions: Mapping[int, bytes]) -> str | None:
    if not features & t.Incompatible.DATA_FILE:
        return None
    found = _text(extensions.get(t.EXTENSION_DATA_FILE, b""))
    if not found:
        raise UnsupportedFeature(
            f"{name}: its data is in an external file that the header does not name;"
            " set it with qemu-img amend -o data_file="
        )
    return found


def _check_tables(name: str, fixed: t.HeaderV2, header: Header) -> None:
    if header.extended_l2 and header.cluster_bits < t.MIN_CLUSTER_BITS_EXTENDED:
        why = f"must be at least {t.MIN_CLUSTER_BITS_EXTENDED} with extended L2 entries"
        _wrong(name, "cluster_bits", header.cluster_bits, why)
    clusters = fixed.refcount_table_clusters
    if not 0 < clusters << header.cluster_bits <= t.MAX_REFCOUNT_TABLE:
        why = f"the table must have from 1 cluster to {format_size(t.MAX_REFCOUNT_TABLE)}"
        _wrong(name, "refcount_table_clusters", clusters, why)
    if fixed.nb_snapshots > t.MAX_SNAPSHOTS:
        _wrong(name, "nb_snapshots", fixed.nb_snapshots, f"the most is {t.MAX_SNAPSHOTS}")
    for field in ("l1_table_offset", "refcount_table_offset", "snapshots_offset"):
        offset = getattr(fixed, field)
        if offset % header.cluster_size or offset > t.MAX_HOST_OFFSET:
            _wrong(name, field, offset, f"must be a multiple of {header.cluster_size}, below 2^56")
    if header.l1_size * t.ENTRY.size > t.MAX_L1_TABLE:
        why = f"the table must have at most {format_size(t.MAX_L1_TABLE)}"
        _wrong(name, "l1_size", header.l1_size, why)
    needed = -(-header.size // header.l1_coverage)
    if header.l1_size < needed:
        _wrong(name, "l1_size", header.l1_size, f"a disk of {header.size} bytes needs {needed}")


def parse_snapshots(name: str, header: Header, table: bytes) -> Steps[tuple[Snapshot, ...]]:
    """The internal snapshots, of whose table the first bytes have been read; reads what lacks."""
    base = header.snapshots_offset
    found: list[Snapshot] = []
    at = 0
    for index in range(header.nb_snapshots):
        at = -(-at // 8) * 8
        table = yield from _reach(name, base, table, at + t.SNAPSHOT.size, index)
        entry = t.SnapshotEntry(*t.SNAPSHOT.unpack_from(table, at))
        if entry.extra_data_size > t.MAX_SNAPSHOT_EXTRA_DATA:
            raise CorruptImage(
                f"{name}: extra_data_size of snapshot {index} at byte {base + at + 36} is"
                f" {entry.extra_data_size}: the most is {t.MAX_SNAPSHOT_EXTRA_DATA}"
            )
        extra = at + t.SNAPSHOT.size
        id_at = extra + entry.extra_data_size
        name_at = id_at + entry.id_str_size
        end = name_at + entry.name_size
        table = yield from _reach(name, base, table, end, index)
        size = header.size
        if entry.extra_data_size >= t.SNAPSHOT_DISK_SIZE_AT + 8:
            (size,) = t.ENTRY.unpack_from(table, extra + t.SNAPSHOT_DISK_SIZE_AT)
        found.append(
            Snapshot(
                id=_text(table[id_at:name_at]),
                name=_text(table[name_at:end]),
                size=size,
                date_s=entry.date_sec,
                l1_table_offset=entry.l1_table_offset,
                l1_size=entry.l1_size,
            )
        )
        at = end
    return tuple(found)


def _reach(name: str, base: int, table: bytes, end: int, index: int) -> Steps[bytes]:
    if end <= len(table):
        return table
    if end > MOST_SNAPSHOT_TABLE:
        raise UnsupportedFeature(
            f"{name}: the snapshot table at byte {base} has more than"
            f" {format_size(MOST_SNAPSHOT_TABLE)}; delete snapshots that are not needed"
        )
    table += yield from read(base + len(table), max(end - len(table), len(table)))
    if end > len(table):
        raise CorruptImage(
            f"{name}: snapshot {index} at byte {base + len(table)} is past the end of the file;"
            " is it cut?"
        )
    return table
