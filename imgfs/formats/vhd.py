"""VHD, which qemu calls vpc: fixed, dynamic and differencing disks (see `vhd_tables`)."""

from __future__ import annotations

import struct
import uuid

from imgfs._native._tables import clear_runs, runs
from imgfs.errors import CorruptImage, UnsupportedFeature
from imgfs.formats import vhd_tables as vt
from imgfs.formats.claims import WHOLE, Taken, check_entries, sorted_apart
from imgfs.formats.disk import Backing, Disk
from imgfs.formats.entries import Entries
from imgfs.formats.windows_names import local_names
from imgfs.pieces import Kind, Piece, PieceList, PieceListBuilder
from imgfs.steps import Read, Steps, read, read_all

#: Virtual PC and old qemu size a disk by its geometry, except when that is the largest there is.
#: For all others the current size counts, as in qemu from 10.0 on (7.2 had a list of those).
SIZED_BY_GEOMETRY = {b"vpc ", b"qemu"}
_LARGEST_GEOMETRY = vt.MOST_CYLINDERS * vt.MOST_HEADS * vt.MOST_SECTORS_PER_TRACK

_HEAD = 4096  # where the footer's copy and the header are
_TAIL = 512
_LONGEST_NAME = 64 << 10
_PART = 4096  # entries that are read at least, so that neighbours cost nothing
_MOST_ENTRIES = 32 << 10  # of one map step, which must not take long
_ODD = 64  # entries that are looked at by themselves where the first one is wrong
_MOST_BITMAPS = 256  # of one map step
_MOST_BITMAP_BYTES = 1 << 20

_SUBFORMATS = {vt.FIXED: "fixed", vt.DYNAMIC: "dynamic", vt.DIFFERENCING: "differencing"}
_UTF16 = {b"W2ru": "utf-16-le", b"W2ku": "utf-16-le"}  # platform codes, the best first
# The specification has a bitmap's first sector in the highest bit of its first byte.
_LOWEST_FIRST = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def open_disk(name: str, size: int) -> Steps[VhdDisk]:
    """The disk in a file of `size` bytes; `name` is for messages.

    Raises CorruptImage and UnsupportedFeature.
    """
    tail_at = max(0, size - _TAIL)
    head, tail = yield from read_all([Read(0, _HEAD), Read(tail_at, _TAIL)])
    footer, footer_at = _find_footer(name, bytes(head), bytes(tail), tail_at)
    taken: list[Taken] = [(0, vt.FOOTER_SIZE, "the copy of the footer")]
    taken += [(footer_at, size, "the footer")] if footer_at else []
    if footer.file_format_version >> 16 != vt.VERSION >> 16:
        raise UnsupportedFeature(
            f"{name}: file format version {footer.file_format_version:#x} at offset "
            f"{footer_at + 12} is not 1.x"
        )
    if footer.disk_type not in _SUBFORMATS:
        raise UnsupportedFeature(
            f"{name}: disk type {footer.disk_type} at offset {footer_at + 60} is unknown"
        )
    sectors = _sectors(footer)
    if sectors > vt.MOST_SECTORS:
        raise UnsupportedFeature(
            f"{name}: current size {footer.current_size} at offset {footer_at + 48} is more than "
            "2040 GiB"
        )
    if footer.disk_type == vt.FIXED:
        return VhdDisk(name, footer, sectors * vt.SECTOR, footer_at)
    header = yield from _read_header(name, footer, footer_at, bytes(head), sectors)
    taken.append((footer.data_offset, footer.data_offset + vt.HEADER_SIZE, "the header"))
    table_end = header.table_offset + header.max_table_entries * vt.ENTRY_SIZE
    taken.append((header.table_offset, table_end, "the table of blocks"))
    backing = None
    if footer.disk_type == vt.DIFFERENCING:
        parent, *others = yield from _parent_names(name, header, footer.data_offset)
        for each in vt.locators(header):
            end = each.platform_data_offset + each.platform_data_length
            taken.append((each.platform_data_offset, end, "a parent locator"))
        wanted = (str(uuid.UUID(bytes=header.parent_unique_id)),)
        backing = Backing(parent, "vpc", wanted, tuple(others))
    apart = sorted_apart(name, taken)
    return VhdDisk(name, footer, sectors * vt.SECTOR, size, header, backing, apart)


def _find_footer(name: str, head: bytes, tail: bytes, tail_at: int) -> tuple[vt.Footer, int]:
    """The footer and its offset.  A guest could write what looks like a copy of it into the first
    sector of a fixed disk; so the copy counts only where there is no footer."""
    for skip in (0, vt.FOOTER_SIZE - vt.OLD_FOOTER_SIZE):
        found = vt.footer(tail[skip:])
        if found is not None:
            _check_copy(name, found, tail_at + skip, vt.footer(head))
            return found, tail_at + skip
    found = vt.footer(head)
    if found is None:
        raise CorruptImage(
            f"{name}: no VHD footer with a correct checksum at offset {tail_at}, nor a copy at 0"
        )
    if found.disk_type == vt.FIXED:
        raise CorruptImage(f"{name}: the footer at offset {tail_at} is missing or damaged")
    return found, 0


