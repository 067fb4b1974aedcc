"""Which format a file is in, by its content."""

from __future__ import annotations

import struct

from imgfs.formats.containers import container
from imgfs.steps import Read, Steps, read_all

RAW = "raw"
_HEAD = 1024
_SECTOR = 512

#: (offset, bytes there, the format as qemu calls it).  Those that imgfs reads itself come first.
_MAGICS = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, struct.pack("<Q", 0xCAFEBABE), "vmdk"),  # seSparse
    (0x40, struct.pack("<I", 0xBEDA107F), "vdi"),
    (0, b"conectix", "vpc"),
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
    (0, b"LUKS\xba\xbe\0\1", "luks"),  # of version 2 qemu knows nothing
)
_FOOTER = b"conectix"  # of a fixed VHD: before it there is nothing but the disk
_KOLY = b"koly"
_DESCRIPTOR = b"# Disk DescriptorFile"


def probe(size: int) -> Steps[str]:
    """The format's name; `raw` where nothing says otherwise.  One round trip.

    It may be a key of CONTAINERS (containers.py): then there is no reader for it.
    """
    if size == 0:
        return RAW
    last = max(0, size - _SECTOR)
    head, tail = yield from read_all([Read(0, min(_HEAD, size)), Read(last, size - last)])
    if head.startswith(b"QFI\xfb") and head[4:8] == b"\0\0\0\1":
        return "qcow"  # the first version is another format
    for offset, magic, name in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return name
    if _is_descriptor(head):
        return "vmdk"
    if _is_footer(tail):
        return "vpc"
    if tail[:4] == _KOLY and tail[4:12] == struct.pack(">II", 4, 512):
        return "dmg"
    return container(head, tail) or RAW


def _is_descriptor(head: bytes) -> bool:
    """A VMDK's text; comments and empty lines may come first, as qemu has it."""
    for line in head.split(b"\n"):
        line = line.strip(b" \r")
        if line.startswith(_DESCRIPTOR) or line.lower().startswith(b"version="):
            return b"\0" not in line and (line.startswith(b"#") or b"createtype" in head.lower())
        if line and not line.startswith(b"#"):
            return False
    return False


def _is_footer(tail: bytes) -> bool:
    """Only with a checksum that is right: these are bytes of a guest's disk otherwise."""
    if tail[:8] != _FOOTER or len(tail) < _SECTOR:
        return False
    (checksum,) = struct.unpack_from(">I", tail, 64)
    return bool(checksum == ~(sum(tail) - sum(tail[64:68])) & 0xFFFFFFFF)
