"""VDI, VirtualBox's disks: one map of blocks, in any order in the file.

VirtualBox, Storage/VDICore.h and VDI.cpp.  Opening reads the header, mapping a part of the map.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar
from uuid import UUID

from imgfs._native._tables import runs
from imgfs.errors import CorruptImage, UnsupportedFeature
from imgfs.formats import vdi_tables as t
from imgfs.formats.claims import WHOLE, check_entries
from imgfs.formats.disk import Disk
from imgfs.formats.entries import Entries
from imgfs.formats.window import Window
from imgfs.pieces import Kind, PieceList
from imgfs.steps import Steps, read

MAP = 1 << 20  # bytes of the map of blocks that are read at once
TOGETHER = 1024  # entries of it that are read even if one is wanted
ODD = 64  # entries that are looked at by themselves where the first one is out of the ordinary
MOST_BLOCKS = 0x3FFFFFFF  # qemu's limit
MOST_BLOCK_BYTES = 1 << 30
MAX = 0xFFFFFFFF  # of an entry
NO_UUID = bytes(16)


class VdiDisk(Disk):
    format: ClassVar[str] = "vdi"

    def __init__(self, name: str, file_size: int, header: t.Header) -> None:
        self.size = -(-header.cbDisk // t.SECTOR) * t.SECTOR
        self.own_id = str(UUID(bytes_le=header.uuidCreate))
        self._name = name
        self._file_size = file_size
        self._header = header
        self._stride = header.cbBlockExtra + header.cbBlock
        self._data = header.offData + header.cbBlockExtra
        self._blocks = -(-self.size // header.cbBlock)
        self._is_checked = False
        rules = [(MAX, t.BLOCK_ZERO, Kind.ZERO), (MAX, t.BLOCK_FREE, Kind.ZERO), (0, 0, Kind.DATA)]
        entries = partial(Entries, 4, rules, mask=MAX, scale=self._stride, high=file_size)
        self._claims = entries(base=header.offData)  # with what lies before a block's bytes
        self._plain = entries(base=self._data)

    def _check(self) -> Steps[None]:
        """Of a small map all of it; of a large one each part is checked when it is read."""
        length = 4 * self._blocks
        if not self._is_checked and length <= WHOLE:
            table = yield from read(self._header.offBlocks, length)
            self._check_places(table, 0)
            self._is_checked = True

    def _check_places(self, table: bytes, first: int) -> None:
        def of(index: int) -> str:
            block = first + index
            return f"block {block} (offset {self._header.offBlocks + 4 * block})"

        whole = memoryview(table)[: len(table) // 4 * 4]
        check_entries(self._claims, whole, self._stride, [], self._name, of)

    def map(self, offset: int, length: int) -> Steps[PieceList]:
        yield from self._check()
        block = self._header.cbBlock
        first = offset // block // TOGETHER * TOGETHER
        wanted = -(-(offset + length) // block // TOGETHER) * TOGETHER
        end = min(wanted, self._blocks, first + MAP // 4)
        at = self._header.offBlocks + 4 * first
        table = yield from read(at, 4 * (end - first))
        whole = len(table) // 4
        if not self._is_checked:
            self._check_places(table, first)
        window = Window(first * block, offset)
        rest = memoryview(table)[: whole * 4]
        while rest:
            count = self._plain.append(window.builder, rest, block, self.size, whole)
            odd = rest[count * 4 :][: ODD * 4]
            rest = rest[count * 4 + len(odd) :]
            found = runs(odd, 4, False, 1)
            for count, value, step in zip(found[0::3], found[1::3], found[2::3], strict=True):
                if self._append(window, count, value, step):
                    return window.builder.finish(window.builder.end)
        if whole < end - first:
            problem = f"{self._name}: the file ends in its map of blocks, at {at + len(table)}"
            window.bad(self._clip(end * block), problem)
        return window.builder.finish(window.builder.end)

    def _clip(self, end: int) -> int:
        return min(end, self.size)

    def _append(self, window: Window, count: int, value: int, step: int) -> bool:
        """A run of entries.  Whether the window ends there."""
        if value + (count - 1) * step >= t.BLOCK_ZERO:
            # A run of its own, but for ascending entries that end at these two.
            free = min(count, value + count - t.BLOCK_ZERO) if step else count
            stored = count - free
            if stored and self._append(window, stored, value, step if stored > 1 else 0):
                return True
            window.builder.zero(self._clip(window.builder.end + free * self._header.cbBlock))
            return False
        together = count if step and not self._header.cbBlockExtra else 1
        for index in range(0, count, together):
            if self._append_blocks(window, together, value + index * step):
                return True
        return False

    def _append_blocks(self, window: Window, count: int, value: int) -> bool:
        """Blocks that stand one after the other."""
        at, block = window.builder.end, self._header.cbBlock
        end = self._clip(at + count * block)
        offset = self._data + value * self._stride
        if offset + end - at <= self._file_size:
            window.builder.data(end, offset)
            return False
        good = max(0, self._file_size - offset) // block * block
        if good:
            window.builder.data(at + good, offset)
        problem = (
            f"{self._name}: block {(at + good) // block} is number {value + good // block} (offset "
            f"{self._header.offBlocks + 4 * ((at + good) // block)}), past the end of the file "
            f"({self._file_size} bytes)"
        )
        return window.bad(end, problem)

    def facts(self) -> list[tuple[str, str]]:
        header = self._header
        kind = "dynamic" if header.u32Type == t.TYPE_NORMAL else "fixed"
        return [
            ("type", kind),
            ("block size", str(header.cbBlock)),
            ("blocks", str(header.cBlocks)),
            ("allocated blocks", str(header.cBlocksAllocated)),
            ("uuid", str(self.own_id)),
        ]


def open_disk(name: str, size: int) -> Steps[VdiDisk]:
    """`size` is of the file, in bytes; `name` is its name, for messages.

    Raises CorruptImage and UnsupportedFeature.
    """
    if size < t.HEADER.size:
        raise CorruptImage(f"{name}: the file ends in its header ({size} bytes)")
    header = t.Header(*t.HEADER.unpack((yield from read(0, t.HEADER.size))))
    if header.u32Signature != t.SIGNATURE:
        raise CorruptImage(
            f"{name}: u32Signature {header.u32Signature:#x} (offset {t.SIGNATURE_OFFSET}) is not a "
            f"VDI's"
        )
    if header.u32Version != t.VERSION:
        major, minor = header.u32Version >> 16, header.u32Version & 0xFFFF
        raise UnsupportedFeature(f"{name}: u32Version {major}.{minor} (offset 68) is not supported")
    _check_base(name, header)
    _check_geometry(name, size, header)
    return VdiDisk(name, size, header)


def _check_base(name: str, header: t.Header) -> None:
    """A differencing image does not name its parent's file: only VirtualBox's registry does."""
    linked = header.uuidLinkage != NO_UUID or header.uuidParentModify != NO_UUID
    if header.u32Type in (t.TYPE_UNDO, t.TYPE_DIFF) or linked:
        raise UnsupportedFeature(
            f"{name}: is the difference from the disk {UUID(bytes_le=header.uuidLinkage)} "
            "(uuidLinkage, offset 424), whose file it does not name; make a whole one with "
            "VBoxManage clonemedium"
        )
    if header.u32Type not in (t.TYPE_NORMAL, t.TYPE_FIXED):
        raise UnsupportedFeature(f"{name}: u32Type {header.u32Type} (offset 76) is not supported")


def _check_geometry(name: str, size: int, header: t.Header) -> None:
    block = header.cbBlock
    if header.cbSector != t.SECTOR:
        raise UnsupportedFeature(f"{name}: cbSector {header.cbSector} (offset 360) is not 512")
    if not t.SECTOR <= block <= MOST_BLOCK_BYTES or block & (block - 1):
        raise UnsupportedFeature(
            f"{name}: cbBlock {block} (offset 376) is no power of two from 512 to "
            f"{MOST_BLOCK_BYTES}"
        )
    if header.cbBlockExtra > MOST_BLOCK_BYTES:
        raise UnsupportedFeature(f"{name}: cbBlockExtra {header.cbBlockExtra} (offset 380)")
    if header.cBlocks > MOST_BLOCKS:
        raise UnsupportedFeature(f"{name}: cBlocks {header.cBlocks} (offset 384) is absurd")
    if header.cbDisk > header.cBlocks * block:
        raise CorruptImage(
            f"{name}: cbDisk {header.cbDisk} (offset 368) is more than cBlocks {header.cBlocks} "
            f"(offset 384) of {block} bytes hold"
        )
    for field, value, offset in (
        ("offBlocks", header.offBlocks, 340),
        ("offData", header.offData, 344),
    ):
        if value % t.SECTOR:
            raise CorruptImage(
                f"{name}: {field} {value} (offset {offset}) is no multiple of {t.SECTOR}"
            )
    end = header.offBlocks + 4 * header.cBlocks
    if header.cbDisk and not t.HEADER.size <= header.offBlocks < size:
        raise CorruptImage(
            f"{name}: offBlocks {header.offBlocks} (offset 340) is not in the file ({size} bytes)"
        )
    if header.cBlocks and end > header.offData:
        raise CorruptImage(
            f"{name}: offData {header.offData} (offset 344) is before the end of the map of blocks "
            f"at {end}"
        )
