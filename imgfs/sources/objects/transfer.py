"""Single HTTP requests by libcurl on an asyncio loop.

libcurl does what the Web is: HTTP/1.1 and 2, TLS, redirects, proxies, .netrc.  It tells which
descriptors it waits for and until when (curl_multi_socket_action(3)); the loop waits for them.
All of this runs on the loop's thread, and libcurl's callbacks run inside its calls.

The body of an answer is bounded by what was asked for: more is not read.  Silence and the total
time of a transfer are bounded here, since libcurl counts in whole seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pycurl

from imgfs import __version__
from imgfs.daemon.nameless import nameless
from imgfs.errors import UsageError
from imgfs.sources.objects.answer import MAX_PART_HEADERS, Head

IDLE_S = 30.0  # after which connections that nobody uses are closed
MAX_IDLE = 64  # connections
MAX_REDIRECTS = 10
MAX_REFUSAL = 64 << 10  # bytes of an answer that is not what was asked for
BUFFER = 512 << 10


@dataclass(frozen=True, slots=True)
class Request:
    """`first` and `last` are bytes of the file, both included; without them it is HEAD."""

    address: str
    first: int | None = None
    last: int | None = None
    headers: tuple[str, ...] = ()
    ca_file: str | None = None  #: PEM; trusted besides the system's
    only_https: bool = False
    connect_s: float = 30.0
    silence_s: float = 30.0  #: of the server, at most
    total_s: float = 300.0

    @property
    def is_head(self) -> bool:
        return self.last is None

    @property
    def range(self) -> str:
        """As RFC 9110, 14.1.1 writes it; without a first byte the last ones are counted."""
        return f"{'' if self.first is None else self.first}-{self.last}"

    @property
    def max_body(self) -> int:
        assert self.last is not None
        return self.last if self.first is None else self.last + 1 - self.first


@dataclass(slots=True)
class Answer:
    """`code` and `why` are libcurl's, 0 where it had no trouble; `address` is after redirects."""

    head: Head
    body: bytes
    address: str
    code: int = 0
    why: str = ""
    system_errno: int = 0
    is_too_long: bool = False  #: the body went on where it should have ended


class Silence(Exception):
    """The server said nothing for too long, or did not come to an end in time."""


@dataclass(slots=True)
class _Transfer:
    handle: Any
    request: Request
    ended: asyncio.Future[None]
    heard: float
    head: Head = field(default_factory=Head)
    chunks: list[bytes] = field(default_factory=list)
    got: int = 0
    room: int | None = None  # bytes of the body that may still come; None: no head yet
    is_too_long: bool = False
    code: int = 0
    why: str = ""
    clock: Callable[[], float] = lambda: 0.0

    def on_header(self, line: bytes) -> None:
        self.heard = self.clock()
        self.head.feed(line)

    def on_body(self, chunk: bytes) -> int | None:
        """libcurl goes on at None, and ends the transfer at any other number."""
        self.heard = self.clock()
        if self.room is None:
            self.room = self._room()
        if len(chunk) > self.room:
            self.is_too_long = True
            return -1
        self.room -= len(chunk)
        if self.head.status == 206:
            self.chunks.append(chunk)
        return None

    def _room(self) -> int:
        if self.head.status != 206:
            # Of a file that is sent whole where a part was asked for nothing is of use.
            return 0 if self.head.status == 200 else MAX_REFUSAL
        in_parts = "multipart" in self.head.headers.get("content-type", "").lower()
        return self.request.max_body + (MAX_PART_HEADERS if in_parts else 0)


