"""Reading the heads of HTTP answers."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.errors import ProtocolViolation
from imgfs.sources.objects.answer import Head, Span, only_part


def head(*lines: str) -> Head:
    found = Head()
    for line in lines:
        found.feed(line.encode("latin-1") + b"\r\n")
    return found


def test_the_last_answer_counts() -> None:
    found = head("HTTP/1.1 302 Found", "ETag: a", "", "HTTP/2 206", "Content-Length: 5", "")
    assert (found.status, found.etag, found.length) == (206, None, 5)


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("bytes 0-0/1", Span(0, 1, 1)),
        ("Bytes 5-9/100", Span(5, 10, 100)),
        ("bytes  5-9/*", Span(5, 10, None)),
    ],
)
def test_content_range(text: str, span: Span) -> None:
    assert head("HTTP/1.1 206 x", f"content-range: {text}").span == span


@pytest.mark.parametrize(
    "text", ["", "bytes 9-5/100", "bytes 5-9/9", "bytes */9", "items 0-0/1", "bytes 0-0", "0-0/1"]
)
def test_content_range_of_no_sense(text: str) -> None:
    with pytest.raises(ProtocolViolation):
        _ = head("HTTP/1.1 206 x", f"Content-Range: {text}").span


def test_dates() -> None:
    when = datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC)
    for text in (
        "Sun, 06 Nov 1994 08:49:37 GMT",
        "Sunday, 06-Nov-94 08:49:37 GMT",
        "Sun Nov  6 08:49:37 1994",
        "Sun, 06 Nov 1994 09:49:37 +0100",
    ):
        assert head(f"Last-Modified: {text}").modified == when
    for text in ("", "yesterday", "0", "-1", "Sun, 99 Nov 1994 08:49:37 GMT"):
        assert head(f"Last-Modified: {text}").modified is None


def test_retry_after() -> None:
    assert head("Retry-After: 120").retry_after_s == 120
    assert head("Retry-After: Sun, 06 Nov 1994 08:49:37 GMT").retry_after_s == 0
    for text in ("", "-1", "soon", "1.5"):
        assert head(f"Retry-After: {text}").retry_after_s is None


def test_codings() -> None:
    for coding, name in (("identity", "a"), ("gzip", "a.img.gz"), ("zstd", "A.ZST"), ("", "a")):
        head(f"Content-Encoding: {coding}").check_coding(name)
    for coding, name in (("gzip", "a.img"), ("gzip", "a.xz"), ("br", "a.gz"), ("gzip, br", "a.gz")):
        with pytest.raises(ProtocolViolation):
            head(f"Content-Encoding: {coding}").check_coding(name)


@given(data=st.binary(max_size=40), preamble=st.sampled_from([b"", b"\r\n", b"text\r\n"]))
def test_parts(data: bytes, preamble: bytes) -> None:
    data = data or b"x"
    line = b"Content-Range: bytes 3-%d/99" % (len(data) + 2)
    body = preamble + b"--b\r\nA: b\r\n" + line + b"\r\n\r\n" + data + b"\r\n--b--\r\n"
    assert only_part(body, "b") == (Span(3, 3 + len(data), 99), data)
    for cut in range(len(body) - len(b"--\r\n")):
        with pytest.raises(ProtocolViolation):
            only_part(body[:cut], "b")


def test_several_parts_are_refused() -> None:
    part = b"--b\r\nContent-Range: bytes 0-0/9\r\n\r\nx\r\n"
    with pytest.raises(ProtocolViolation):
        only_part(part * 2 + b"--b--\r\n", "b")


@given(st.binary(max_size=200))
def test_any_line_is_taken(line: bytes) -> None:
    found = head("HTTP/1.1 206 x")
    found.feed(line)
    assert found.etag is None or isinstance(found.etag, str)
    assert found.modified is None or found.modified.tzinfo is not None
