"""Web servers with one method that does not do what it should: an error, never wrong bytes."""

from __future__ import annotations

import itertools
import time
from typing import ClassVar

import pytest
import trio

from imgfs.errors import (
    ImgfsError,
    ProtocolViolation,
    ShortRead,
    SourceChanged,
    SourceTimeout,
    SourceUnreachable,
    UnsupportedFeature,
)
from imgfs.sources.objects.source import ObjectSource
from tests.servers.web import Liar, serving

from .conftest import MIB
from .web import use

DATA = Liar.data


async def nothing(_: ObjectSource) -> None:
    return


class IgnoresRange(Liar):
    def part(self, start: int, end: int) -> None:
        self.whole()


class AnotherRange(Liar):
    """Says what it sends, and it is not what was asked for."""

    def part(self, start: int, end: int) -> None:
        super().part(start + 1, end + 1)


class NotSaying(Liar):
    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Content-Range":
            super().send_header(keyword, value)


class HugeRange(Liar):
    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "Content-Range":
            value = f"bytes 0-{2**64 - 1}/{2**64 - 1}"
        super().send_header(keyword, value)


class Gzip(Liar):
    def describe(self, length: int) -> None:
        self.send_header("Content-Encoding", "gzip")
        super().describe(length)


class NotHttp(Liar):
    def handle_one_request(self) -> None:
        self.rfile.readline(65537)
        self.wfile.write(b"\x00\x01\xff SMTP\r\n\r\n")
        self.close_connection = True


class ChangesEachTime(Liar):
    counter = itertools.count()

    def describe(self, length: int) -> None:
        type(self).etag = f'"{next(self.counter)}"'
        super().describe(length)


@pytest.mark.parametrize(
    ("server", "error", "said"),
    [
        (IgnoresRange, UnsupportedFeature, "does not serve ranges"),
        (AnotherRange, ProtocolViolation, "another range"),
        (NotSaying, ProtocolViolation, "without saying which"),
        (HugeRange, ProtocolViolation, "Content-Range makes no sense"),
        (Gzip, ProtocolViolation, "coded as 'gzip'"),
        (NotHttp, ProtocolViolation, "does not speak HTTP"),
        (ChangesEachTime, SourceChanged, "each time"),
    ],
)
def test_refused_at_open(server: type[Liar], error: type[ImgfsError], said: str) -> None:
    with serving(server) as (url, _):
        begun = time.monotonic()
        with pytest.raises(error, match=said) as caught:
            use(url, nothing)
        assert time.monotonic() - begun < 2
        assert str(caught.value).startswith(url)
        assert str(caught.value).isprintable()


class Later(Liar):
    """Honest for a while."""

    honest = True

    def part(self, start: int, end: int) -> None:
        if self.honest:
            super().part(start, end)
        else:
            self.lie(start, end)

    def lie(self, start: int, end: int) -> None:
        raise NotImplementedError

    def send(self, start: int, end: int, length: int, body: bytes) -> None:
        """Say that it is this range and so long, and send the body."""
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(self.data)}")
        self.describe(length)
        self.end_headers()
        self.wfile.write(body)


class Shorter(Later):
    def lie(self, start: int, end: int) -> None:
        self.send(start, end, end - start - 1, self.data[start : end - 1])


class Nothing(Later):
    def lie(self, start: int, end: int) -> None:
        self.send(start, end, 0, b"")


class Longer(Later):
    def lie(self, start: int, end: int) -> None:
        self.send(start, end, end - start + 1, self.data[start : end + 1])


class Endless(Later):
    """Has the whole world's memory filled, if it is let."""

    sent: ClassVar[int] = 0

    def lie(self, start: int, end: int) -> None:
        self.send(start, end, 2**62, b"")
        for _ in range(2000):
            self.wfile.write(bytes(MIB))
            type(self).sent += MIB


class Ignores(Later):
    def lie(self, start: int, end: int) -> None:
        self.whole()


class Shifted(Later):
    def lie(self, start: int, end: int) -> None:
        self.send(start + 1, end + 1, end - start, self.data[start + 1 : end + 1])


class Zipped(Later):
    def lie(self, start: int, end: int) -> None:
        self.send_response(206)
        self.send_header("Content-Encoding", "br")
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(self.data)}")
        self.describe(end - start)
        self.end_headers()
        self.wfile.write(bytes(end - start))