def _check_copy(name: str, footer: vt.Footer, at: int, copy: vt.Footer | None) -> None:
    """Both are written together.  Of a fixed disk there is only the one at the end, behind all of
    the disk: what looks like the other one is the guest's then."""
    fixed = footer.disk_type == vt.FIXED
    if copy is None or (fixed and (at == footer.current_size or copy.disk_type == vt.FIXED)):
        return
    for field in vt.SAME_IN_COPY:
        if getattr(footer, field) != getattr(copy, field):
            raise CorruptImage(
                f"{name}: {field.replace('_', ' ')} of the footer at offset {at} is "
                f"{getattr(footer, field)!r}, of its copy at 0 {getattr(copy, field)!r}"
            )


def _sectors(footer: vt.Footer) -> int:
    geometry = footer.cylinders * footer.heads * footer.sectors_per_track
    if footer.creator_application in SIZED_BY_GEOMETRY and geometry != _LARGEST_GEOMETRY:
        return geometry
    return footer.current_size // vt.SECTOR


def _read_header(
    name: str, footer: vt.Footer, footer_at: int, head: bytes, sectors: int
) -> Steps[vt.Header]:
    at = footer.data_offset
    if at % vt.SECTOR:
        raise CorruptImage(
            f"{name}: data offset {at} at offset {footer_at + 16} is no multiple of {vt.SECTOR}"
        )
    data = head[at : at + vt.HEADER_SIZE]
    if len(data) < vt.HEADER_SIZE and at < vt.NO_OFFSET >> 1:
        data = yield from read(at, vt.HEADER_SIZE)
    if len(data) < vt.HEADER_SIZE:
        raise CorruptImage(
            f"{name}: data offset {at} at offset {footer_at + 16} is past the end of the file"
        )
    header, checksum = vt.header(data)
    if header.cookie != vt.HEADER_COOKIE:
        raise CorruptImage(f"{name}: no dynamic disk header at offset {at}")
    if header.checksum != checksum:
        raise CorruptImage(
            f"{name}: header checksum {header.checksum:#x} at offset {at + 36} is not {checksum:#x}"
        )
    if header.header_version >> 16 != vt.VERSION >> 16:
        raise UnsupportedFeature(
            f"{name}: header version {header.header_version:#x} at offset {at + 24} is not 1.x"
        )
    size = header.block_size
    if size < vt.SECTOR or size & (size - 1):
        raise CorruptImage(
            f"{name}: block size {size} at offset {at + 32} is no power of two from 512 on"
        )
    if header.max_table_entries * size < sectors * vt.SECTOR:
        raise CorruptImage(
            f"{name}: max table entries {header.max_table_entries} at offset {at + 28} are too few "
            f"for a disk of {sectors * vt.SECTOR} bytes"
        )
    if header.table_offset % vt.SECTOR:
        raise CorruptImage(
            f"{name}: table offset {header.table_offset} at offset {at + 16} is no multiple of "
            f"{vt.SECTOR}"
        )
    if header.table_offset > vt.NO_OFFSET >> 1:
        raise CorruptImage(
            f"{name}: table offset {header.table_offset} at offset {at + 16} is past the end of "
            "the file"
        )
    return header


def _parent_names(name: str, header: vt.Header, header_at: int) -> Steps[tuple[str, ...]]:
    """Those of all locators, the relative ones first, and the header's own."""
    locators = [loc for loc in vt.locators(header) if loc.platform_code in _UTF16]
    reads = []
    for loc in locators:
        if not 0 < loc.platform_data_length <= _LONGEST_NAME:
            raise CorruptImage(
                f"{name}: platform data length {loc.platform_data_length} of the parent locator "
                f"{loc.platform_code.decode()} in the header at offset {header_at} is absurd"
            )
        if loc.platform_data_offset > vt.NO_OFFSET >> 1:
            raise CorruptImage(
                f"{name}: platform data offset {loc.platform_data_offset} of the parent locator "
                f"{loc.platform_code.decode()} is past the end of the file"
            )
        reads.append(Read(loc.platform_data_offset, loc.platform_data_length))
    texts = yield from read_all(reads)
    for loc, text in zip(locators, texts, strict=True):
        if len(text) < loc.platform_data_length:
            raise CorruptImage(
                f"{name}: the parent locator {loc.platform_code.decode()} of "
                f"{loc.platform_data_length} bytes at {loc.platform_data_offset} is past the end "
                "of the file"
            )
    paths = []
    for code, encoding in _UTF16.items():
        for loc, text in zip(locators, texts, strict=True):
            if loc.platform_code == code:
                paths.append(_decoded(name, bytes(text), encoding))
    if not paths or any(header.parent_unicode_name):
        paths.append(_decoded(name, header.parent_unicode_name, "utf-16-be"))
    names = local_names(paths)
    if not names:
        raise CorruptImage(f"{name}: names no parent in the header at offset {header_at}")
    return names


