"""Formats that imgfs does not read itself: what must be known of them before qemu opens them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from imgfs.errors import CorruptImage
from imgfs.formats.disk import Backing, Disk
from imgfs.image import Image
from imgfs.pieces import PieceList, PieceListBuilder
from imgfs.steps import Steps, read

#: As qemu calls them.
SERVED = ("qcow", "qed", "parallels", "dmg", "cloop", "bochs", "luks")

# docs/interop/qed_spec.txt of qemu.
_QED = struct.Struct("<4sIIIQQQQQII")
_QED_MAGIC = b"QED\0"
_QED_BACKING_FILE, _QED_NO_PROBE = 1, 4
_QED_MOST_NAME = 1023
# block/qcow.c of qemu; big-endian: magic, version, where the backing file's name is, its length.
_QCOW = struct.Struct(">4sIQI")
_QCOW_MOST_NAME = 1023


@dataclass(frozen=True, slots=True)
class Node:
    """An image file for qemu to open, as it calls the format, and the one below it."""

    format: str
    file: Image
    below: Node | None = None

    def chain(self) -> Iterator[Node]:
        """From the top down."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.below


class ServedDisk(Disk):
    """All of file `file`, which has the disk's bytes."""

    format = "nbd"

    def __init__(self, size: int, file: int) -> None:
        self.size = size
        self._file = file

    def map(self, offset: int, length: int) -> Steps[PieceList]:
        yield from ()
        builder = PieceListBuilder(offset)
        builder.data(offset + length, offset, self._file)
        return builder.finish(builder.end)

    def facts(self) -> list[tuple[str, str]]:
        return [("read by", "qemu-nbd")]


#: What makes of the header of a file with a backing file that of one without: (the first byte of a
#: field, what to keep of it).  Of QED a feature's bit; of the others the offset of the name.
ALONE = {"qed": (16, b"\xfe"), "qcow": (8, bytes(8)), "qcow2": (8, bytes(8))}


def backing_of(name: str, format: str) -> Steps[Backing | None]:
    """What the image's header names as the file below it.  Raises CorruptImage."""
    if format == "qed":
        return (yield from _qed_backing(name))
    if format == "qcow":
        return (yield from _qcow_backing(name))
    return None


def _qed_backing(name: str) -> Steps[Backing | None]:
    header = yield from read(0, _QED.size)
    if len(header) < _QED.size or header[:4] != _QED_MAGIC:
        raise CorruptImage(f"{name}: does not begin with the header of a QED")
    _, cluster_size, _, header_clusters, features, *_, at, length = _QED.unpack(header)
    if not features & _QED_BACKING_FILE:
        return None
    if not 0 < length <= _QED_MOST_NAME or at + length > header_clusters * cluster_size:
        raise CorruptImage(
            f"{name}: backing_filename_size is {length} at {at}: "
            f"at most {_QED_MOST_NAME}, inside of the header"
        )
    found = yield from _name(name, at, length)
    return Backing(found, "raw" if features & _QED_NO_PROBE else None)


def _qcow_backing(name: str) -> Steps[Backing | None]:
    header = yield from read(0, _QCOW.size)
    if len(header) < _QCOW.size or header[:8] != b"QFI\xfb\0\0\0\1":
        raise CorruptImage(f"{name}: does not begin with the header of a qcow")
    _, _, at, length = _QCOW.unpack(header)
    if not at:
        return None
    if not 0 < length <= _QCOW_MOST_NAME:
        raise CorruptImage(f"{name}: backing_file_size is {length}: at most {_QCOW_MOST_NAME}")
    return Backing((yield from _name(name, at, length)))


def _name(name: str, at: int, length: int) -> Steps[str]:
    found = yield from read(at, length)
    if len(found) < length:
        raise CorruptImage(f"{name}: the name of its backing file at {at} is past the end")
    return found.split(b"\0")[0].decode("utf-8", "surrogateescape")