class Refuses(Later):
    def lie(self, start: int, end: int) -> None:
        if end - start > 1:
            self.refuse(416)
        else:
            super(Later, self).part(start, end)


class Denies(Later):
    """412 although nothing is to match any more, and nothing has changed."""

    def lie(self, start: int, end: int) -> None:
        if end - start > 1:
            self.refuse(412)
        else:
            super(Later, self).part(start, end)


class HangsUp(Later):
    def lie(self, start: int, end: int) -> None:
        self.send(start, end, end - start, self.data[start : start + 7])
        self.close_connection = True


@pytest.mark.parametrize(
    ("server", "error", "said"),
    [
        (Shorter, ShortRead, "9999 bytes where it promised 10000"),
        (Nothing, ShortRead, "0 bytes where it promised 10000"),
        (Longer, ProtocolViolation, "more than was asked"),
        (Endless, ProtocolViolation, "more than was asked"),
        (Ignores, ImgfsError, "does not serve ranges"),
        (Shifted, ProtocolViolation, "another range"),
        (Zipped, ProtocolViolation, "coded as 'br'"),
        (Refuses, ProtocolViolation, "416"),
        (Denies, ProtocolViolation, "412"),
        (HangsUp, SourceUnreachable, "connection was lost"),
    ],
)
def test_lies_while_reading(server: type[Later], error: type[ImgfsError], said: str) -> None:
    with serving(server) as (url, cls):

        async def check(source: ObjectSource) -> None:
            cls.honest = False  # type: ignore[attr-defined]
            begun = time.monotonic()
            with pytest.raises(error, match=said):
                await source.read(3, 10000)
            assert time.monotonic() - begun < 2.5
            with pytest.raises(error):
                await source.read(0, 3 * MIB)
            cls.honest = True  # type: ignore[attr-defined]
            assert await source.read(0, len(DATA)) == DATA

        use(url, check, timeout_s=1)
        # What the kernel's buffers hold may be on the way besides.
        assert getattr(cls, "sent", 0) < 30 * MIB


class Stalls(Later):
    def lie(self, start: int, end: int) -> None:
        self.send(start, end, end - start, self.data[start : (start + end) // 2])
        time.sleep(3)
        self.close_connection = True


class Silent(Later):
    def lie(self, start: int, end: int) -> None:
        time.sleep(3)
        self.close_connection = True


@pytest.mark.parametrize("server", [Stalls, Silent])
def test_stall_is_an_error_in_time(server: type[Later]) -> None:
    with serving(server) as (url, cls):

        async def check(source: ObjectSource) -> None:
            cls.honest = False  # type: ignore[attr-defined]
            begun = time.monotonic()
            with pytest.raises(SourceTimeout):
                await source.read(0, 100_000)
            assert 0.9 < time.monotonic() - begun < 2
            begun = time.monotonic()
            with trio.move_on_after(0.2) as scope:
                await source.read(0, 100_000)
            assert scope.cancelled_caught
            assert time.monotonic() - begun < 0.6
            cls.honest = True  # type: ignore[attr-defined]
            assert await source.read(0, len(DATA)) == DATA

        use(url, check, timeout_s=1)


class Trickles(Later):
    """A byte every now and then is never silence."""

    def lie(self, start: int, end: int) -> None:
        self.send(start, end, end - start, b"")
        for at in range(start, end):
            self.wfile.write(self.data[at : at + 1])
            time.sleep(0.05)


def test_trickling_ends_too() -> None:
    with serving(Trickles) as (url, cls):

        async def check(source: ObjectSource) -> None:
            cls.honest = False  # type: ignore[attr-defined]
            begun = time.monotonic()
            with pytest.raises(SourceTimeout):
                await source.read(0, 1000)
            assert 0.9 < time.monotonic() - begun < 2

        use(url, check, timeout_s=1)


class Changing(Later):
    """Turns into another image after so many answers, in the middle of a read."""

    lock = itertools.count()

    def part(self, start: int, end: int) -> None:
        if not self.honest and end - start > 1 and next(self.lock) == 2:
            type(self).etag = '"two"'
            type(self).data = bytes(len(DATA))
        super(Later, self).part(start, end)


def test_changes_between_the_pieces_of_a_read() -> None:
    with serving(Changing) as (url, cls):

        async def check(source: ObjectSource) -> None:
            cls.honest = False  # type: ignore[attr-defined]
            with pytest.raises(SourceChanged):
                for _ in range(4):
                    assert await source.read(0, len(DATA)) == DATA

        use(url, check)