def _decoded(name: str, data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding).partition("\0")[0]
    except UnicodeDecodeError as exc:
        raise CorruptImage(f"{name}: the parent's name is no UTF-16 text ({exc})") from None


class VhdDisk(Disk):
    format = "vpc"

    def __init__(
        self,
        name: str,
        footer: vt.Footer,
        size: int,
        data_end: int,
        header: vt.Header | None = None,
        backing: Backing | None = None,
        taken: list[Taken] | None = None,
    ) -> None:
        """`data_end`: up to where in the file the disk's bytes may be.  No header: a fixed disk.
        `taken` are the places of structures, which blocks must not have."""
        self.size = size
        self.backing = backing
        self.own_id = str(uuid.UUID(bytes=footer.unique_id))
        self._name = name
        self._footer = footer
        self._header = header
        self._data_end = data_end
        self._taken = taken or []
        self._is_checked = False

    def map(self, offset: int, length: int) -> Steps[PieceList]:
        if self._header is None:
            return self._map_fixed(offset)
        header = self._header
        blocks = -(-self.size // header.block_size)
        entries = header.max_table_entries
        if not self._is_checked and entries * vt.ENTRY_SIZE <= WHOLE:
            whole = yield from read(header.table_offset, entries * vt.ENTRY_SIZE)
            self._check_places(header, whole, 0)
            self._check_unused(header, whole, blocks)
            self._is_checked = True
        first, end = offset // header.block_size, -(-(offset + length) // header.block_size)
        if self.backing is None:
            first, end = first // _PART * _PART, -(-end // _PART) * _PART
        end = min(end, blocks, first + _MOST_ENTRIES)
        at = header.table_offset + first * vt.ENTRY_SIZE
        table = bytes((yield from read(at, (end - first) * vt.ENTRY_SIZE)))
        table = table[: len(table) // vt.ENTRY_SIZE * vt.ENTRY_SIZE]
        if not self._is_checked:
            self._check_places(header, table, first)
        end = first + len(table) // vt.ENTRY_SIZE
        if end * header.block_size <= offset:
            block = offset // header.block_size
            raise CorruptImage(
                f"{self._name}: the table's entry {block} at offset "
                f"{header.table_offset + block * vt.ENTRY_SIZE} is past the end of the file"
            )
        bitmaps = None
        if self.backing is not None:
            bitmaps = yield from self._read_bitmaps(header, first, table)
        return self._pieces(header, first, table, bitmaps, offset)

    def _check_places(self, header: vt.Header, table: bytes, first: int) -> None:
        def of(index: int) -> str:
            at = header.table_offset + (first + index) * vt.ENTRY_SIZE
            return f"block {first + index} (table at offset {at})"

        rules = [(vt.NOT_ALLOCATED, vt.NOT_ALLOCATED, Kind.ZERO), (0, 0, Kind.DATA)]
        entries = Entries(
            vt.ENTRY_SIZE,
            rules,
            big_endian=True,
            mask=vt.NOT_ALLOCATED,
            scale=vt.SECTOR,
            high=self._data_end,
        )
        whole = memoryview(table)[: len(table) // vt.ENTRY_SIZE * vt.ENTRY_SIZE]
        unit = vt.bitmap_size(header.block_size) + header.block_size
        check_entries(entries, whole, unit, self._taken, self._name, of)

    def _check_unused(self, header: vt.Header, table: bytes, blocks: int) -> None:
        """Of entries past the disk's `blocks`: those that are past the file's end too tell that one
        of the sizes is wrong."""
        size = vt.bitmap_size(header.block_size) + header.block_size
        unused = memoryview(table)[: len(table) // vt.ENTRY_SIZE * vt.ENTRY_SIZE]
        unused = unused[blocks * vt.ENTRY_SIZE :]
        for index, (sector,) in enumerate(struct.iter_unpack(">I", unused)):
            if sector != vt.NOT_ALLOCATED and sector * vt.SECTOR + size > self._data_end:
                raise self._outside(header, blocks + index, sector)

    def _map_fixed(self, offset: int) -> PieceList:
        end = min(self.size, self._data_end)
        if offset >= end:
            raise CorruptImage(
                f"{self._name}: is truncated: {end} bytes of a fixed disk of {self.size} are there"
            )
        builder = PieceListBuilder()
        builder.data(end, 0)
        return builder.finish(end)

    def _read_bitmaps(self, header: vt.Header, first: int, table: bytes) -> Steps[dict[int, bytes]]:
        """Those of the first blocks of the table that are there, by their blocks' numbers."""
        length = -(-header.block_size // (vt.SECTOR * 8))
        most = max(1, min(_MOST_BITMAPS, _MOST_BITMAP_BYTES // length))
        numbers, reads = [], []
        for block, (sector,) in enumerate(struct.iter_unpack(">I", table), first):
            if sector != vt.NOT_ALLOCATED:
                numbers.append(block)
                reads.append(Read(sector * vt.SECTOR, length))
                if len(reads) == most:
                    break
        found = yield from read_all(reads)
        bitmaps = (bytes(bitmap).ljust(length, b"\0") for bitmap in found)
        return dict(zip(numbers, bitmaps, strict=True))

    def _pieces(
        self,
        header: vt.Header,
        first: int,
        table: bytes,
        bitmaps: dict[int, bytes] | None,
        offset: int,
    ) -> PieceList:
        """Of the table's blocks, as far as there is nothing wrong and their bitmaps are known."""
        size, bitmap_size = header.block_size, vt.bitmap_size(header.block_size)
        builder, block = PieceListBuilder(first * size), first
        step = (bitmap_size + size) // vt.SECTOR
        absent = Kind.ZERO if self.backing is None else Kind.BELOW
        plain = self._plain_entries(header) if bitmaps is None else None
        rest = memoryview(table)
        while rest:
            if plain is not None:
                count = plain.append(builder, rest, size, self.size, len(table))
                rest = rest[count * vt.ENTRY_SIZE :]
                block += count
            odd = rest if plain is None else rest[: _ODD * vt.ENTRY_SIZE]
            rest = rest[len(odd) :]
            found = iter(runs(odd, vt.ENTRY_SIZE, True, step))
            for count, value, stride in zip(found, found, found, strict=True):
                if value == vt.NOT_ALLOCATED:
                    block += count
                    builder.piece(Piece(builder.end, min(block * size, self.size), absent))
                    continue
                for index in range(count):
                    sector = value + index * stride
                    at, end = sector * vt.SECTOR + bitmap_size, min((block + 1) * size, self.size)
                    if at + end - block * size > self._data_end:
                        if block * size > offset:
                            return builder.finish(builder.end)
                        if end > offset:
                            raise self._outside(header, block, sector)
                        builder = PieceListBuilder(end)
                    elif bitmaps is None:
                        builder.data(end, at)
                    elif block in bitmaps:
                        _append_sectors(builder, end, at, bitmaps[block])
                    else:
                        return builder.finish(builder.end)
                    block += 1
        return builder.finish(builder.end)

    def _plain_entries(self, header: vt.Header) -> Entries:
        """All that are not wrong, of a disk without bitmaps that matter."""
        rules = [(vt.NOT_ALLOCATED, vt.NOT_ALLOCATED, Kind.ZERO), (0, 0, Kind.DATA)]
        return Entries(
            vt.ENTRY_SIZE,
            rules,
            big_endian=True,
            mask=vt.NOT_ALLOCATED,
            scale=vt.SECTOR,
            base=vt.bitmap_size(header.block_size),
            high=self._data_end,
        )

    def _outside(self, header: vt.Header, block: int, sector: int) -> CorruptImage:
        return CorruptImage(
            f"{self._name}: block {block} at sector {sector}, says the table at offset "
            f"{header.table_offset + block * vt.ENTRY_SIZE}, is past the end of the file"
        )

    def facts(self) -> list[tuple[str, str]]:
        footer, header = self._footer, self._header
        facts = [
            ("subformat", _SUBFORMATS[footer.disk_type]),
            ("creator application", footer.creator_application.decode("latin-1").strip(" \0")),
            (
                "geometry",
                f"{footer.cylinders} cylinders, {footer.heads} heads, "
                f"{footer.sectors_per_track} sectors",
            ),
            ("current size", str(footer.current_size)),
        ]
        if header is not None:
            facts.append(("block size", str(header.block_size)))
        if footer.saved_state:
            facts.append(("saved state", "yes"))
        return facts


def _append_sectors(builder: PieceListBuilder, end: int, at: int, bitmap: bytes) -> None:
    """A block's sectors up to `end`, of which the bitmap says which ones are there, from `at`."""
    start = builder.end
    absent = clear_runs(bitmap.translate(_LOWEST_FIRST), (end - start) // vt.SECTOR)
    found = iter(absent)
    for first, last in zip(found, found, strict=True):
        below, above = start + first * vt.SECTOR, start + last * vt.SECTOR
        if below > builder.end:
            builder.data(below, at + builder.end - start)
        builder.below(above)
    if builder.end < end:
        builder.data(end, at + builder.end - start)
