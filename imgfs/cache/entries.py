"""What is recorded of one block of a cache: eight bytes, little endian, in the file `checks`.

    0                      nothing: the block's bytes, if there are any, mean nothing
    `zero_entry(block)`    all of the source's block is zero, and nothing is stored
    `entry_of(block, …)`   the checksum of the block as the source has it

Each but 0 depends on the directory's key (of which source in which state it is), on the block's
number and, for a stored block, on its bytes.  So no damage makes a claim: a flipped bit, an entry
or a block in another's place, a part of another source's files, a write that a crash cut short all
leave entries that claim nothing, or that do not agree with the bytes.  Whatever it is, it goes
unseen with a probability of 2^-64 a block (see imgfs/checksums.py).
"""

from __future__ import annotations

import sys
from array import array

from imgfs.checksums import MASK, checksum

SIZE = 8  #: bytes of an entry
NOTHING = 0
_ODD = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: neighbours get unlike seeds
_ZERO = b"zero"


class Codec:
    """The entries of one directory, which is told from others by its key (64 bits)."""

    def __init__(self, key: int) -> None:
        self._key = key

    def zero_entry(self, block: int) -> int:
        return checksum(_ZERO, self._seed(block)) or 1

    def entry_of(self, block: int, data: bytes | bytearray | memoryview) -> int:
        """`data` is all of the block, and not all zero."""
        return checksum(data, self._seed(block)) or 1

    def _seed(self, block: int) -> int:
        return (self._key ^ block * _ODD) & MASK


def decode(data: bytes) -> array[int]:
    found = array("Q", data)
    if sys.byteorder == "big":
        found.byteswap()
    return found


def encode(entries: array[int]) -> bytes:
    if sys.byteorder == "big":
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()
