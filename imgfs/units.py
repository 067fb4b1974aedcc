"""Sizes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from imgfs.errors import UsageError

_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_SIZE = re.compile(
    r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([kmgtp]?)(?:i?b)?", re.ASCII | re.IGNORECASE
)


def parse_size(text: str) -> int:
    """Bytes of `512`, `10G` or `1.5MiB` (all powers of 1024).  Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r}: not a size; write it like 512M or 10G")
    return int(Fraction(match[1]) * _FACTORS[match[2].lower()])


def format_size(size: int) -> str:
    """`1.5 GiB`; exact below 1 KiB."""
    value, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
