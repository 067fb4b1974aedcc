"""Requests to web servers, by libcurl: a Client of one file.

A redirect may lead each request to another mirror, and to an address that expires.  So the address
that the first answer came from is kept, and asked directly, for as long as it answers; when it
fails or is silent the first address is followed anew, once, and what it leads to then must be the
same file (`State.differs`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import urlsplit

from imgfs.errors import (
    HostKeyError,
    ImgfsError,
    NotAnImage,
    ProtocolViolation,
    ShortRead,
    SourceTimeout,
    SourceUnreachable,
    UnsupportedFeature,
    UsageError,
)
from imgfs.sources.objects.answer import Span, only_part
from imgfs.sources.objects.client import Got, longest_s
from imgfs.sources.objects.errors import (
    CERTIFICATE,
    NO_RANGES,
    Again,
    Mismatch,
    NoSuchRange,
    by_status,
)
from imgfs.sources.objects.settings import ObjectSettings
from imgfs.sources.objects.state import State
from imgfs.sources.objects.transfer import Answer, Request, Silence, Transfers
from imgfs.url.source import ObjectUrl

_MAX_SIZE = 1 << 62
# libcurl-errors(3); pycurl has no names for some.
_UNSUPPORTED_PROTOCOL, _RESOLVE_PROXY, _RESOLVE, _CONNECT, _WEIRD = 1, 5, 6, 7, 8
_PARTIAL, _TIMED_OUT, _TLS, _REDIRECTS = 18, 28, 35, 47
_CERTIFICATES = (51, 60, 77, 83, 91)


class HttpClient:
    """A Client (client.py) of the file at an http or https URL."""

    def __init__(self, url: ObjectUrl, settings: ObjectSettings, transfers: Transfers) -> None:
        self.name = url.text
        self._transfers = transfers
        self._url = url
        self._settings = settings
        self._first = url.address
        self._kept: str | None = None  #: where the redirects have led
        self._size: int | None = None  #: as told by another request, where ranges do not tell it

    async def get(self, offset: int, length: int, by: float, if_match: State | None) -> Got:
        answer = await self._ask(offset, offset + length - 1, by, if_match)
        span, body = self._part(answer, offset, offset + length)
        total = span.total
        if total is None:
            total = self._size
        if total is None or total > _MAX_SIZE:
            raise ProtocolViolation(f"{self.name}: the server does not tell the file's size")
        if len(body) != span.end - span.start:
            said = f"{len(body)} bytes where it promised {span.end - span.start}"
            raise ShortRead(f"{self.name}: the server sent {said}")
        return body, self._state(answer, total)

    async def probe(self, by: float) -> State:
        try:
            answer = await self._ask(0, 0, by, None)
        except NoSuchRange as exc:
            with contextlib.suppress(ImgfsError, Again):  # of an empty file there is no range
                head = await self.head(by)
                if head.size == 0:
                    return head
            raise UnsupportedFeature(f"{self.name}: {NO_RANGES}") from exc
        if answer.head.is_empty_file:
            return self._state(answer, 0)
        span, body = self._part(answer, 0, 1)
        if len(body) != 1:
            raise ShortRead(f"{self.name}: the server sent no byte where it promised 1")
        if answer.head.is_web_page and body[:1] in (b"<", b"\n", b" "):
            raise NotAnImage(f"{self.name}: {_WEB_PAGE}")
        total = span.total
        if total is None:
            total = self._size = await self._size_otherwise(by)
        if total > _MAX_SIZE:
            raise ProtocolViolation(f"{self.name}: the server's Content-Range makes no sense")
        return self._state(answer, total)

    async def head(self, by: float) -> State:
        answer = await self._ask(None, None, by, None)
        with self._named():
            length = answer.head.length
        if length is None:
            raise ProtocolViolation(f"{self.name}: the server does not tell the file's size")
        return self._state(answer, length)

    async def _size_otherwise(self, by: float) -> int:
        """In bytes, where Content-Range has a * for it: by HEAD, or where the last byte lies."""
        with contextlib.suppress(ImgfsError, Again, Mismatch, NoSuchRange):
            return (await self.head(by)).size
        with contextlib.suppress(ImgfsError, Mismatch, NoSuchRange):
            answer = await self._ask(None, 1, by, None)
            with self._named():
                span, body = self._split(answer)
            if len(body) == 1 and span.end - span.start == 1:
                return span.end
        raise UnsupportedFeature(f"{self.name}: the server does not tell the file's size")

    def _part(self, answer: Answer, start: int, end: int) -> tuple[Span, bytes]:
        """What of the range is there.  Raises ProtocolViolation for another one."""
        if answer.head.status != 206:  # an empty file
            raise NoSuchRange(f"{self.name}: {NO_RANGES}")
        with self._named():
            span, body = self._split(answer)
        if span.start != start or span.end > end:
            said = "the server sent another range than was asked for"
            raise ProtocolViolation(f"{self.name}: {said}")
        return span, body

    def _split(self, answer: Answer) -> tuple[Span, bytes]:
        boundary = answer.head.boundary
        if boundary is None:
            return answer.head.span, answer.body
        return only_part(answer.body, boundary)

    def _state(self, answer: Answer, size: int) -> State:
        where = urlsplit(answer.address)
        return State(
            size,
            answer.head.etag,
            answer.head.modified,
            f"{where.scheme}://{where.netloc}{where.path}",
            is_redirected=_origin(answer.address) != _origin(self._first),
        )

    async def _ask(
        self, first: int | None, last: int | None, by: float, if_match: State | None
    ) -> Answer:
        """The answer, which is 206, or tells of an empty file; 200 of HEAD (without `last`)."""
        loop = asyncio.get_running_loop()
        length = 0 if last is None else last + 1 - (first or 0)
        request = Request(
            self._first,
            first,
            last,
            ca_file=self._settings.ca_file,
            only_https=self._url.scheme == "https" and not self._settings.allow_http,
            silence_s=self._settings.timeout_s,
        )
        kept = self._kept
        if kept is not None:
            # Half of the time: the rest is for where the first address leads to instead.
            half = (by - loop.time()) / 2
            try:
                return await self._transfer(
                    replace(request, address=kept, silence_s=min(request.silence_s, half)),
                    loop.time() + half,
                    length,
                    if_match,
                )
            except (Mismatch, NoSuchRange, ShortRead, ProtocolViolation):
                raise
            except (ImgfsError, Again):
                if self._kept == kept:
                    self._kept = None
        answer = await self._transfer(request, by, length, if_match)
        if answer.address != self._first and not request.is_head:
            self._kept = answer.address
        return answer

    async def _transfer(
        self, request: Request, by: float, length: int, if_match: State | None
    ) -> Answer:
        loop = asyncio.get_running_loop()
        left = max(0.001, by - loop.time())
        headers = []
        # libcurl keeps the login from other hosts that a redirect leads to, as we must.
        is_first = _origin(request.address) == _origin(self._first)
        login = self._settings.authorization
        if login is not None and is_first and self._url.scheme == "https":
            headers.append(f"Authorization: {login}")
        # Mirrors have ETags of their own.
        if if_match is not None and if_match.address == _without_query(request.address):
            headers.append(f"If-Match: {if_match.strong}")
        request = replace(
            request,
            headers=tuple(headers),
            connect_s=left,
            silence_s=min(request.silence_s, left),
            total_s=longest_s(length, self._settings),
        )
        try:
            answer = await self._transfers.run(request)
        except Silence as exc:
            raise Again(SourceTimeout(f"{self.name}: the server does not answer")) from exc
        except UsageError as exc:
            raise UsageError(f"{self.name}: {exc}") from None
        self._check(request, answer)
        return answer

    def _check(self, request: Request, answer: Answer) -> None:
        """Raise what the answer is, unless it has what was asked for."""
        head = answer.head
        if answer.code:
            raise _trouble(self.name, answer)
        if head.status == 206 and not request.is_head:
            if answer.is_too_long:
                raise ProtocolViolation(f"{self.name}: the server sent more than was asked for")
            with self._named():
                head.check_coding(self._url.basename)
            return
        if head.status == 200 and request.is_head:
            with self._named():
                head.check_coding(self._url.basename)
            return
        if head.is_empty_file:
            return
        if head.status == 200:
            if head.is_web_page:
                raise NotAnImage(f"{self.name}: {_WEB_PAGE}")
            raise NoSuchRange(f"{self.name}: {NO_RANGES}")
        raise by_status(
            self.name, head.status, self._looked_for(), pause_s=head.retry_after_s or 0.0
        )

    def _looked_for(self) -> str:
        """For the message when access is denied: which credentials there were, without them."""
        if self._settings.authorization is None:
            said = "an Authorization header can be given in IMGFS_HTTP_AUTHORIZATION"
            return f"{said}, a login in ~/.netrc"
        if self._url.scheme == "http":
            return "IMGFS_HTTP_AUTHORIZATION is sent over https only"
        return "with what IMGFS_HTTP_AUTHORIZATION has"

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except ProtocolViolation as exc:
            raise ProtocolViolation(f"{self.name}: {exc}") from None


_WEB_PAGE = "the server sends a web page there, not an image (a list of files, or a login?)"


def _origin(address: str) -> tuple[str, str]:
    where = urlsplit(address)
    return where.scheme, where.netloc.rpartition("@")[2]


def _without_query(address: str) -> str:
    where = urlsplit(address)
    return f"{where.scheme}://{where.netloc}{where.path}"


def _trouble(name: str, answer: Answer) -> Exception:
    """What libcurl's error is.  Of its text only what has no address in it is shown."""
    code, why = answer.code, answer.why
    answered = answer.head.status != 0
    if code in (_RESOLVE, _RESOLVE_PROXY):
        return Again(SourceUnreachable(f"{name}: no connection (the host's name is unknown)"))
    if code in (_CONNECT, _TIMED_OUT) and not answered:
        if code == _TIMED_OUT:
            return Again(SourceTimeout(f"{name}: the server does not answer"))
        system = os.strerror(answer.system_errno) if answer.system_errno else ""
        said = f"no connection ({system})" if system else "no connection"
        return Again(SourceUnreachable(f"{name}: {said}"))
    if code in _CERTIFICATES:
        return HostKeyError(f"{name}: {CERTIFICATE.format(_tls_reason(why))}")
    if code == _REDIRECTS:
        return ProtocolViolation(f"{name}: redirects in circles")
    if code == _UNSUPPORTED_PROTOCOL and "HTTP/0.9" not in why:
        return ProtocolViolation(f"{name}: leads to what is not http, or from https to http")
    if code in (_UNSUPPORTED_PROTOCOL, _WEIRD):
        return ProtocolViolation(f"{name}: the server does not speak HTTP there")
    if code == _TLS and not any(word in why.lower() for word in ("reset", "syscall", "closed")):
        return ProtocolViolation(f"{name}: the server does not speak TLS there")
    return Again(SourceUnreachable(f"{name}: the connection was lost"), answered=True)


def _tls_reason(why: str) -> str:
    """libcurl's reason, which may name the host."""
    text = why.rpartition("problem: ")[2]
    return "".join(c for c in text if c.isprintable())[:160] or "no reason given"
