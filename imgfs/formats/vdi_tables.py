"""Structures of VDI 1.1, little-endian, with the names of VirtualBox (Storage/VDICore.h)."""

from __future__ import annotations

import struct
from typing import NamedTuple

SECTOR = 512
SIGNATURE = 0xBEDA107F
SIGNATURE_OFFSET = 64
VERSION = 0x00010001  # 1.1
TYPE_NORMAL = 1  # grows
TYPE_FIXED = 2
TYPE_UNDO = 3
TYPE_DIFF = 4
FILE_INFO = b"<<< Oracle VM VirtualBox Disk Image >>>\n"  # "for eyes only"

BLOCK_FREE = 0xFFFFFFFF  # never written: anything may be read, zeroes as qemu has it
BLOCK_ZERO = 0xFFFFFFFE  # zeroes


class Header(NamedTuple):
    """VDIPREHEADER and VDIHEADER1."""

    szFileInfo: bytes
    u32Signature: int
    u32Version: int
    cbHeader: int  # of what follows VDIPREHEADER
    u32Type: int
    fFlags: int
    szComment: bytes
    offBlocks: int
    offData: int
    cCylinders: int
    cHeads: int
    cSectors: int
    cbSector: int
    u32Dummy: int
    cbDisk: int
    cbBlock: int
    cbBlockExtra: int  # in front of each block
    cBlocks: int
    cBlocksAllocated: int
    uuidCreate: bytes
    uuidModify: bytes
    uuidLinkage: bytes
    uuidParentModify: bytes


HEADER = struct.Struct("<64sII III256sII 4I I Q IIII 16s16s16s16s")
PREHEADER_SIZE = 72
LCHS_GEOMETRY = struct.Struct("<4I")  # of VDIHEADER1PLUS, which follows: cbSector is the last
