"""Compressed units: what formats store instead of a cluster or a grain."""

from __future__ import annotations

import zlib

from imgfs.errors import CorruptImage
from imgfs.pieces import Codec

_WBITS = {Codec.DEFLATE: -zlib.MAX_WBITS, Codec.ZLIB: zlib.MAX_WBITS}


def decode(codec: Codec, data: bytes | memoryview, unit: int, where: str) -> bytes:
    """The `unit` bytes that the data begins with the code of; what follows that is ignored.

    Never makes more than that, whatever the data says.  Raises CorruptImage, which begins with
    `where`, when it makes fewer.
    """
    try:
        found = _zstd(data, unit) if codec is Codec.ZSTD else _deflate(data, unit, _WBITS[codec])
    except ValueError as exc:
        raise CorruptImage(f"{where}: {exc}") from None
    if len(found) != unit:
        raise CorruptImage(f"{where}: {len(found)} bytes decompressed instead of {unit}")
    return found


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
