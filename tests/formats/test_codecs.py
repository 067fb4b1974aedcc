"""Units decompressed by codec: whole, with something behind them, broken, and bombs."""

from __future__ import annotations

import zlib

import pytest
import zstandard

from imgfs.errors import CorruptImage
from imgfs.formats.codecs import decode
from imgfs.pieces import Codec

UNIT = bytes(range(256)) * 256


def raw_deflate(data: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -12)
    return coder.compress(data) + coder.flush()


ENCODERS = {
    Codec.DEFLATE: raw_deflate,
    Codec.ZLIB: zlib.compress,
    Codec.ZSTD: zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("codec", Codec)
def test_a_unit(codec: Codec) -> None:
    coded = ENCODERS[codec](UNIT)
    assert decode(codec, coded, len(UNIT), "x") == UNIT
    assert decode(codec, memoryview(coded + b"\xff" * 600), len(UNIT), "x") == UNIT


@pytest.mark.parametrize("codec", Codec)
def test_a_broken_unit(codec: Codec) -> None:
    coded = ENCODERS[codec](UNIT)
    for broken in (coded[: len(coded) // 2], b"\xff" * 100, b"", coded):
        with pytest.raises(CorruptImage, match=r"^disk\.qcow2: cluster at 5: "):
            decode(codec, broken, len(UNIT) + (broken == coded), "disk.qcow2: cluster at 5")


@pytest.mark.parametrize("codec", Codec)
def test_a_bomb_makes_no_more_than_a_unit(codec: Codec) -> None:
    assert decode(codec, ENCODERS[codec](bytes(64 << 20)), 65536, "x") == bytes(65536)
