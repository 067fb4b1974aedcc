"""Web servers that do it in other ways than nginx, and are right; and changes that they tell of."""

from __future__ import annotations

import threading
import time

import pytest
import trio

from imgfs.errors import SourceChanged
from imgfs.sources.objects.source import ObjectSource
from tests.servers.web import Liar, serving

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
        ranges = [headers for method, _, headers in server.seen if method == "GET"]
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


@pytest.mark.parametrize(
    ("server", "kind"),
    [
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
