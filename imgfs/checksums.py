"""Checksums of what imgfs keeps: 64 bits that depend on the bytes and on where they belong.

A checksum is XXH3 with a seed.  Damage of any kind goes unseen with a probability of 2^-64; unlike
a CRC it promises nothing more for short bursts, and needs not to.  The seed says whose bytes they
are (a directory, a file's kind, a place in it): so bytes that are good, but stand in another's
place, are damage like any other.  It is no protection from someone who means harm: the directories
are private.

    line      CHECKSUM text
    document  CHECKSUM, and JSON behind it on lines of its own; one of its fields is "version"
"""

from __future__ import annotations

import json
import zlib
from typing import Any

from xxhash import xxh3_64_intdigest

from imgfs.errors import CorruptSnapshot, OtherVersion

MASK = (1 << 64) - 1
_DIGITS = 16


def checksum(data: bytes | bytearray | memoryview, seed: int) -> int:
    found: int = xxh3_64_intdigest(data, seed)
    return found


def seed_of(kind: str, owner: str) -> int:
    """Of files of a kind that belong to one owner: a source, a directory, a destination."""
    return checksum(f"{kind}\0{owner}".encode("utf-8", "surrogateescape"), 0)


def encode_line(text: bytes, seed: int) -> bytes:
    """Without its end."""
    return b"%0*x %s" % (_DIGITS, checksum(text, seed), text)


def decode_line(line: bytes, seed: int) -> bytes | None:
    """The text; None when it is damaged, or another's."""
    text = line[_DIGITS + 1 :]
    return text if line == encode_line(text, seed) else None


def encode_document(version: int, content: dict[str, Any], seed: int) -> bytes:
    text = json.dumps({"version": version, **content}, indent=1).encode()
    return b"%0*x\n%s\n" % (_DIGITS, checksum(text, seed), text)


def decode_document(data: bytes, version: int, seed: int, where: str) -> dict[str, Any]:
    """Its content without the version.  Raises CorruptSnapshot and OtherVersion, which begin with
    `where`."""
    first, _, text = data.partition(b"\n")
    text = text.removesuffix(b"\n")
    if first not in (b"%0*x" % (_DIGITS, checksum(text, seed)), b"%08x" % zlib.crc32(text)):
        raise CorruptSnapshot(f"{where}: is damaged: its checksum is wrong")
    content: dict[str, Any] = json.loads(text)
    found = content.pop("version", None)
    # Version 1 had a CRC-32.
    if found != version or len(first) != _DIGITS:
        raise OtherVersion(other_version(where, found, version))
    return content


def other_version(where: str, found: object, version: int) -> str:
    known = f"and this one knows version {version}"
    return f"{where}: version {found} is of another imgfs, {known}; use that imgfs"
