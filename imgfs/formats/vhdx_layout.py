"""A disk as a dynamic VHDX (see `vhdx_tables`)."""

from __future__ import annotations

import struct
import sys
import uuid
from array import array
from functools import lru_cache

from imgfs.errors import UnsupportedFeature
from imgfs.extents import ExtentList
from imgfs.formats import vhdx_tables as vt
from imgfs.formats.block_layout import BlockLayout, rounded_up
from imgfs.formats.layout import About, Clusters

_LOG_AT = vt.HEADER_SECTION
_METADATA_AT = _LOG_AT + vt.MIB
_BAT_AT = _METADATA_AT + vt.MIB
_LOGICAL_SECTOR, _PHYSICAL_SECTOR = 512, 4096
_LARGEST_BLOCK = 32 << 20  # what Windows makes
_FINE_BLOCKS = 128 << 10  # blocks grow when there would be more of them


def layout(extents: ExtentList, about: About) -> VhdxLayout:
    """Of the disk that has these extents.  Raises UnsupportedFeature when it is empty, which qemu
    takes for a table that is too small, or above 64 TiB."""
    if extents.end == 0:
        raise UnsupportedFeature(f"{about.name}: a VHDX holds no disk of 0 bytes")
    if extents.end > vt.MOST_SIZE:
        raise UnsupportedFeature(
            f"{about.name}: a VHDX holds at most 64 TiB, not the disk's {extents.end} bytes"
        )
    return VhdxLayout(extents, about)


class VhdxLayout(BlockLayout):
    def __init__(self, extents: ExtentList, about: About) -> None:
        blocks = Clusters(extents, _block_size(extents.end))
        self._ratio = vt.CHUNK_SECTORS * _LOGICAL_SECTOR // blocks.cluster_size
        bat_end = _BAT_AT + vt.entries(blocks.total, self._ratio, False) * vt.ENTRY_SIZE
        bat_region_end = max(_BAT_AT + vt.MIB, rounded_up(bat_end, vt.MIB))
        regions = _region_table(bat_region_end - _BAT_AT)
        structures = [(0, vt.FILE_SIGNATURE + "imgfs".encode("utf-16-le"))]
        for number, at in enumerate(vt.HEADER_OFFSETS, 1):
            structures.append((at, _header(about, number)))
        structures += [(at, regions) for at in vt.REGION_TABLE_OFFSETS]
        size = rounded_up(extents.end, _LOGICAL_SECTOR)
        structures += _metadata(size, blocks.cluster_size, about)
        super().__init__(extents, blocks, structures, (_BAT_AT, bat_end), bat_region_end)

    def _table(self, start: int, end: int) -> bytes:
        first, last = start // vt.ENTRY_SIZE, -(-end // vt.ENTRY_SIZE)
        table = array("Q")
        while len(table) < last - first:
            chunk, inside = divmod(first + len(table), self._ratio + 1)
            if inside == self._ratio:
                table.append(vt.NOT_PRESENT)  # of a sector bitmap
                continue
            block = chunk * self._ratio + inside
            count = min(self._ratio - inside, last - first - len(table))
            table += self._entries(block, block + count)
        if sys.byteorder == "big":
            table.byteswap()
        skip = start - first * vt.ENTRY_SIZE
        return table.tobytes()[skip : skip + end - start]

    def _entries(self, first: int, end: int) -> array[int]:
        """Of payload blocks: those without data are said to be zero, not undefined."""
        size = self._blocks.cluster_size
        table = array("Q", [vt.ZERO]) * (end - first)
        for block, run_end, rank in self._blocks.runs(first, end):
            at = (self._blocks_at + rank * size) | vt.FULLY_PRESENT
            entries = range(at, at + (run_end - block) * size, size)
            table[block - first : run_end - first] = array("Q", entries)
        return table


@lru_cache
def _region_table(bat_length: int) -> bytes:
    """Without its padding: the same for all disks of about a size, and its checksum takes long."""
    regions = [
        vt.Region(vt.BAT_REGION, _BAT_AT, bat_length, vt.REQUIRED_REGION),
        vt.Region(vt.METADATA_REGION, _METADATA_AT, vt.MIB, vt.REQUIRED_REGION),
    ]
    return vt.region_table(regions).rstrip(b"\0")


def _block_size(size: int) -> int:
    """Small blocks keep holes; the BAT stays within 1 MiB up to 4 TiB, and 16 MiB at the most."""
    block_size = vt.LEAST_BLOCK
    while block_size < _LARGEST_BLOCK and size > block_size * _FINE_BLOCKS:
        block_size *= 2
    return block_size


def _guid(about: About, what: str) -> bytes:
    return uuid.UUID(bytes=about.unique(what), version=4).bytes_le


def _header(about: About, number: int) -> bytes:
    return vt.Header(
        vt.HEADER_SIGNATURE,
        0,
        number,
        _guid(about, "vhdx file write guid"),
        _guid(about, "vhdx data write guid"),
        vt.NO_GUID,
        vt.LOG_VERSION,
        vt.VERSION,
        vt.MIB,
        _LOG_AT,
    ).pack()


def _metadata(size: int, block_size: int, about: About) -> list[tuple[int, bytes]]:
    """The table and the items, one after the other behind it."""
    virtual_disk = vt.IS_REQUIRED | vt.IS_VIRTUAL_DISK
    content = [
        (vt.FILE_PARAMETERS_ITEM, vt.IS_REQUIRED, vt.FILE_PARAMETERS.pack(block_size, 0)),
        (vt.VIRTUAL_DISK_SIZE_ITEM, virtual_disk, struct.pack("<Q", size)),
        (vt.PAGE_83_ITEM, virtual_disk, _guid(about, "vhdx page 83")),
        (vt.LOGICAL_SECTOR_SIZE_ITEM, virtual_disk, struct.pack("<I", _LOGICAL_SECTOR)),
        (vt.PHYSICAL_SECTOR_SIZE_ITEM, virtual_disk, struct.pack("<I", _PHYSICAL_SECTOR)),
    ]
    items, at = [], vt.METADATA_TABLE_SIZE
    for item_id, flags, data in content:
        items.append(vt.Item(item_id, at, len(data), flags))
        at += len(data)
    return [
        (_METADATA_AT, vt.metadata_table(items)),
        (_METADATA_AT + vt.METADATA_TABLE_SIZE, b"".join(data for _, _, data in content)),
    ]
