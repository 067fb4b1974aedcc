"""Sparse extents of VMDK from the headers of their files.

What qemu accepts is accepted, but unknown flags; and what it would read wrongly is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from imgfs.errors import CorruptImage, UnsupportedFeature
from imgfs.formats import vmdk_tables as t
from imgfs.formats.claims import Taken, sorted_apart
from imgfs.formats.vmdk_descriptor import MOST_SECTORS
from imgfs.formats.vmdk_sesparse import SeSparseExtent
from imgfs.formats.vmdk_sparse import CompressedExtent, HostedExtent, SparseExtent
from imgfs.pieces import Kind
from imgfs.steps import Read

SECTOR = t.SECTOR
LARGEST_GRAIN = 0x200000  # sectors; qemu's limit
LARGEST_COMPRESSED_GRAIN = 2048  # sectors: it is decompressed as a whole
MOST_TABLES = 32 << 20  # qemu's limit
FOOTER = 3 * SECTOR  # its marker, a header, the end-of-stream marker


@dataclass(frozen=True, slots=True)
class ExtentFile:
    """A file that may be a sparse extent, and what has been read of it."""

    where: str  #: begins messages
    number: int
    size: int  #: bytes
    head: bytes  #: its first bytes, a sector at least
    tail: bytes  #: what `tail_of` says

    @property
    def magic(self) -> bytes:
        return self.head[:4]


def tail_of(size: int, file: int = 0) -> Read | None:
    """Where the footer of a file of this size is, if it has one."""
    start = size // SECTOR * SECTOR - FOOTER
    return Read(start, FOOTER, file) if start >= SECTOR else None


def hosted_header(of: ExtentFile) -> t.SparseExtentHeader:
    """The header that counts: of a stream that is its footer."""
    if len(of.head) < t.SPARSE_HEADER.size:
        raise CorruptImage(f"{of.where}: the file ends in its header")
    header = t.SparseExtentHeader(*t.SPARSE_HEADER.unpack_from(of.head))
    if header.gdOffset == t.GD_AT_END:
        header = _same_as(of, header, _footer(of))
    if header.version not in (1, 2, 3):
        raise UnsupportedFeature(f"{of.where}: version {header.version} (offset 4) is not known")
    if header.flags & ~t.KNOWN_FLAGS:
        raise UnsupportedFeature(
            f"{of.where}: flags {header.flags & ~t.KNOWN_FLAGS:#x} (offset 8) are not known"
        )
    if header.flags & t.FLAG_NEW_LINES and header.newLines != t.NEW_LINES:
        raise CorruptImage(
            f"{of.where}: newlines at offset 73 are {header.newLines!r}: the file was transferred "
            "as text; transfer it as binary"
        )
    if header.compressAlgorithm not in (t.COMPRESSION_NONE, t.COMPRESSION_DEFLATE):
        raise UnsupportedFeature(
            f"{of.where}: compressAlgorithm {header.compressAlgorithm} (offset 77) is not known"
        )
    if bool(header.flags & t.FLAG_COMPRESSED) != (header.compressAlgorithm != t.COMPRESSION_NONE):
        raise CorruptImage(
            f"{of.where}: flags {header.flags:#x} (offset 8) contradict compressAlgorithm "
            f"{header.compressAlgorithm} (offset 77)"
        )
    return header


def _same_as(
    of: ExtentFile, header: t.SparseExtentHeader, footer: t.SparseExtentHeader
) -> t.SparseExtentHeader:
    """The footer, which is a copy of the header but for where the directory is."""
    for name in ("version", "capacity", "grainSize", "numGTEsPerGT"):
        first, last = getattr(header, name), getattr(footer, name)
        if first != last:
            raise CorruptImage(f"{of.where}: {name} is {first} in the header, {last} in the footer")
    return footer


def _footer(of: ExtentFile) -> t.SparseExtentHeader:
    if len(of.tail) == FOOTER:
        _, size, kind = t.MARKER.unpack_from(of.tail)
        footer = t.SparseExtentHeader(*t.SPARSE_HEADER.unpack_from(of.tail, SECTOR))
        end = t.MARKER.unpack_from(of.tail, 2 * SECTOR)
        if (
            (size, kind) == (0, t.MARKER_FOOTER)
            and footer.magicNumber == t.SPARSE_MAGIC
            and footer.gdOffset != t.GD_AT_END
            and end == (0, 0, t.MARKER_EOS)
        ):
            return footer
    raise CorruptImage(
        f"{of.where}: gdOffset (offset 56) says that the grain directory is at the end of the "
        "file, and there is no footer: the file is not whole"
    )


def hosted_extent(of: ExtentFile, sectors: int | None, absent: Kind) -> SparseExtent:
    """`sectors` of it are of the disk, or all when that is None; `absent` is what a grain is that
    there is not."""
    header = hosted_header(of)
    compressed = bool(header.flags & t.FLAG_COMPRESSED)
    largest = LARGEST_COMPRESSED_GRAIN if compressed else LARGEST_GRAIN
    grain = _grain(of, header.grainSize, largest, 20)
    entries = header.numGTEsPerGT
    if not entries or entries > 512 or entries * 4 % SECTOR:
        raise UnsupportedFeature(f"{of.where}: numGTEsPerGT {entries} (offset 44) is not supported")
    size = _size(of, header.capacity, sectors, grain * entries, 12)
    wanted = [header.gdOffset]
    if header.flags & t.FLAG_REDUNDANT:
        wanted.append(header.rgdOffset)
    directories = tuple(o * SECTOR for o in wanted if 0 < o * SECTOR < of.size)
    if size and not directories:
        raise CorruptImage(
            f"{of.where}: gdOffset {header.gdOffset} (offset 56): the grain directory is not in "
            f"the file ({of.size} bytes)"
        )
    taken = _places(of, header, directories, -(-size // (grain * entries)) * 4)
    zero_grains = bool(header.flags & t.FLAG_ZERO_GRAIN)
    if compressed:
        return CompressedExtent(
            where=of.where,
            file=of.number,
            file_size=of.size,
            size=size,
            grain=grain,
            entries=entries,
            width=4,
            directories=directories,
            absent=absent,
            taken=taken,
            zero_grains=zero_grains,
            markers=bool(header.flags & t.FLAG_MARKERS),
        )
    return HostedExtent(
        where=of.where,
        file=of.number,
        file_size=of.size,
        size=size,
        grain=grain,
        entries=entries,
        width=4,
        directories=directories,
        absent=absent,
        taken=taken,
        zero_grains=zero_grains,
    )


def _places(
    of: ExtentFile, header: t.SparseExtentHeader, directories: tuple[int, ...], length: int
) -> tuple[Taken, ...]:
    """What the file's own structures take of it.  Raises CorruptImage where two overlap."""
    taken: list[Taken] = [(0, SECTOR, "the header")]
    if header.descriptorOffset:
        start = header.descriptorOffset * SECTOR
        taken.append((start, start + header.descriptorSize * SECTOR, "the descriptor"))
    names = ("the grain directory", "the redundant grain directory")
    taken += [(at, at + length, what) for at, what in zip(directories, names, strict=False)]
    return tuple(sorted_apart(of.where, taken))


