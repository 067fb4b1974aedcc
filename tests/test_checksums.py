"""Lines and documents with a checksum: damage is seen, and so is what is another's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.checksums import (
    decode_document,
    decode_line,
    encode_document,
    encode_line,
    seed_of,
)
from imgfs.errors import CorruptSnapshot, OtherVersion

from .damage import all_of

SEED, OTHER = seed_of("kind", "owner"), seed_of("kind", "other")


@given(st.binary(max_size=60).map(lambda text: text.replace(b"\n", b"")), st.integers(0, 1 << 63))
def test_a_line(text: bytes, seed: int) -> None:
    line = encode_line(text, seed)
    assert decode_line(line, seed) == text
    assert decode_line(line, seed + 1) is None
    for damaged in all_of(line, encode_line(text, seed + 1)):
        assert damaged == line or decode_line(damaged, seed) is None


def test_a_document() -> None:
    content = {"name": "ü\udc80", "layers": ["1", "2"], "size": 7}
    good = encode_document(2, content, SEED)
    assert decode_document(good, 2, SEED, "file") == content
    for damaged in all_of(good, encode_document(2, {**content, "size": 8}, OTHER)):
        try:
            assert decode_document(damaged, 2, SEED, "file") == content
        except CorruptSnapshot as exc:
            assert str(exc) == "file: is damaged: its checksum is wrong"


@pytest.mark.parametrize("version", [1, 3, "x", None])
def test_another_version(version: object) -> None:
    good = encode_document(version, {}, SEED)  # type: ignore[arg-type]
    with pytest.raises(OtherVersion, match=rf"^file: version {version} is of another imgfs, "):
        decode_document(good, 2, SEED, "file")


def test_version_1_had_a_crc() -> None:
    text = b'{"version": 1, "url": "x"}'
    with pytest.raises(OtherVersion, match="version 1 is of another imgfs"):
        decode_document(b"d7b213c2\n" + text + b"\n", 1, SEED, "file")


def test_an_owner_is_part_of_the_seed() -> None:
    assert len({seed_of(kind, owner) for kind in "abc" for owner in ("", "a", "b", "\udc80")}) == 12
