"""VHDX: fixed, dynamic and differencing disks (see `vhdx_tables`)."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence

from imgfs._native._tables import clear_runs, runs
from imgfs.errors import CorruptImage, UnsupportedFeature
from imgfs.formats import vhdx_tables as vt
from imgfs.formats.claims import WHOLE, Taken, check_entries, sorted_apart
from imgfs.formats.disk import Disk
from imgfs.formats.entries import Entries
from imgfs.formats.vhdx_log import Replayed, replay
from imgfs.formats.vhdx_metadata import Metadata, read_metadata
from imgfs.pieces import Kind, Piece, PieceList, PieceListBuilder
from imgfs.steps import Read, Steps, read_all

_PART = 4096  # entries that are read at least, so that neighbours cost nothing
_MOST_ENTRIES = 32 << 10  # of one map step, which must not take long
_MOST_DIFFERENCING = 4096  # entries, of one map step where bitmaps may have to be read
_MOST_BITMAPS = 256  # of one map step
_MOST_BITMAP_BYTES = 1 << 20
_STORED = (vt.FULLY_PRESENT, vt.PARTIALLY_PRESENT)
_ZEROES = {vt.UNDEFINED, vt.ZERO, vt.UNMAPPED, vt.UNMAPPED_095}


def open_disk(name: str, size: int) -> Steps[VhdxDisk]:
    """The disk in a file of `size` bytes; `name` is for messages.

    Raises CorruptImage and UnsupportedFeature.
    """
    reads = [Read(0, len(vt.FILE_SIGNATURE))]
    reads += [Read(at, vt.HEADER_SIZE) for at in vt.HEADER_OFFSETS]
    reads += [Read(at, vt.REGION_TABLE_SIZE) for at in vt.REGION_TABLE_OFFSETS]
    signature, *sections = [bytes(part) for part in (yield from read_all(reads))]
    if signature != vt.FILE_SIGNATURE:
        raise CorruptImage(f"{name}: does not begin with {vt.FILE_SIGNATURE.decode()!r}")
    header = _current_header(name, sections[:2])
    file = yield from replay(name, size, header)
    pairs = zip(vt.REGION_TABLE_OFFSETS, sections[2:], strict=True)
    tables = [file.patched(at, vt.REGION_TABLE_SIZE, data) for at, data in pairs]
    bat, metadata_region, others = _regions(name, tables)
    taken = _places(name, file.size, header, [bat, metadata_region, *others])
    metadata = yield from read_metadata(name, file, metadata_region)
    disk = VhdxDisk(name, file, header, metadata, bat, taken)
    if disk.entries * vt.ENTRY_SIZE > bat.length:
        raise CorruptImage(
            f"{name}: the BAT at offset {bat.file_offset} has {bat.length} bytes, too few for "
            f"{disk.entries} entries"
        )
    return disk


def _current_header(name: str, copies: Sequence[bytes]) -> vt.Header:
    """The valid one with the larger sequence number.  Some tools write the same one twice."""
    found = []
    for data in copies:
        if (
            len(data) == vt.HEADER_SIZE
            and data[:4] == vt.HEADER_SIGNATURE
            and vt.has_checksum(data)
        ):
            found.append(vt.header(data))
    if not found:
        raise CorruptImage(
            f"{name}: no header with a correct checksum at offset {vt.HEADER_OFFSETS[0]} or "
            f"{vt.HEADER_OFFSETS[1]}"
        )
    if len(found) == 2 and found[0] != found[1]:
        if found[0].sequence_number == found[1].sequence_number:
            raise CorruptImage(
                f"{name}: both headers have the sequence number {found[0].sequence_number}"
            )
        found.sort(key=lambda header: -header.sequence_number)
    if found[0].version != vt.VERSION:
        raise UnsupportedFeature(f"{name}: the header's version is {found[0].version}, not 1")
    return found[0]


def _places(name: str, size: int, header: vt.Header, regions: Sequence[vt.Region]) -> list[Taken]:
    """What the file's own structures take of it.  Raises CorruptImage where two overlap, or one is
    not inside of the file."""
    taken: list[Taken] = [(0, vt.HEADER_SECTION, "the header section")]
    for region in regions:
        what = f"region {uuid.UUID(bytes_le=region.guid)}"
        taken.append((region.file_offset, region.file_offset + region.length, what))
    if header.log_length:
        taken.append((header.log_offset, header.log_offset + header.log_length, "the log"))
        if header.log_offset % vt.MIB or header.log_length % vt.MIB:
            raise CorruptImage(
                f"{name}: the log's offset {header.log_offset} or length {header.log_length} is no "
                "multiple of 1 MiB"
            )
    for start, end, what in taken[1:]:
        if start >= size:  # of one that is cut what is there can be read
            raise CorruptImage(
                f"{name}: {what} at offset {start}, of {end - start} bytes, is past the end of "
                f"the file ({size} bytes)"
            )
    return sorted_apart(name, taken)


def _regions(name: str, tables: Sequence[bytes]) -> tuple[vt.Region, vt.Region, list[vt.Region]]:
    """Of the BAT, of the metadata, and others that need not be known."""
    entries = vt.regions(tables[0])
    if entries is None:
        entries = vt.regions(tables[1])
    if entries is None:
        raise CorruptImage(
            f"{name}: no region table with a correct checksum at offset "
            f"{vt.REGION_TABLE_OFFSETS[0]} or {vt.REGION_TABLE_OFFSETS[1]}"
        )
    found: dict[bytes, vt.Region] = {}
    others: list[vt.Region] = []
    for region in entries:
        guid = uuid.UUID(bytes_le=region.guid)
        if region.guid not in (vt.BAT_REGION, vt.METADATA_REGION):
            if region.required & vt.REQUIRED_REGION:
                raise UnsupportedFeature(f"{name}: region {guid} is required and unknown")
            others.append(region)
            continue
        if region.guid in found:
            raise CorruptImage(f"{name}: region {guid} is there twice")
        aligned = not region.file_offset % vt.MIB and not region.length % vt.MIB
        if not aligned or not vt.MIB <= region.file_offset < 1 << 63 or not region.length:
            raise CorruptImage(
                f"{name}: region {guid} at offset {region.file_offset}, of {region.length} bytes, "
                "is not made of whole MiB past the first"
            )
        found[region.guid] = region
    for guid_bytes in (vt.BAT_REGION, vt.METADATA_REGION):
        if guid_bytes not in found:
            raise CorruptImage(f"{name}: region {uuid.UUID(bytes_le=guid_bytes)} is missing")
    return found[vt.BAT_REGION], found[vt.METADATA_REGION], others


class VhdxDisk(Disk):
    format = "vhdx"

    def __init__(
        self,
        name: str,
        file: Replayed,
        header: vt.Header,
        metadata: Metadata,
        bat: vt.Region,
        taken: list[Taken],
    ) -> None:
        """`taken` are the places of structures, which blocks must not have."""
        self.size = metadata.size
        self.backing = metadata.backing
        self.own_id = str(uuid.UUID(bytes_le=header.data_write_guid))
        self._name = name
        self._file = file
        self._metadata = metadata
        self._bat_at = bat.file_offset
        self._block_size = metadata.block_size
        self._taken = taken
        self._is_checked = False
        self._plain = None
        if self.backing is None and not file.changes:
            self._plain = self._plain_entries()
        self._ratio = vt.CHUNK_SECTORS * metadata.logical_sector_size // metadata.block_size
        self._blocks = -(-metadata.size // metadata.block_size)
        self.entries = vt.entries(self._blocks, self._ratio, self.backing is not None)

    def map(self, offset: int, length: int) -> Steps[PieceList]:
        size = self._block_size
        first, end = offset // size, -(-(offset + length) // size)
        if self.backing is None:
            first, end = first // _PART * _PART, -(-end // _PART) * _PART
            end = min(end, self._blocks, first + _MOST_ENTRIES)
        else:
            end = min(end, self._blocks, first + _MOST_DIFFERENCING)
        if not self._is_checked and self.entries * vt.ENTRY_SIZE <= WHOLE:
            (whole,) = yield from self._file.read_all([self._entry_read(0, self.entries)])
            self._check_places(whole, 0)
            self._is_checked = True
        start = self._index(first)
        reads = [self._entry_read(start, self._index(end - 1) + 1 - start)]
        chunks = range(first // self._ratio, (end - 1) // self._ratio + 1)
        if self.backing is not None:
            reads += [
                self._entry_read(self._index((chunk + 1) * self._ratio) - 1, 1) for chunk in chunks
            ]
        table, *bitmap_entries = yield from self._file.read_all(reads)
        if not self._is_checked:
            self._check_places(table, start)
        parts = []
        for chunk in chunks:
            a, b = max(first, chunk * self._ratio), min(end, (chunk + 1) * self._ratio)
            at = (self._index(a) - start) * vt.ENTRY_SIZE
            part = table[at : at + (b - a) * vt.ENTRY_SIZE]
            parts.append(part[: len(part) // vt.ENTRY_SIZE * vt.ENTRY_SIZE])
        bitmaps: dict[int, bytes] = {}
        if self.backing is not None:
            entries = dict(zip(chunks, bitmap_entries, strict=True))
            bitmaps = yield from self._read_bitmaps(first, b"".join(parts), entries)
        return self._pieces(first, parts, bitmaps, offset)

    def _check_places(self, table: bytes, start: int) -> None:
        """Of the BAT's entries from `start` on."""
        width, period = vt.ENTRY_SIZE, self._ratio + 1
        whole = bytearray(table[: len(table) // width * width])
        taken = list(self._taken)
        for index in range(period - 1 - start % period, len(whole) // width, period):
            at = index * width
            (value,) = struct.unpack_from("<Q", whole, at)
            place = value & vt.OFFSET_MASK
            if self.backing is not None and value & vt.STATE_MASK == vt.BITMAP_PRESENT:
                what = f"the sector bitmap of the BAT's entry {start + index}"
                taken.append((place, place + vt.BITMAP_BLOCK, what))
            whole[at : at + width] = bytes(width)
        rules = [(vt.STATE_MASK, state, Kind.DATA) for state in _STORED]
        rules.append((0, 0, Kind.ZERO))
        low, high = vt.MIB, self._file.size  # what is not in between is told by itself
        entries = Entries(width, rules, mask=vt.OFFSET_MASK, low=low, high=high)
        apart = sorted_apart(self._name, taken)

        def of(index: int) -> str:
            at = self._entry_read(start + index, 1).offset
            return f"the block of the BAT's entry {start + index} (offset {at})"

        check_entries(entries, whole, self._block_size, apart, self._name, of)

    def _plain_entries(self) -> Entries:
        """All that are not wrong, of a disk that is all in its file."""
        rules = [(vt.STATE_MASK, state, Kind.ZERO) for state in (*_ZEROES, vt.NOT_PRESENT)]
        rules.append((vt.STATE_MASK | vt.RESERVED_MASK, vt.FULLY_PRESENT, Kind.DATA))
        return Entries(vt.ENTRY_SIZE, rules, mask=vt.OFFSET_MASK, low=vt.MIB, high=self._file.size)

    def _index(self, block: int) -> int:
        """Of a payload block's entry in the BAT."""
        return block + block // self._ratio

    def _entry_read(self, index: int, count: int) -> Read:
        return Read(self._bat_at + index * vt.ENTRY_SIZE, count * vt.ENTRY_SIZE)

    def _read_bitmaps(
        self, first: int, table: bytes, entries: dict[int, bytes]
    ) -> Steps[dict[int, bytes]]:
        """Those of the first blocks that need one, by their numbers; what is not there is short."""
        length = self._block_size // self._metadata.logical_sector_size // 8
        most = max(1, min(_MOST_BITMAPS, _MOST_BITMAP_BYTES // length))
        found: dict[int, bytes] = {}
        reads: dict[int, Read] = {}
        for block, (value,) in enumerate(struct.iter_unpack("<Q", table), first):
            if value & vt.STATE_MASK != vt.PARTIALLY_PRESENT:
                continue
            if len(reads) + len(found) == most:
                break
            entry = int.from_bytes(entries[block // self._ratio], "little")
            at = (entry & vt.OFFSET_MASK) + block % self._ratio * length
            if entry & vt.STATE_MASK != vt.BITMAP_PRESENT or at + length > self._file.size:
                found[block] = b""
            else:
                reads[block] = Read(at, length)
        bitmaps = yield from self._file.read_all(list(reads.values()))
        return found | dict(zip(reads, bitmaps, strict=True))

    def _pieces(
        self, first: int, parts: Sequence[bytes], bitmaps: dict[int, bytes], offset: int
    ) -> PieceList:
        """Of the blocks whose entries the parts are, as far as there is nothing wrong."""
        size, block = self._block_size, first
        builder = PieceListBuilder(first * size)
        for whole in parts:
            part = whole
            if self._plain is not None:
                count = self._plain.append(builder, whole, size, self.size, len(whole))
                part = whole[count * vt.ENTRY_SIZE :]
                block += count
            found = iter(runs(part, vt.ENTRY_SIZE, False, size))
            for count, value, stride in zip(found, found, found, strict=True):
                together = count if self._is_one(block, count, value, stride) else 1
                for number in range(0, count, together):
                    end = min((block + together) * size, self.size)
                    wrong = self._append(builder, block, end, value + number * stride, bitmaps)
                    if wrong is not None and (end <= offset):
                        builder = PieceListBuilder(end)
                    elif wrong is not None and builder.end <= offset:
                        raise wrong
                    elif wrong is not None:
                        return builder.finish(builder.end)
                    block += together
        if builder.end <= offset:
            raise CorruptImage(
                f"{self._name}: the BAT's entry {self._index(block)} at offset "
                f"{self._entry_read(self._index(block), 1).offset} is past the end of the file"
            )
        return builder.finish(builder.end)

    def _is_one(self, block: int, count: int, value: int, stride: int) -> bool:
        """Are these blocks one piece?"""
        if value & vt.STATE_MASK in _ZEROES or value & vt.STATE_MASK == vt.NOT_PRESENT:
            return True
        if value & vt.STATE_MASK != vt.FULLY_PRESENT or not stride:
            return False
        if value & vt.RESERVED_MASK:
            return False
        length = min((block + count) * self._block_size, self.size) - block * self._block_size
        return vt.MIB <= value & vt.OFFSET_MASK <= self._file.size - length

    def _append(
        self,
        builder: PieceListBuilder,
        block: int,
        end: int,
        value: int,
        bitmaps: dict[int, bytes],
    ) -> CorruptImage | None:
        """What an entry says of the bytes from `block` up to `end`; else what is wrong with it."""
        state, at = value & vt.STATE_MASK, value & vt.OFFSET_MASK
        if state in _ZEROES or (state == vt.NOT_PRESENT and self.backing is None):
            builder.zero(end)
            return None
        if state == vt.NOT_PRESENT:
            builder.below(end)
            return None
        is_partial = state == vt.PARTIALLY_PRESENT and self.backing is not None
        if state != vt.FULLY_PRESENT and not is_partial:
            return self._wrong(block, f"is of the state {state}, which a disk like this has not")
        if value & vt.RESERVED_MASK:
            return self._wrong(block, f"is {value:#x}: its offset is no multiple of 1 MiB")
        if not vt.MIB <= at <= self._file.size - (end - block * self._block_size):
            return self._wrong(block, f"at offset {at} is not inside of the file")
        if not is_partial:
            self._file.append(builder, end, at)
            return None
        bitmap = bitmaps.get(block)
        if not bitmap:
            return self._wrong(block, "has no sector bitmap")
        sector = self._metadata.logical_sector_size
        start = builder.end
        found = iter(clear_runs(bitmap, (end - start) // sector))
        for low, high in zip(found, found, strict=True):
            if start + low * sector > builder.end:
                self._file.append(builder, start + low * sector, at + builder.end - start)
            builder.piece(Piece(builder.end, start + high * sector, Kind.BELOW))
        if builder.end < end:
            self._file.append(builder, end, at + builder.end - start)
        return None

    def _wrong(self, block: int, what: str) -> CorruptImage:
        at = self._entry_read(self._index(block), 1).offset
        return CorruptImage(f"{self._name}: block {block}, whose entry is at offset {at}, {what}")

    def facts(self) -> list[tuple[str, str]]:
        metadata = self._metadata
        kind = "fixed" if metadata.is_fixed else "dynamic"
        facts = [
            ("subformat", kind if self.backing is None else "differencing"),
            ("block size", str(metadata.block_size)),
            ("logical sector size", str(metadata.logical_sector_size)),
            ("physical sector size", str(metadata.physical_sector_size)),
            ("page 83 id", str(metadata.page_83)),
        ]
        if self._file.changes:
            facts.append(("log", f"replayed in memory: {len(self._file.changes)} changes"))
        return facts