def cowd_extent(of: ExtentFile, sectors: int, absent: Kind) -> SparseExtent:
    if len(of.head) < t.COWD_HEADER.size:
        raise CorruptImage(f"{of.where}: the file ends in its header")
    header = t.CowdHeader(*t.COWD_HEADER.unpack_from(of.head))
    if header.version != 1:
        raise UnsupportedFeature(f"{of.where}: version {header.version} (offset 4) is not known")
    grain = _grain(of, header.grainSize, LARGEST_GRAIN, 16)
    size = _size(of, header.numSectors, sectors, grain * t.COWD_GTES_PER_GT, 12)
    tables = -(-size // (grain * t.COWD_GTES_PER_GT))
    if header.numGDEntries < tables:
        raise CorruptImage(
            f"{of.where}: numGDEntries {header.numGDEntries} (offset 24) where {tables} are needed"
        )
    return HostedExtent(
        where=of.where,
        file=of.number,
        file_size=of.size,
        size=size,
        grain=grain,
        entries=t.COWD_GTES_PER_GT,
        width=4,
        directories=(_inside(of, "gdOffset", header.gdOffset, 20),),
        absent=absent,
        taken=((0, t.COWD_HEADER.size, "the header"),),
    )


def volatile_header_of(of: ExtentFile) -> Read:
    """Where the second header of an seSparse extent is."""
    offset = _sesparse_header(of).volatile_header_offset
    length = t.SESPARSE_VOLATILE_HEADER.size
    return Read(_inside(of, "volatile_header_offset", offset, 80), length, of.number)


def sesparse_extent(of: ExtentFile, volatile: bytes, sectors: int, absent: Kind) -> SparseExtent:
    """`volatile`: what `volatile_header_of` says."""
    header = _sesparse_header(of)
    if len(volatile) < t.SESPARSE_VOLATILE_HEADER.size:
        raise CorruptImage(f"{of.where}: the file ends in its volatile header")
    magic, _, _, replay_journal = t.SESPARSE_VOLATILE_HEADER.unpack(volatile)
    if magic != t.SESPARSE_VOLATILE_MAGIC:
        raise CorruptImage(f"{of.where}: magic {magic:#x} of the volatile header is not its own")
    if replay_journal:
        raise UnsupportedFeature(
            f"{of.where}: replay_journal {replay_journal}: it was not closed; let ESXi open it once"
        )
    grain = header.grain_size * SECTOR
    entries = header.grain_table_size * SECTOR // 8
    size = _size(of, header.capacity, sectors, grain * entries, 16)
    if header.grain_dir_size * SECTOR // 8 < -(-size // (grain * entries)):
        raise CorruptImage(
            f"{of.where}: grain_dir_size {header.grain_dir_size} (offset 136) is too few for "
            f"{size} bytes"
        )
    return SeSparseExtent(
        where=of.where,
        file=of.number,
        file_size=of.size,
        size=size,
        grain=grain,
        entries=entries,
        width=8,
        directories=(_inside(of, "grain_dir_offset", header.grain_dir_offset, 128),),
        absent=absent,
        tables_offset=header.grain_tables_offset * SECTOR,
        grains_offset=header.grains_offset * SECTOR,
    )


def _sesparse_header(of: ExtentFile) -> t.SeSparseHeader:
    if len(of.head) < SECTOR:
        raise CorruptImage(f"{of.where}: the file ends in its header")
    header = t.SeSparseHeader(*t.SESPARSE_HEADER.unpack_from(of.head))
    if header.magic != t.SESPARSE_MAGIC:
        raise CorruptImage(f"{of.where}: magic {header.magic:#x} (offset 0) is not seSparse's")
    # Nothing is known of any others.
    expected = {
        "version": (t.SESPARSE_VERSION, 8),
        "grain_size": (t.SESPARSE_GRAIN_SIZE, 24),
        "grain_table_size": (t.SESPARSE_GRAIN_TABLE_SIZE, 32),
        "flags": (0, 40),
        "reserved1": (0, 48),
        "reserved2": (0, 56),
        "reserved3": (0, 64),
        "reserved4": (0, 72),
    }
    for name, (value, offset) in expected.items():
        found = getattr(header, name)
        if found != value:
            raise UnsupportedFeature(
                f"{of.where}: {name} {found:#x} (offset {offset}) is not supported, only {value:#x}"
            )
    if any(of.head[t.SESPARSE_HEADER.size : SECTOR]):
        raise UnsupportedFeature(
            f"{of.where}: header has unknown fields from offset {t.SESPARSE_HEADER.size} on"
        )
    return header


def _grain(of: ExtentFile, sectors: int, largest: int, offset: int) -> int:
    """Bytes."""
    if not 0 < sectors <= largest or sectors & (sectors - 1):
        raise UnsupportedFeature(
            f"{of.where}: grainSize {sectors} sectors (offset {offset}) is no power of two up to "
            f"{largest}"
        )
    return sectors * SECTOR


def _size(of: ExtentFile, capacity: int, sectors: int | None, span: int, offset: int) -> int:
    """Bytes of the disk in it; a grain table is for `span` bytes."""
    if capacity > MOST_SECTORS or capacity * SECTOR > MOST_TABLES * span:
        raise UnsupportedFeature(
            f"{of.where}: capacity {capacity} sectors (offset {offset}) is absurd"
        )
    if sectors is None:
        return capacity * SECTOR
    if capacity < sectors:
        raise CorruptImage(
            f"{of.where}: capacity {capacity} sectors (offset {offset}) is less than the {sectors} "
            "that the descriptor says"
        )
    return sectors * SECTOR


def _inside(of: ExtentFile, field: str, sector: int, offset: int) -> int:
    """Bytes."""
    if not 0 < sector * SECTOR < of.size:
        raise CorruptImage(
            f"{of.where}: {field} {sector} sectors (offset {offset}) is not in the file "
            f"({of.size} bytes)"
        )
    return sector * SECTOR
