"""Web servers that do it in other ways than nginx, and are right; and changes that they tell of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import trio

from imgfs.errors import AccessDenied, NotAnImage, SourceChanged
from imgfs.sources.objects.source import ObjectSource
from tests.servers.ports import free_port
from tests.servers.web import Liar, Nginx, make_certificate, serving

from .conftest import MIB
from .web import use

DATA = Liar.data


async def right(source: ObjectSource) -> None:
    """Opens and gives the right bytes."""
    assert source.size == len(DATA)
    assert await source.read(0, len(DATA)) == DATA
    assert await source.read(MIB + 3, 1000) == DATA[MIB + 3 : MIB + 1003]
    await source.check_identity()


def test_honest() -> None:
    with serving(Liar) as (url, server):
        use(url, right)
        ranges = [
            {name.lower(): value for name, value in headers.items()}
            for method, _, headers in server.seen
            if method == "GET"
        ]
        assert all(headers["accept-encoding"] == "identity" for headers in ranges)
        assert [headers.get("if-match") for headers in ranges] == [None, *['"one"'] * 3]


class Slow(Liar):
    """Counts the requests that are under way."""

    lock = threading.Lock()
    now = most = 0

    def part(self, start: int, end: int) -> None:
        cls = type(self)
        with self.lock:
            cls.now += 1
            cls.most = max(cls.most, cls.now)
        time.sleep(0.02)
        with self.lock:
            cls.now -= 1
        super().part(start, end)


def test_at_most_so_many_requests() -> None:
    with serving(Slow) as (url, cls):

        async def check(source: ObjectSource) -> None:
            async with trio.open_nursery() as nursery:
                for n in range(40):
                    nursery.start_soon(source.read, n * 1000, 3 * MIB)

        use(url, check, depth=5)
        assert cls.most == 5  # type: ignore[attr-defined]


class NoHead(Liar):
    def do_HEAD(self) -> None:
        self.note()
        self.refuse(405)


class BareHead(Liar):
    def do_HEAD(self) -> None:
        self.note()
        self.send_response(200)
        self.end_headers()
        self.close_connection = True


class OtherHead(Liar):
    """As behind a cache that compresses what HEAD is asked of."""

    def do_HEAD(self) -> None:
        self.note()
        self.send_response(200)
        self.send_header("ETag", '"other"')
        self.send_header("Content-Length", "17")
        self.end_headers()


class DeniesItsETag(Liar):
    def do_GET(self) -> None:
        if "If-Match" in self.headers:
            self.note()
            self.refuse(412)
        else:
            super().do_GET()


class WeakETag(Liar):
    etag = 'W/"one"'


class OnlyDate(Liar):
    etag = None


class NoIdentity(Liar):
    etag = None
    modified = None


class UnknownSize(Liar):
    """RFC 9110, 14.4: the size may be a *."""

    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "Content-Range":
            value = value.partition("/")[0] + "/*"
        super().send_header(keyword, value)


class UnknownSizeNoHead(NoHead, UnknownSize):
    """Where the last byte lies tells the size."""

    def do_GET(self) -> None:
        if self.headers["Range"] == "bytes=-1":
            self.note()
            self.part(len(self.data) - 1, len(self.data))
        else:
            super().do_GET()


class Chunked(Liar):
    def part(self, start: int, end: int) -> None:
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(self.data)}")
        self.send_header("ETag", str(self.etag))
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for at in range(start, end, 100_000):
            chunk = self.data[at : min(end, at + 100_000)]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        self.wfile.write(b"0\r\n\r\n")


class Fewer(Liar):
    """RFC 9110, 15.3.7: a server may send only a part of the range; it says so."""

    def part(self, start: int, end: int) -> None:
        super().part(start, min(end, start + 300_000))


class Parts(Liar):
    """RFC 9110, 14.6: one range may come in parts, too."""

    def part(self, start: int, end: int) -> None:
        head = f"Content-Type: x/y\r\nContent-Range: bytes {start}-{end - 1}/{len(self.data)}"
        body = f"preamble\r\n--SEP\r\n{head}\r\n\r\n".encode() + self.data[start:end]
        body += b"\r\n--SEP--\r\n"
        self.send_response(206)
        self.send_header("Content-Type", 'multipart/byteranges; boundary="SEP"')
        self.describe(len(body))
        self.end_headers()
        self.wfile.write(body)


class NoDate(Liar):
    modified = "yesterday"


class NoDateAtAll(NoDate):
    etag = None


class OldDate(OnlyDate):
    modified = "Sunday, 06-Nov-94 08:49:37 GMT"  # RFC 850


class Binary(Liar):
    etag = '"\xff\xfe"'


class HeadOfNoSize(Liar):
    def do_HEAD(self) -> None:
        self.note()
        self.send_response(200)
        self.send_header("ETag", str(self.etag))
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()


@pytest.mark.parametrize(
    ("server", "kind"),
    [
        (UnknownSize, "etag"),
        (UnknownSizeNoHead, "etag"),
        (Chunked, "etag"),
        (Fewer, "etag"),
        (Parts, "etag"),
        (NoDate, "etag"),
        (NoDateAtAll, None),
        (OldDate, "modified"),
        (Binary, "etag"),
        (HeadOfNoSize, "etag"),
        (NoHead, "etag"),
        (BareHead, "etag"),
        (OtherHead, "etag"),
        (DeniesItsETag, "etag"),
        (WeakETag, "weak-etag"),
        (OnlyDate, "modified"),
        (NoIdentity, None),
    ],
)
def test_odd_but_right(server: type[Liar], kind: str | None) -> None:
    async def check(source: ObjectSource) -> None:
        identity = source.stat.identity
        assert (identity.kind if identity else None) == kind
        await right(source)

    with serving(server) as (url, _):
        use(url, check)


@pytest.mark.parametrize("server", [Liar, NoHead, DeniesItsETag, WeakETag, OnlyDate])
def test_change_is_noticed(server: type[Liar]) -> None:
    with serving(server) as (url, cls):

        async def check(source: ObjectSource) -> None:
            assert await source.read(0, 10) == DATA[:10]
            if cls.etag is None:
                cls.modified = "Mon, 07 Nov 1994 08:49:37 GMT"
            else:
                cls.etag = cls.etag.replace("one", "two")
            with pytest.raises(SourceChanged):
                await source.check_identity()
            with pytest.raises(SourceChanged):
                await source.read(0, 10)

        use(url, check)


def test_weak_etag_and_another_date_is_a_change() -> None:
    with serving(WeakETag) as (url, cls):

        async def check(source: ObjectSource) -> None:
            cls.modified = "Mon, 07 Nov 1994 08:49:37 GMT"
            with pytest.raises(SourceChanged):
                await source.read(0, 10)

        use(url, check)


def test_other_size_is_a_change_even_without_identity() -> None:
    with serving(NoIdentity) as (url, cls):

        async def check(source: ObjectSource) -> None:
            cls.data = DATA + b"more"
            with pytest.raises(SourceChanged):
                await source.read(0, 10)

        use(url, check)


def test_identity_of_another_query_is_another() -> None:
    with serving(Liar) as (url, _):

        async def identity(source: ObjectSource) -> object:
            return source.stat.identity

        found = [use(url + query, identity) for query in ("", "?", "?a=1", "?a=2", "?a=1")]
        assert len(set(found)) == 4
        assert found[2] == found[4]


class Empty(Liar):
    """Of no byte there is no range."""

    data = b""


class EmptyBy416(Empty):
    def do_GET(self) -> None:
        self.note()
        self.send_response(416)
        self.send_header("Content-Range", "bytes */0")
        self.describe(0)
        self.end_headers()


@pytest.mark.parametrize("server", [Empty, EmptyBy416])
def test_empty_file(server: type[Liar]) -> None:
    async def check(source: ObjectSource) -> None:
        assert source.size == 0
        await source.check_identity()

    with serving(server) as (url, _):
        use(url, check)


class Gzip(Liar):
    """How servers label what is stored compressed, though nobody asked for a coding."""

    def describe(self, length: int) -> None:
        self.send_header("Content-Encoding", "x-gzip")
        super().describe(length)


def test_stored_compressed_is_read_as_stored() -> None:
    with serving(Gzip) as (url, _):
        use(url + ".gz", right)


class Busy(Liar):
    """Wants to be left alone, and says for how long."""

    asked: ClassVar[list[float]] = []
    status, until = 503, "1"

    def do_GET(self) -> None:
        self.asked.append(time.monotonic())
        if len(self.asked) == 2:
            self.send_response(self.status)
            self.send_header("Retry-After", self.until)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            super().do_GET()


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_kept_to(status: int) -> None:
    with serving(Busy) as (url, cls):
        cls.asked, cls.status = [], status  # type: ignore[attr-defined]

        async def check(source: ObjectSource) -> None:
            assert await source.read(7, 5) == DATA[7:12]

        use(url, check)
        first, again = cls.asked[1:3]  # type: ignore[attr-defined]
        assert again - first >= 0.95


class Page(Liar):
    """A list of files, or a login, instead of an image."""

    data = b"<!doctype html><title>Index of /</title>"

    def describe(self, length: int) -> None:
        self.send_header("Content-Type", "text/html; charset=utf-8")
        super().describe(length)


class WholePage(Page):
    def part(self, start: int, end: int) -> None:
        self.whole()


@pytest.mark.parametrize("server", [Page, WholePage])
def test_web_page_is_no_image(server: type[Liar]) -> None:
    async def check(source: ObjectSource) -> None:
        raise AssertionError

    with serving(server) as (url, _), pytest.raises(NotAnImage, match="web page"):
        use(url, check)


def test_http_2(image: Path, make_nginx: Callable[..., Nginx], tmp_path: Path) -> None:
    ca, certificate = make_certificate(tmp_path)
    port = free_port()
    more = f"listen 127.0.0.1:{port} ssl http2;"
    server = make_nginx(more=more, certificate=certificate)
    data = image.read_bytes()
    (tmp_path / "www/two.img").write_bytes(data)

    async def check(source: ObjectSource) -> None:
        assert await source.read(0, len(data)) == data
        await source.check_identity()

    use(f"https://127.0.0.1:{port}/two.img", check, ca_file=str(ca))
    assert any("HTTP/2.0" in line for line in server.requests())


def test_login_from_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Login(Liar):
        def do_GET(self) -> None:
            if self.headers["Authorization"] == "Basic bWU6d29yZA==":
                super().do_GET()
            else:
                self.refuse(401)

    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password word\n")
    with serving(Login) as (url, _):
        with pytest.raises(AccessDenied, match="netrc"):
            use(url, right)
        monkeypatch.setenv("HOME", str(tmp_path))
        use(url, right)
