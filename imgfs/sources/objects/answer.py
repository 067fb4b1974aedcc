"""Reading the head of an HTTP answer to a request for one range: RFC 9110, sections 8, 14 and 15.

Sans-IO: lines and bytes in, values out.  What a server may do in several ways is understood; what
contradicts itself, or the request, is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from imgfs.errors import ProtocolViolation

_CONTENT_RANGE = re.compile(r"bytes\s+(\d{1,19})-(\d{1,19})\s*/\s*(\d{1,19}|\*)", re.IGNORECASE)
_UNSATISFIED = re.compile(r"bytes\s+\*/(\d{1,19})", re.IGNORECASE)
_BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
#: Codings in which a file may be stored under a name that says so: then the bytes are the file's.
_STORED = {"gzip": (".gz", ".tgz"), "x-gzip": (".gz", ".tgz"), "br": (".br",), "zstd": (".zst",)}
_NO_CODING = ("", "identity", "aws-chunked")  # the last: S3 keeps it from uploads by mistake
MAX_PART_HEADERS = 16 << 10


@dataclass(slots=True)
class Head:
    """Status and headers of the last answer; those of redirects before it are dropped."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    def feed(self, line: bytes) -> None:
        """Take a line of any answer's head."""
        text = line.decode("latin-1").strip("\r\n")
        if text.startswith("HTTP/"):
            words = text.split(None, 2)
            self.status = int(words[1]) if len(words) > 1 and words[1].isdecimal() else 0
            self.headers = {}
            return
        name, colon, value = text.partition(":")
        if colon:
            self.headers[name.strip().lower()] = value.strip()

    @property
    def is_redirect(self) -> bool:
        return 300 <= self.status < 400 and "location" in self.headers

    @property
    def etag(self) -> str | None:
        return self.headers.get("etag") or None

    @property
    def modified(self) -> datetime | None:
        """None where there is no date, or what is there is none."""
        try:
            found = parsedate_to_datetime(self.headers["last-modified"])
        except (KeyError, ValueError, TypeError, IndexError):
            return None
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)

    @property
    def length(self) -> int | None:
        """Content-Length in bytes.  Raises ProtocolViolation when it is no number."""
        text = self.headers.get("content-length")
        if text is None:
            return None
        if not text.isascii() or not text.isdecimal() or len(text) > 19:
            raise ProtocolViolation("the server's Content-Length is no number")
        return int(text)

    @property
    def retry_after_s(self) -> float | None:
        """How long the server wants to be left alone, as Retry-After says."""
        text = self.headers.get("retry-after", "")
        if text.isascii() and text.isdecimal():
            return float(min(int(text), 1 << 20))
        try:
            when = parsedate_to_datetime(text)
        except (ValueError, TypeError, IndexError):
            return None
        when = when.replace(tzinfo=UTC) if when.tzinfo is None else when
        return max(0.0, (when - datetime.now(UTC)).total_seconds())

    @property
    def is_web_page(self) -> bool:
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        return kind in ("text/html", "application/xhtml+xml")

    @property
    def boundary(self) -> str | None:
        """What separates the parts of a multipart answer; None where it has no parts."""
        kind = self.headers.get("content-type", "")
        if not kind.lower().startswith("multipart/byteranges"):
            return None
        found = _BOUNDARY.search(kind)
        if found is None:
            raise ProtocolViolation("the server sent parts without saying what separates them")
        return found[1] or found[2]

    def check_coding(self, name: str) -> None:
        """Raise ProtocolViolation unless the bytes are those of the file of this name."""
        coding = self.headers.get("content-encoding", "").strip().lower()
        if coding in _NO_CODING or name.lower().endswith(_STORED.get(coding, ())):
            return
        raise ProtocolViolation(f"the server sends it coded as {coding[:20]!r}")

    @property
    def span(self) -> Span:
        """Of a 206 that is not in parts.  Raises ProtocolViolation."""
        return _span(self.headers.get("content-range"))

    @property
    def is_empty_file(self) -> bool:
        """Does it say that there is no range to be had because there are no bytes?"""
        if self.status == 416:
            found = _UNSATISFIED.fullmatch(self.headers.get("content-range", "").strip())
            return found is not None and int(found[1]) == 0
        return self.status == 200 and self.length == 0


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, end) of a file of `total`; None where the server does not tell that."""

    start: int
    end: int
    total: int | None


def _span(text: str | None) -> Span:
    if text is None:
        raise ProtocolViolation("the server sent a range without saying which")
    found = _CONTENT_RANGE.fullmatch(text.strip())
    if found is None:
        raise ProtocolViolation("the server's Content-Range makes no sense")
    start, end = int(found[1]), int(found[2]) + 1
    total = None if found[3] == "*" else int(found[3])
    if end <= start or (total is not None and end > total):
        raise ProtocolViolation("the server's Content-Range makes no sense")
    return Span(start, end, total)


def only_part(body: bytes, boundary: str) -> tuple[Span, bytes]:
    """The span and the bytes of the one part of a multipart/byteranges body (RFC 9110, 14.6).

    Raises ProtocolViolation when there are several, or it is cut off.
    """
    mark = b"--" + boundary.encode("latin-1")
    start = 0 if body.startswith(mark) else body.find(b"\r\n" + mark) + 2
    head_at = body.find(b"\r\n", start) + 2
    head_end = body.find(b"\r\n\r\n", head_at - 2)
    if start == 1 or head_at == 1 or head_end < 0 or head_end > start + MAX_PART_HEADERS:
        raise ProtocolViolation("the server's parts make no sense")
    head = Head()
    for line in body[head_at:head_end].split(b"\r\n"):
        head.feed(line)
    span = head.span
    first = head_end + 4
    last = first + span.end - span.start
    if not body[last:].startswith(b"\r\n" + mark + b"--"):
        raise ProtocolViolation("the server's parts make no sense")
    return span, body[first:last]
