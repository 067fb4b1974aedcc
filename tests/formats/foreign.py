"""Images in formats that only qemu reads, made by hand where no tool at hand writes them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from itertools import accumulate

SECTOR = 512


def cloop(blocks: list[bytes]) -> bytes:
    """Blocks of one size, each deflated: block/cloop.c of qemu."""
    script = (
        b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
    )
    coded = [zlib.compress(block) for block in blocks]
    first = 128 + 8 + 8 * (len(blocks) + 1)
    offsets = accumulate(map(len, coded), initial=first)
    head = script.ljust(128, b"\0") + struct.pack(">II", len(blocks[0]), len(blocks))
    return head + b"".join(struct.pack(">Q", at) for at in offsets) + b"".join(coded)


def bochs(size: int, extent: int, sectors: Mapping[int, bytes]) -> bytes:
    """A growing redolog with these sectors, by number: block/bochs.c of qemu."""
    bitmap = -(-extent // SECTOR // 8)
    count = -(-size // extent)
    head = struct.pack(
        "<32s16s16sII", b"Bochs Virtual HD Image", b"Redolog", b"Growing", 0x20000, 512
    )
    head += struct.pack("<IIIIQ", count, bitmap, extent, 0, size)
    catalog = [0xFFFFFFFF] * count
    data = b""
    numbers = sorted({sector * SECTOR // extent for sector in sectors})
    for position, number in enumerate(numbers):
        catalog[number] = position
        first = number * extent // SECTOR
        inside = {
            at - first: said for at, said in sectors.items() if 0 <= at - first < extent // SECTOR
        }
        bits = sum(1 << at for at in inside)
        data += bits.to_bytes(bitmap, "little").ljust(-(-bitmap // SECTOR) * SECTOR, b"\0")
        body = bytearray(extent)
        for at, said in inside.items():
            body[at * SECTOR : (at + 1) * SECTOR] = said
        data += body
    return head.ljust(SECTOR, b"\0") + struct.pack(f"<{count}I", *catalog) + data


def dmg(chunks: list[tuple[str, bytes]]) -> bytes:
    """Chunks that are `zlib`, `raw` or `zero`, with a resource fork: block/dmg.c of qemu."""
    kinds = {"zlib": 0x80000005, "raw": 1, "zero": 2}
    data, table, sector = b"", b"", 0
    for kind, content in chunks:
        stored = {"zlib": zlib.compress(content), "raw": content, "zero": b""}[kind]
        count = len(content) // SECTOR
        table += struct.pack(">IIQQQQ", kinds[kind], 0, sector, count, len(data), len(stored))
        data += stored
        sector += count
    mish = struct.pack(">4sIQQQ", b"mish", 1, 0, sector, 0).ljust(204, b"\0") + table
    body = struct.pack(">I", len(mish)) + mish
    fork = struct.pack(">III", 256, 256 + len(body), len(body)).ljust(256, b"\0") + body
    koly = bytearray(struct.pack(">4sII", b"koly", 4, 512).ljust(512, b"\0"))
    struct.pack_into(">QQQQ", koly, 0x18, 0, len(data), len(data), len(fork))
    struct.pack_into(">Q", koly, 0x1EC, sector)
    return data + fork + bytes(koly)
