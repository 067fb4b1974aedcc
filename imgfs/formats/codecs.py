"""Compressed units: what formats store instead of a cluster or a grain."""

from __future__ import annotations

import struct
import zlib

from imgfs.errors import CorruptImage
from imgfs.pieces import Codec

_MARKER = struct.Struct("<QI")  # of a grain: lba, size (VMware, Virtual Disk Format 5.0)
_WBITS = {Codec.DEFLATE: -zlib.MAX_WBITS, Codec.ZLIB: zlib.MAX_WBITS}


def decode(codec: Codec, data: bytes | memoryview, unit: int, where: str, sector: int = 0) -> bytes:
    """The `unit` bytes that the data begins with the code of; what follows that is ignored.

    Never makes more than that, whatever the data says.  `sector` is for Codec.GRAIN.  Raises
    CorruptImage, which begins with `where`, when it makes fewer.
    """
    try:
        if codec is Codec.ZSTD:
            found = _zstd(data, unit)
        elif codec is Codec.GRAIN:
            found = _deflate(_marked(data, sector), unit, zlib.MAX_WBITS)
        else:
            found = _deflate(data, unit, _WBITS[codec])
    except ValueError as exc:
        raise CorruptImage(f"{where}: {exc}") from None
    if len(found) != unit:
        raise CorruptImage(f"{where}: {len(found)} bytes decompressed instead of {unit}")
    return found


def _marked(data: bytes | memoryview, sector: int) -> bytes | memoryview:
    """What follows the grain's marker, which must be that of this sector."""
    if len(data) < _MARKER.size:
        raise ValueError(f"a grain marker of {len(data)} bytes")
    lba, size = _MARKER.unpack_from(data)
    if lba != sector:
        raise ValueError(f"its marker says that it is of sector {lba}, not {sector}")
    if size > len(data) - _MARKER.size:
        raise ValueError(
            f"its marker says {size} bytes of {len(data) - _MARKER.size} that there are"
        )
    return data[_MARKER.size : _MARKER.size + size]


def _deflate(data: bytes | memoryview, unit: int, wbits: int) -> bytes:
    from isal import isal_zlib

    try:
        return isal_zlib.decompressobj(wbits).decompress(data, unit)
    except isal_zlib.error as exc:  # type: ignore[misc]
        raise ValueError(f"cannot be decompressed ({exc})") from None


def _zstd(data: bytes | memoryview, unit: int) -> bytes:
    import zstandard

    found = bytearray()
    try:
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            while len(found) < unit and (part := reader.read(unit - len(found))):
                found += part
    except zstandard.ZstdError as exc:
        raise ValueError(f"cannot be decompressed ({exc})") from None
    return bytes(found)
