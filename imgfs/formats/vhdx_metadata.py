"""What a VHDX says of its disk: [MS-VHDX] section 2.6."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass

from imgfs.errors import CorruptImage, UnsupportedFeature
from imgfs.formats import vhdx_tables as vt
from imgfs.formats.claims import sorted_apart
from imgfs.formats.disk import Backing
from imgfs.formats.vhdx_log import Replayed
from imgfs.formats.windows_names import local_names
from imgfs.steps import Read, Steps

_FIRST_READ = 128 << 10  # the table, and the items where everybody puts them
_MOST_ITEM = 1 << 20
_PATHS = ("relative_path", "volume_path", "absolute_win32_path")  # to be tried in this order
#: Each with the length that it must have.
_KNOWN = {
    vt.FILE_PARAMETERS_ITEM: ("file parameters", 8),
    vt.VIRTUAL_DISK_SIZE_ITEM: ("virtual disk size", 8),
    vt.PAGE_83_ITEM: ("page 83 data", 16),
    vt.LOGICAL_SECTOR_SIZE_ITEM: ("logical sector size", 4),
    vt.PHYSICAL_SECTOR_SIZE_ITEM: ("physical sector size", 4),
    vt.PARENT_LOCATOR_ITEM: ("parent locator", None),
}


@dataclass(frozen=True, slots=True)
class Metadata:
    block_size: int
    is_fixed: bool
    size: int  #: bytes of the disk
    page_83: uuid.UUID
    logical_sector_size: int
    physical_sector_size: int
    backing: Backing | None


def read_metadata(name: str, file: Replayed, region: vt.Region) -> Steps[Metadata]:
    """Raises CorruptImage and UnsupportedFeature."""
    length = min(region.length, _FIRST_READ)
    (data,) = yield from file.read_all([Read(region.file_offset, length)])
    items = vt.items(data[: vt.METADATA_TABLE_SIZE])
    if items is None:
        raise CorruptImage(f"{name}: no metadata table at offset {region.file_offset}")
    found: dict[bytes, vt.Item] = {}
    for item in items:
        if item.item_id in _KNOWN and not item.flags & vt.IS_USER:
            _check_item(name, item, region)
            if item.item_id in found:
                raise CorruptImage(f"{name}: has two metadata items {_KNOWN[item.item_id][0]}")
            found[item.item_id] = item
        elif item.flags & vt.IS_REQUIRED:
            raise UnsupportedFeature(
                f"{name}: metadata item {uuid.UUID(bytes_le=item.item_id)} is required and unknown"
            )
    for item_id, (what, _) in _KNOWN.items():
        if item_id not in found and item_id != vt.PARENT_LOCATOR_ITEM:
            raise CorruptImage(
                f"{name}: the metadata table at offset {region.file_offset} has no {what}"
            )
    sorted_apart(
        name,
        [
            (region.file_offset + each.offset, region.file_offset + each.offset + each.length, what)
            for each, what in ((item, _KNOWN[item.item_id][0]) for item in found.values())
        ],
    )
    content = yield from _contents(name, file, region, data, found)
    return _metadata(name, content)


def _check_item(name: str, item: vt.Item, region: vt.Region) -> None:
    what, length = _KNOWN[item.item_id]
    if item.length != (item.length if length is None else length) or item.length > _MOST_ITEM:
        raise CorruptImage(f"{name}: {what} has a length of {item.length}")
    if item.offset < vt.METADATA_TABLE_SIZE or item.offset + item.length > region.length:
        raise CorruptImage(
            f"{name}: {what} at {item.offset} is not inside of the metadata region of "
            f"{region.length} bytes"
        )


def _contents(
    name: str, file: Replayed, region: vt.Region, data: bytes, found: dict[bytes, vt.Item]
) -> Steps[dict[bytes, bytes]]:
    missing = [item for item in found.values() if item.offset + item.length > len(data)]
    reads = [Read(region.file_offset + item.offset, item.length) for item in missing]
    more = yield from file.read_all(reads)
    content = {k: data[i.offset : i.offset + i.length] for k, i in found.items()}
    content |= {item.item_id: part for item, part in zip(missing, more, strict=True)}
    for item in found.values():
        if len(content[item.item_id]) < item.length:
            raise CorruptImage(
                f"{name}: {_KNOWN[item.item_id][0]} at offset {region.file_offset + item.offset} "
                "is past the end of the file"
            )
    return content


def _metadata(name: str, content: dict[bytes, bytes]) -> Metadata:
    block_size, flags = vt.FILE_PARAMETERS.unpack(content[vt.FILE_PARAMETERS_ITEM])
    (size,) = struct.unpack("<Q", content[vt.VIRTUAL_DISK_SIZE_ITEM])
    (logical,) = struct.unpack("<I", content[vt.LOGICAL_SECTOR_SIZE_ITEM])
    (physical,) = struct.unpack("<I", content[vt.PHYSICAL_SECTOR_SIZE_ITEM])
    if not vt.LEAST_BLOCK <= block_size <= vt.MOST_BLOCK or block_size & (block_size - 1):
        raise CorruptImage(
            f"{name}: block size {block_size} is no power of two from 1 MiB to 256 MiB"
        )
    if logical not in (512, 4096):
        raise CorruptImage(f"{name}: logical sector size {logical} is neither 512 nor 4096")
    if not size:
        raise CorruptImage(f"{name}: virtual disk size is 0")
    if size % logical:
        raise CorruptImage(f"{name}: virtual disk size {size} is no multiple of {logical}")
    if size > vt.MOST_SIZE:
        raise UnsupportedFeature(f"{name}: virtual disk size {size} is more than 64 TiB")
    backing = None
    if flags & vt.HAS_PARENT:
        locator = content.get(vt.PARENT_LOCATOR_ITEM)
        if locator is None:
            raise CorruptImage(f"{name}: has a parent, says its file parameters, but no locator")
        backing = _backing(name, locator)
    return Metadata(
        block_size,
        bool(flags & vt.LEAVE_BLOCK_ALLOCATED),
        size,
        uuid.UUID(bytes_le=content[vt.PAGE_83_ITEM]),
        logical,
        physical,
        backing,
    )


def _backing(name: str, locator: bytes) -> Backing:
    if len(locator) < vt.LOCATOR_HEADER.size:
        raise CorruptImage(f"{name}: the parent locator has a length of {len(locator)}")
    kind, count = vt.LOCATOR_HEADER.unpack_from(locator)
    if kind != vt.VHDX_LOCATOR:
        raise UnsupportedFeature(
            f"{name}: the parent locator is of the unknown type {uuid.UUID(bytes_le=kind)}"
        )
    end = vt.LOCATOR_HEADER.size + count * vt.LOCATOR_ENTRY.size
    if end > len(locator):
        raise CorruptImage(f"{name}: {count} entries of the parent locator are too many for it")
    values: dict[str, str] = {}
    for entry in vt.LOCATOR_ENTRY.iter_unpack(locator[vt.LOCATOR_HEADER.size : end]):
        key_at, value_at, key_length, value_length = entry
        key = _text(name, locator, key_at, key_length)
        values[key] = _text(name, locator, value_at, value_length)
    paths = [values[key] for key in _PATHS if values.get(key)]
    if not paths:
        raise CorruptImage(f"{name}: the parent locator has no path of the parent")
    wanted: list[str] = []
    for key in ("parent_linkage", "parent_linkage2"):  # the second one need not be there
        linkage = values.get(key, "")
        if linkage or not wanted:
            try:
                wanted.append(str(uuid.UUID(linkage)))
            except ValueError:
                raise CorruptImage(f"{name}: {key} {linkage!r} is no GUID") from None
    first, *others = local_names(paths)
    return Backing(first, "vhdx", tuple(wanted), tuple(others))


def _text(name: str, locator: bytes, at: int, length: int) -> str:
    data = locator[at : at + length]
    try:
        if len(data) == length:
            return data.decode("utf-16-le")
    except UnicodeDecodeError:
        pass
    raise CorruptImage(f"{name}: the text at {at} of the parent locator is no UTF-16")
