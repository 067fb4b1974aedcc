"""Blocks of zeroes in what is written."""

from __future__ import annotations

BLOCK = 64 << 10  # aligned ones are not written where nothing is stored

_NOTHING = bytes(BLOCK)


def is_zero(block: memoryview) -> bool:
    """Of at most BLOCK bytes, and one at least."""
    # A copy costs less than to compare the view itself.
    return not block[0] and not block[-1] and bytes(block) == _NOTHING[: len(block)]
