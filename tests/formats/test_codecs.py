"""Units decompressed by codec: whole, with something behind them, broken, and bombs."""

from __future__ import annotations

import struct
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


def grain(data: bytes) -> bytes:
    coded = zlib.compress(data)
    return struct.pack("<QI", 0, len(coded)) + coded


ENCODERS = {
    Codec.DEFLATE: raw_deflate,
    Codec.ZLIB: zlib.compress,
    Codec.GRAIN: grain,
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


def test_a_grain_of_another_sector() -> None:
    coded = ENCODERS[Codec.GRAIN](UNIT)
    with pytest.raises(CorruptImage, match="x: its marker says that it is of sector 0, not 128"):
        decode(Codec.GRAIN, coded, len(UNIT), "x", sector=128)
    with pytest.raises(CorruptImage, match="of 20 that there are"):
        decode(Codec.GRAIN, coded[:32], len(UNIT), "x")
    with pytest.raises(CorruptImage, match="a grain marker of 11 bytes"):
        decode(Codec.GRAIN, coded[:11], len(UNIT), "x")
