"""What the parsers of all URLs share."""

from __future__ import annotations

import os
import re
from urllib.parse import quote_from_bytes

from imgfs.errors import UsageError

#: What a URL shows as it is: everything printable in ASCII but %, which would be decoded again.
_PLAIN = "".join(chr(c) for c in range(0x21, 0x7F) if chr(c) != "%")


def port_number(text: str, port: str | None, most: int = 65535) -> int | None:
    """The port of the URL `text`; None when there is none.  Raises UsageError."""
    if not port:
        return None
    if not (port.isascii() and port.isdigit() and 0 < int(port[:10]) <= most):
        raise UsageError(f"{one_line(text)}: not a port number")
    return int(port[:10])


def shown(path: bytes, plain: str = _PLAIN) -> str:
    """Percent-encoded where it must be; letters of all alphabets stay readable."""
    pieces = (
        c if c.isprintable() and c.isalnum() else quote_from_bytes(os.fsencode(c), safe=plain)
        for c in os.fsdecode(path)
    )
    return "".join(pieces)


def one_line(text: str) -> str:
    """On one printable line, and without what stands before the @ of a URL's authority."""
    text = re.sub(r"(://)[^/@]*:[^/@]*@", r"\1…@", text)
    return "".join(c if c.isprintable() else "?" for c in text)