class Transfers:
    """All transfers of one loop, which share its connections."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._multi: Any = None
        self._running: dict[Any, _Transfer] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._spare: list[Any] = []
        self._waits: dict[int, int] = {}  # what is waited for, by descriptor

    async def run(self, request: Request) -> Answer:
        """The answer, whatever it is.  Raises Silence, UsageError."""
        loop = self._loop
        handle = self._spare.pop() if self._spare else pycurl.Curl()
        transfer = _Transfer(handle, request, loop.create_future(), loop.time(), clock=loop.time)
        try:
            self._set_up(transfer)
            if self._idle is not None:
                self._idle.cancel()
                self._idle = None
            self._running[handle] = transfer
            self._opened().add_handle(handle)
            await self._wait(transfer)
            return self._answer(transfer)
        finally:
            if self._running.pop(handle, None) is not None:
                with contextlib.suppress(pycurl.error):
                    self._multi.remove_handle(handle)
            handle.reset()
            self._spare.append(handle)
            if not self._running and self._idle is None:
                self._idle = loop.call_later(IDLE_S, self._let_go)

    async def _wait(self, transfer: _Transfer) -> None:
        """Until it has ended.  Raises Silence."""
        loop, request = self._loop, transfer.request
        end = loop.time() + request.total_s
        while not transfer.ended.done():
            now = loop.time()
            until = min(end, transfer.heard + request.silence_s)
            if now >= until:
                raise Silence
            await asyncio.wait([transfer.ended], timeout=until - now)
        transfer.ended.result()

    def _set_up(self, transfer: _Transfer) -> None:
        handle, request = transfer.handle, transfer.request
        http = pycurl.PROTO_HTTPS if request.only_https else pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS
        options = [
            (pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS),
            (pycurl.REDIR_PROTOCOLS, http),
            (pycurl.FOLLOWLOCATION, 1),
            (pycurl.MAXREDIRS, MAX_REDIRECTS),
            (pycurl.PATH_AS_IS, 1),
            (pycurl.NOSIGNAL, 1),
            (pycurl.NETRC, pycurl.NETRC_OPTIONAL),
            (pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_2TLS),
            (pycurl.CONNECTTIMEOUT_MS, max(1, int(request.connect_s * 1000))),
            (pycurl.USERAGENT, f"imgfs/{__version__}"),
            (pycurl.HTTPHEADER, ["Accept-Encoding: identity", *request.headers]),
            (pycurl.BUFFERSIZE, BUFFER),
            (pycurl.HEADERFUNCTION, transfer.on_header),
            (pycurl.WRITEFUNCTION, transfer.on_body),
            *trust(request.ca_file),
        ]
        if request.is_head:
            options.append((pycurl.NOBODY, 1))
        else:
            options.append((pycurl.RANGE, request.range))
        try:
            handle.setopt(pycurl.URL, request.address.encode())
            for option, value in options:
                handle.setopt(option, value)
        except (pycurl.error, UnicodeEncodeError) as exc:
            raise UsageError("not a URL that can be used") from exc

    def _answer(self, transfer: _Transfer) -> Answer:
        handle = transfer.handle
        return Answer(
            transfer.head,
            b"".join(transfer.chunks),
            handle.getinfo(pycurl.EFFECTIVE_URL),
            0 if transfer.is_too_long else transfer.code,
            transfer.why,
            int(handle.getinfo(pycurl.OS_ERRNO)),
            transfer.is_too_long,
        )

    def _opened(self) -> Any:
        if self._multi is None:
            self._multi = pycurl.CurlMulti()
            self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._on_socket)
            self._multi.setopt(pycurl.M_TIMERFUNCTION, self._on_timer)
            self._multi.setopt(pycurl.M_MAXCONNECTS, MAX_IDLE)
        return self._multi

    def _let_go(self) -> None:
        """Close the connections: nobody has used them for a while."""
        self._idle = None
        if not self._running:
            self.close()

    def close(self) -> None:
        """Close all connections; a later request opens new ones."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._multi is None:
            return
        for handle in list(self._running):
            with contextlib.suppress(pycurl.error):
                self._multi.remove_handle(handle)
        self._running.clear()
        self._spare.clear()
        self._multi.close()
        self._multi = None
        self._on_timer(-1)
        for fd in list(self._waits):
            self._wait_for(fd, 0)

    def _on_socket(self, what: int, fd: int, multi: object, data: object) -> None:
        self._wait_for(fd, 0 if what == pycurl.POLL_REMOVE else what)

    def _wait_for(self, fd: int, what: int) -> None:
        before = self._waits.pop(fd, 0)
        if what & pycurl.POLL_IN:
            self._loop.add_reader(fd, self._act, fd, pycurl.CSELECT_IN)
        elif before & pycurl.POLL_IN:
            self._loop.remove_reader(fd)
        if what & pycurl.POLL_OUT:
            self._loop.add_writer(fd, self._act, fd, pycurl.CSELECT_OUT)
        elif before & pycurl.POLL_OUT:
            self._loop.remove_writer(fd)
        if what:
            self._waits[fd] = what

    def _on_timer(self, delay_ms: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if delay_ms >= 0:
            # Never at once: libcurl must not be called from inside of its own callback.
            self._timer = self._loop.call_later(
                delay_ms / 1000, self._act, pycurl.SOCKET_TIMEOUT, 0
            )

    def _act(self, fd: int, what: int) -> None:
        if self._multi is None:
            return
        self._multi.socket_action(fd, what)
        left = 1
        while left:
            left, succeeded, failed = self._multi.info_read()
            for handle in succeeded:
                self._end(handle, 0, "")
            for handle, code, why in failed:
                self._end(handle, code, why)

    def _end(self, handle: Any, code: int, why: str) -> None:
        transfer = self._running.get(handle)
        if transfer is not None and not transfer.ended.done():
            transfer.code, transfer.why = code, why
            transfer.ended.set_result(None)


def trust(ca_file: str | None) -> list[tuple[int, str]]:
    """Options that say which certificates are trusted: the system's, and those in `ca_file`.

    Where the system's are says OpenSSL's own environment, SSL_CERT_FILE and SSL_CERT_DIR.  A
    libcurl that was built elsewhere looks in places that are not here.  Raises UsageError.
    """
    paths = ssl.get_default_verify_paths()
    known = paths.cafile or next((path for path in _BUNDLES if Path(path).is_file()), None)
    options = [(pycurl.CAPATH, paths.capath)] if paths.capath else []
    if ca_file is not None:
        known = _joined(ca_file, known)
    return [*options, (pycurl.CAINFO, known)] if known else options


_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora
    "/etc/ssl/ca-bundle.pem",  # openSUSE
    "/etc/ssl/cert.pem",  # Alpine
)


@cache
def _joined(ca_file: str, known: str | None) -> str:
    """The path of both files' certificates in one, in memory, for as long as the process lives."""
    content = b""
    for path in filter(None, (ca_file, known)):
        try:
            content += Path(path).read_bytes() + b"\n"
        except OSError as exc:
            raise UsageError(f"{path}: {exc.strerror}") from None
    fd = nameless("imgfs-certificates")
    os.write(fd, content)
    return f"/proc/self/fd/{fd}"
