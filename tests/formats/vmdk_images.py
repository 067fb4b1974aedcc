"""VMDKs made by hand: what qemu reads and cannot write, and what nobody should read."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

SECTOR = 512
GRAIN = 8  # sectors
GTES = 128
AT_END = 0xFFFFFFFFFFFFFFFF


def grain_bytes(number: int, size: int = GRAIN * SECTOR) -> bytes:
    """What grain `number` is filled with."""
    return bytes([number % 250 + 1]) * size


def text(create_type: str, *extents: str, more: str = "", cid: str = "1234abcd") -> bytes:
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        f"CID={cid}",
        *([] if "parentCID" in more else ["parentCID=ffffffff"]),
        f'createType="{create_type}"',
        *([more] if more else []),
        "# Extent description",  # qemu 7.2 counts an extent that follows an empty line twice
        *extents,
        'ddb.adapterType = "ide"',
    ]
    return "\n".join(lines).encode() + b"\n"


def header(capacity: int, **fields: int | bytes) -> bytes:
    """A sector; its fields are those of a hosted sparse extent with small grains."""
    values: dict[str, int | bytes] = {
        "magicNumber": b"KDMV",
        "version": 1,
        "flags": 3,
        "capacity": capacity,
        "grainSize": GRAIN,
        "descriptorOffset": 1,
        "descriptorSize": 2,
        "numGTEsPerGT": GTES,
        "rgdOffset": 0,
        "gdOffset": 0,
        "overHead": 16,
        "uncleanShutdown": 0,
        "newLines": b"\n \r\n",
        "compressAlgorithm": 0,
    }
    assert fields.keys() <= values.keys()
    return struct.pack("<4sIIQQQQIQQQB4sH", *(values | fields).values()).ljust(SECTOR, b"\0")


def hosted(
    capacity: int,
    grains: Mapping[int, int | None],
    create_type: str = "monolithicSparse",
    more: str = "",
    **fields: int | bytes,
) -> bytearray:
    """Both directories with all their tables, then grains in the order of `grains`.

    A grain's value is what its table says, or None: where it is.
    """
    tables = -(-capacity // (GRAIN * GTES))
    directory = -(-tables * 4 // SECTOR)
    rgd = 3
    gd = rgd + directory + tables
    first = -(-(gd + directory + tables) // GRAIN) * GRAIN
    head = header(capacity, rgdOffset=rgd, gdOffset=gd, overHead=first, **fields)
    entries = [0] * (tables * GTES)
    data = bytearray()
    for grain, said in grains.items():
        if said is None:
            entries[grain] = first + len(data) // SECTOR
            data += grain_bytes(grain)
        else:
            entries[grain] = said
    table = struct.pack(f"<{len(entries)}I", *entries)
    image = head + text(create_type, more=more).ljust(2 * SECTOR, b"\0")
    for start in (rgd, gd):
        places = range(start + directory, start + directory + tables)
        image += struct.pack(f"<{tables}I", *places).ljust(directory * SECTOR, b"\0") + table
    return bytearray(image.ljust(first * SECTOR, b"\0") + data)


def stream(capacity: int, grains: Mapping[int, bytes], **fields: int | bytes) -> bytearray:
    """A streamOptimized one with a footer; a grain's value is what it holds."""
    flags = {"flags": 0x30001, "version": 3, "compressAlgorithm": 1}
    text_part = text("streamOptimized").ljust(2 * SECTOR, b"\0")
    image = header(capacity, gdOffset=AT_END, **flags, **fields) + text_part
    directory = []
    for table in range(-(-capacity // (GRAIN * GTES))):
        entries = [0] * GTES
        for grain in sorted(grains):
            if grain // GTES == table:
                entries[grain % GTES] = len(image) // SECTOR
                coded = zlib.compress(grains[grain])
                image += sectors(struct.pack("<QI", grain * GRAIN, len(coded)) + coded)
        directory.append(0)
        if any(entries):
            image += sectors(struct.pack("<QII", 1, 0, 1))
            directory[-1] = len(image) // SECTOR
            image += struct.pack(f"<{GTES}I", *entries)
    image += sectors(struct.pack("<QII", 1, 0, 2))
    gd = len(image) // SECTOR
    image += sectors(struct.pack(f"<{len(directory)}I", *directory))
    image += sectors(struct.pack("<QII", 1, 0, 3))
    image += header(capacity, gdOffset=gd, **flags, **fields)
    return bytearray(image + bytes(SECTOR))


def sectors(content: bytes) -> bytes:
    return content.ljust(-(-len(content) // SECTOR) * SECTOR, b"\0")


def cowd(capacity: int, grains: list[int], grain: int = 1) -> bytearray:
    """A "COWD" extent with these grains, in that order in the file."""
    tables = -(-capacity // (grain * 4096))
    gd_sectors = -(-tables * 4 // SECTOR)
    head = struct.pack("<4s7I", b"COWD", 1, 3, capacity, grain, 4, tables, 0).ljust(2048, b"\0")
    used = sorted({number // 4096 for number in grains})
    first = 4 + gd_sectors + 32 * len(used)
    directory = [4 + gd_sectors + 32 * used.index(n) if n in used else 0 for n in range(tables)]
    entries = {table: [0] * 4096 for table in used}
    data = bytearray()
    for number in grains:
        entries[number // 4096][number % 4096] = first + len(data) // SECTOR
        data += grain_bytes(number, grain * SECTOR)
    image = head + sectors(struct.pack(f"<{tables}I", *directory))
    for table in used:
        image += struct.pack("<4096I", *entries[table])
    return bytearray(image + data)


def sesparse(capacity: int, grains: Mapping[int, int | None]) -> bytearray:
    """An seSparse extent; a grain's value is what its table says, or None: where it is."""
    tables = -(-capacity // (8 * 4096))
    used = sorted({number // 4096 for number in grains})
    gd, gd_sectors = 2, -(-tables * 8 // SECTOR)
    first_table = gd + gd_sectors
    first_grain = first_table + 64 * len(used)
    areas = [1, 1, 0, 0, 0, 0, gd, gd_sectors, first_table, 64 * len(used), 0, 0, 0, 0]
    head = struct.pack(
        "<26Q",
        *(0xCAFEBABE, 0x200000001, capacity, 8, 64, 0, 0, 0, 0, 0, *areas, first_grain, 0),
    ).ljust(SECTOR, b"\0")
    volatile = struct.pack("<4Q", 0xCAFECAFE, 0, 0, 0).ljust(SECTOR, b"\0")
    directory = [
        0x1000000000000000 | used.index(table) if table in used else 0 for table in range(tables)
    ]
    entries = {table: [0] * 4096 for table in used}
    data, stored = bytearray(), 0
    for number, said in grains.items():
        if said is None:
            said = 3 << 60 | (stored & 0xFFF) << 48 | stored >> 12
            data += grain_bytes(number, 4096)
            stored += 1
        entries[number // 4096][number % 4096] = said
    image = head + volatile + sectors(struct.pack(f"<{tables}Q", *directory))
    for table in used:
        image += struct.pack("<4096Q", *entries[table])
    return bytearray(image + data)
