"""VHDX files made by hand: logs for those of qemu, and differencing disks."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence

from imgfs.formats import vhdx_tables as vt

LOG_GUID = b"L" * 16
PARENT_ID = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")
KIB64 = 64 << 10
BAT_AT, METADATA_AT = 3 * vt.MIB, 2 * vt.MIB


def log_entry(
    number: int,
    tail: int,
    changes: Sequence[tuple[int, bytes | int]],
    file_size: int,
    guid: bytes = LOG_GUID,
) -> bytes:
    """One that puts 4096 bytes at each offset, or so many zeroes."""
    descriptors, data = b"", b""
    for offset, content in changes:
        if isinstance(content, int):
            fields = (b"zero", bytes(4), struct.pack("<Q", content), offset, number)
        else:
            fields = (b"desc", content[-4:], content[:8], offset, number)
            data += vt.LOG_DATA.pack(b"data", number >> 32, content[8:-4], number & 0xFFFFFFFF)
        descriptors += vt.DESCRIPTOR.pack(*fields)
    head_size = -(-(vt.LOG_ENTRY_HEADER_SIZE + len(descriptors)) // 4096) * 4096
    header = vt.LogEntry(
        b"loge", 0, head_size + len(data), tail, number, len(changes), 0, guid, file_size, file_size
    )
    return vt.with_checksum((header.pack() + descriptors).ljust(head_size, b"\0") + data)


def set_log(file: bytearray, log: bytes, guid: bytes = LOG_GUID) -> None:
    """Make the file's log this one, to be replayed."""
    for at in vt.HEADER_OFFSETS:
        header = vt.header(file[at : at + vt.HEADER_SIZE])
        file[at : at + vt.HEADER_SIZE] = header._replace(checksum=0, log_guid=guid).pack()
    file[header.log_offset : header.log_offset + len(log)] = log


def repair(file: bytearray) -> None:
    """Make the checksums right."""
    sizes = [(at, vt.HEADER_SIZE) for at in vt.HEADER_OFFSETS]
    sizes += [(at, vt.REGION_TABLE_SIZE) for at in vt.REGION_TABLE_OFFSETS]
    for at, size in sizes:
        part = bytes(file[at : at + size])
        if len(part) == size:
            file[at : at + size] = vt.with_checksum(part[:4] + bytes(4) + part[8:])


def locator(values: dict[str, str], kind: bytes = vt.VHDX_LOCATOR) -> bytes:
    texts = [text.encode("utf-16-le") for pair in values.items() for text in pair]
    at = vt.LOCATOR_HEADER.size + len(values) * vt.LOCATOR_ENTRY.size
    entries = b""
    for key, value in zip(texts[::2], texts[1::2], strict=True):
        entries += vt.LOCATOR_ENTRY.pack(at, at + len(key), len(key), len(value))
        at += len(key) + len(value)
    return vt.LOCATOR_HEADER.pack(kind, len(values)) + entries + b"".join(texts)


LINKAGE = {"parent_linkage": f"{{{PARENT_ID}}}"}
PARENT = {**LINKAGE, "relative_path": ".\\parent.vhdx"}


class Differencing:
    """A differencing disk; its blocks are appended one by one."""

    def __init__(self, size: int, block_size: int, sector: int = 512) -> None:
        self.sector, self.block_size = sector, block_size
        self.ratio = vt.CHUNK_SECTORS * sector // block_size
        self.blocks = -(-size // block_size)
        self.table = [0] * vt.entries(self.blocks, self.ratio, True)
        self.items = {
            vt.FILE_PARAMETERS_ITEM: vt.FILE_PARAMETERS.pack(block_size, vt.HAS_PARENT),
            vt.VIRTUAL_DISK_SIZE_ITEM: struct.pack("<Q", size),
            vt.PAGE_83_ITEM: b"p" * 16,
            vt.LOGICAL_SECTOR_SIZE_ITEM: struct.pack("<I", sector),
            vt.PHYSICAL_SECTOR_SIZE_ITEM: struct.pack("<I", 4096),
            vt.PARENT_LOCATOR_ITEM: locator(PARENT),
        }
        bat = -(-len(self.table) * 8 // vt.MIB) * vt.MIB
        self.regions = [
            vt.Region(vt.BAT_REGION, BAT_AT, bat, 1),
            vt.Region(vt.METADATA_REGION, METADATA_AT, vt.MIB, 1),
        ]
        self.body = bytearray(BAT_AT + bat)

    def place(self, block: int) -> int:
        """Of its entry in the table."""
        return block + block // self.ratio

    def append(self, content: bytes) -> int:
        at = len(self.body)
        self.body += content.ljust(-(-len(content) // vt.MIB) * vt.MIB, b"\0")
        return at

    def add(self, block: int, content: bytes, present: set[int] | None = None) -> None:
        """Without `present`, which are sectors, all of the block is there."""
        state = vt.FULLY_PRESENT if present is None else vt.PARTIALLY_PRESENT
        self.table[self.place(block)] = self.append(content) | state
        if present is None:
            return
        bitmap_entry = self.place((block // self.ratio + 1) * self.ratio) - 1
        if not self.table[bitmap_entry]:
            self.table[bitmap_entry] = self.append(bytes(vt.MIB)) | vt.BITMAP_PRESENT
        at = self.table[bitmap_entry] & ~7
        first = block % self.ratio * (self.block_size // self.sector)
        for sector in present:
            byte, bit = divmod(first + sector, 8)
            self.body[at + byte] |= 1 << bit

    def file(self, **changes: int) -> bytearray:
        """`changes` are of the header."""
        self.body[:8] = b"vhdxfile"
        for number, at in enumerate(vt.HEADER_OFFSETS, 1):
            fields = (b"f" * 16, b"d" * 16, bytes(16), 0, 1, vt.MIB, vt.MIB)
            header = vt.Header(b"head", 0, number, *fields)._replace(**changes)
            self.body[at : at + vt.HEADER_SIZE] = header.pack()
        for at in vt.REGION_TABLE_OFFSETS:
            self.body[at : at + vt.REGION_TABLE_SIZE] = vt.region_table(self.regions)
        entries, at = [], KIB64
        for item_id, content in self.items.items():
            entries.append(vt.Item(item_id, at, len(content), vt.IS_REQUIRED))
            self.body[METADATA_AT + at : METADATA_AT + at + len(content)] = content
            at += len(content)
        table = vt.metadata_table(entries).ljust(KIB64, b"\0")
        self.body[METADATA_AT : METADATA_AT + KIB64] = table
        struct.pack_into(f"<{len(self.table)}Q", self.body, BAT_AT, *self.table)
        return self.body
