"""Redirects that lead to another mirror each time, to addresses that expire, or to another file."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest

from imgfs.errors import NotAnImage, SourceChanged, SourceTimeout
from imgfs.sources.objects.source import ObjectSource
from tests.servers.web import Liar, serving

from .conftest import MIB
from .web import use

DATA = Liar.data


class Mirror(Liar):
    """Has an ETag of its own."""

    alive = True
    delay_s = 0.0

    def do_GET(self) -> None:
        if not self.alive:
            self.note()
            self.refuse(403)
        else:
            time.sleep(self.delay_s)
            super().do_GET()

    def do_HEAD(self) -> None:
        if not self.alive:
            self.note()
            self.refuse(403)
        else:
            super().do_HEAD()


class Redirector(Liar):
    """Sends each request to the next of its addresses."""

    turn: ClassVar[Iterator[str]] = iter(())

    def do_GET(self) -> None:
        self.note()
        self.send_response(302)
        self.send_header("Location", next(self.turn))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET


@contextlib.contextmanager
def mirrors(*classes: type[Liar]) -> Iterator[tuple[str, type[Liar], list[type[Liar]]]]:
    """The redirector's URL and class, and the mirrors that it leads to in turn."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(serving(each)) for each in classes]
        for number, (_, cls) in enumerate(found):
            cls.etag = f'"mirror{number}"'
        url, redirector = stack.enter_context(serving(Redirector))
        redirector.turn = itertools.cycle([address for address, _ in found])  # type: ignore[attr-defined]
        yield url, redirector, [cls for _, cls in found]


async def right(source: ObjectSource) -> None:
    assert await source.read(0, len(DATA)) == DATA
    await source.check_identity()
    assert await source.read(MIB + 3, 1000) == DATA[MIB + 3 : MIB + 1003]


def test_the_first_mirror_is_kept() -> None:
    with mirrors(Mirror, Mirror, Mirror) as (url, redirector, found):

        async def check(source: ObjectSource) -> None:
            asked = len(redirector.seen)
            for _ in range(5):
                await right(source)
            assert len(redirector.seen) == asked

        use(url, check)
        used = [cls for cls in found if any(method == "GET" for method, _, _ in cls.seen)]
        assert len(used) == 1


def test_identity_is_not_a_mirrors_own() -> None:
    async def identity(source: ObjectSource) -> object:
        return source.stat.identity

    with mirrors(Mirror, Mirror, Mirror) as (url, _, _):
        assert len({use(url, identity) for _ in range(4)}) == 1


def test_an_address_expires() -> None:
    with mirrors(Mirror, Mirror) as (url, redirector, found):

        async def check(source: ObjectSource) -> None:
            for _ in range(2):  # each of them in turn; the redirector knows which one lives
                (kept,) = (cls for cls in found if cls.alive and cls.seen)  # type: ignore[attr-defined]
                (other,) = (cls for cls in found if cls is not kept)
                kept.alive, other.alive = False, True  # type: ignore[attr-defined]
                kept.seen.clear()
                redirector.turn = itertools.repeat(addresses[found.index(other)])  # type: ignore[attr-defined]
                await right(source)

        addresses = [next(redirector.turn), next(redirector.turn)]  # type: ignore[attr-defined]
        redirector.turn = itertools.repeat(addresses[0])  # type: ignore[attr-defined]
        use(url, check)


def test_a_silent_mirror_is_left() -> None:
    with mirrors(Mirror, Mirror) as (url, redirector, found):
        addresses = [next(redirector.turn), next(redirector.turn)]  # type: ignore[attr-defined]
        redirector.turn = itertools.repeat(addresses[0])  # type: ignore[attr-defined]

        async def check(source: ObjectSource) -> None:
            found[0].delay_s = 5.0  # type: ignore[attr-defined]
            redirector.turn = itertools.repeat(addresses[1])  # type: ignore[attr-defined]
            assert await source.read(5, 1000) == DATA[5:1005]
            redirector.turn = itertools.repeat(addresses[0])  # type: ignore[attr-defined]
            found[1].delay_s = 5.0  # type: ignore[attr-defined]
            with pytest.raises(SourceTimeout):  # both of them
                await source.read(5, 1000)

        use(url, check, timeout_s=2)


@pytest.mark.parametrize("what", ["size", "date", "no date"])
def test_a_mirror_of_another_state_is_a_change(what: str) -> None:
    with mirrors(Mirror, Mirror) as (url, redirector, found):
        addresses = [next(redirector.turn), next(redirector.turn)]  # type: ignore[attr-defined]
        redirector.turn = itertools.repeat(addresses[0])  # type: ignore[attr-defined]
        if what == "size":
            found[1].data = DATA + b"x"
        else:
            found[1].modified = "Mon, 07 Nov 1994 08:49:37 GMT" if what == "date" else None

        async def check(source: ObjectSource) -> None:
            found[0].alive = False  # type: ignore[attr-defined]
            redirector.turn = itertools.repeat(addresses[1])  # type: ignore[attr-defined]
            with pytest.raises(SourceChanged):
                await source.read(0, 1000)

        use(url, check)


def test_a_change_at_the_mirror_is_noticed() -> None:
    with mirrors(Mirror) as (url, _, found):

        async def check(source: ObjectSource) -> None:
            found[0].etag = '"another"'
            with pytest.raises(SourceChanged):
                await source.read(0, 1000)
            with pytest.raises(SourceChanged):
                await source.check_identity()

        use(url, check)


def test_a_login_page_is_no_image() -> None:
    class Login(Liar):
        data = b"<html>who are you?</html>"

        def part(self, start: int, end: int) -> None:
            self.whole()

        def describe(self, length: int) -> None:
            self.send_header("Content-Type", "text/html")
            super().describe(length)

    async def nothing(_: ObjectSource) -> None:
        return

    with mirrors(Login) as (url, _, _), pytest.raises(NotAnImage, match="web page"):
        use(url, nothing)


def test_no_secret_of_a_redirect_is_shown() -> None:
    with mirrors(Mirror) as (url, redirector, found):
        address = next(redirector.turn) + "?signature=hidden"  # type: ignore[attr-defined]
        redirector.turn = itertools.repeat(address)  # type: ignore[attr-defined]

        async def check(source: ObjectSource) -> None:
            found[0].alive = False  # type: ignore[attr-defined]
            with pytest.raises(Exception, match="denies access") as caught:
                await source.read(0, 1000)
            assert "hidden" not in str(caught.value)
            assert str(caught.value).startswith(url)

        use(url, check)
