"""Servers that break NBD's rules: an error that says so, and never wrong bytes."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio

from imgfs.errors import (
    ImgfsError,
    ProtocolViolation,
    SourceChanged,
    SourceTimeout,
    SourceUnreachable,
)
from imgfs.extents import all_data
from tests.servers import nbd_liar
from tests.servers.nbd_liar import PythonNbd, Session

from .conftest import MIB, run
from .nbd import opened, refused

DATA = os.urandom(2 * MIB)


@contextmanager
def liar(session: type[Session] = Session, **more: Any) -> Iterator[PythonNbd]:
    server = PythonNbd(DATA, session, **more)
    try:
        yield server
    finally:
        server.close()


def test_honest() -> None:
    """What the others differ from."""
    with liar() as server:

        async def main() -> None:
            async with opened(server.url) as source:
                assert bytes(await source.read(1, 2 * MIB - 2)) == DATA[1:-1]
                assert await source.extents(0, source.size) == all_data(0, source.size)

        run(main)


def reading(
    session: type[Session], error: type[ImgfsError], length: int = 1000, **settings: Any
) -> str:
    """What a read from such a server is refused with."""
    with liar(session) as server:

        async def main() -> str:
            async with opened(server.url, **{"timeout_s": 1, **settings}) as source:
                with pytest.raises(error) as caught:
                    await source.read(100, length)
                assert type(caught.value) is error
                return str(caught.value)

        said: str = run(main)
        assert f"127.0.0.1:{server.port}" in said
        return said


class Short(Session):
    async def read(self, cookie: int, offset: int, length: int) -> None:
        self.data(cookie, offset, self.server.data[offset : offset + length - 1])


class Gap(Session):
    """The right number of bytes, some of them twice."""

    async def read(self, cookie: int, offset: int, length: int) -> None:
        half = length // 2
        self.data(cookie, offset, self.server.data[offset : offset + half], flags=0)
        self.data(cookie, offset, self.server.data[offset : offset + half])


class Nothing(Session):
    async def read(self, cookie: int, offset: int, length: int) -> None:
        self.chunk(cookie, nbd_liar.NONE)


class Twice(Session):
    async def read(self, cookie: int, offset: int, length: int) -> None:
        self.data(cookie, offset, self.server.data[offset : offset + length], flags=0)
        self.data(cookie, offset, self.server.data[offset : offset + length])


class Longer(Session):
    async def read(self, cookie: int, offset: int, length: int) -> None:
        self.data(cookie, offset, self.server.data[offset : offset + length + 1])


class Elsewhere(Session):
    async def read(self, cookie: int, offset: int, length: int) -> None:
        self.data(cookie, offset + 1, self.server.data[offset : offset + length])


class Garbage(Session):
    async def read(self, cookie: int, offset: int, length: int) -> None:
        self.writer.write(bytes(length) + b"garbage")


class SimpleReply(Session):
    """Not allowed to a read once structured replies were agreed on."""

    async def read(self, cookie: int, offset: int, length: int) -> None:
        self.send("LLQ", nbd_liar.SIMPLE_REPLY, 0, cookie)
        self.writer.write(self.server.data[offset : offset + length])


class UnknownChunk(Session):
    async def read(self, cookie: int, offset: int, length: int) -> None:
        self.chunk(cookie, 99, b"x" * 10)


class StatusForRead(Session):
    async def read(self, cookie: int, offset: int, length: int) -> None:
        self.extents(cookie, [length, 3])


@pytest.mark.parametrize(
    "session",
    [
        *(Short, Gap, Nothing, Twice, Longer, Elsewhere),
        *(Garbage, SimpleReply, UnknownChunk, StatusForRead),
    ],
)
def test_wrong_replies(session: type[Session]) -> None:
    reading(session, ProtocolViolation)


def test_one_wrong_piece_of_many() -> None:
    class Fourth(Session):
        async def read(self, cookie: int, offset: int, length: int) -> None:
            kind = Short if offset > MIB else Session
            await kind.read(self, cookie, offset, length)

    reading(Fourth, ProtocolViolation, length=2 * MIB - 200)


def test_wrong_cookie_is_no_answer() -> None:
    class Wrong(Session):
        async def read(self, cookie: int, offset: int, length: int) -> None:
            self.data(cookie + 1000, offset, self.server.data[offset : offset + length])

    with liar(Wrong) as server:

        async def main() -> None:
            async with opened(server.url, timeout_s=1) as source:
                # Later versions of libnbd skip such a reply, and nothing else comes.
                with pytest.raises((ProtocolViolation, SourceTimeout)):
                    await source.read(0, 100)

        run(main)


def test_swapped_cookies_are_out_of_bounds() -> None:
    class Swapped(Session):
        before: tuple[int, int, int] | None = None

        async def read(self, cookie: int, offset: int, length: int) -> None:
            if self.before is None:
                self.before = (cookie, offset, length)
                return
            other, at, size = self.before
            self.data(cookie, at, self.server.data[at : at + size], 0)
            self.data(other, offset, self.server.data[offset : offset + length], 0)

    reading(Swapped, ProtocolViolation, length=MIB)


def test_replies_out_of_order_and_in_pieces_are_fine() -> None:
    class Late(Session):
        late: list[tuple[int, int, int]]

        async def read(self, cookie: int, offset: int, length: int) -> None:
            self.late = [*getattr(self, "late", []), (cookie, offset, length)]
            if len(self.late) < 4:
                return
            for each, at, size in reversed(self.late):
                middle = at + size // 2
                self.data(each, middle, self.server.data[middle : at + size], flags=0)
                self.data(each, at, self.server.data[at:middle])
            self.late = []

    with liar(Late) as server:

        async def main() -> None:
            async with opened(server.url) as source:
                assert bytes(await source.read(0, MIB)) == DATA[:MIB]

        run(main)


def test_holes_in_replies_are_zeroes() -> None:
    class Holes(Session):
        async def read(self, cookie: int, offset: int, length: int) -> None:
            hole = struct.pack(">QL", offset, length - 10)
            self.chunk(cookie, nbd_liar.OFFSET_HOLE, hole, flags=0)
            self.data(cookie, offset + length - 10, b"x" * 10)

    with liar(Holes) as server:

        async def main() -> None:
            async with opened(server.url) as source:
                assert bytes(await source.read(0, 100)) == bytes(90) + b"x" * 10

        run(main)


def describing(session: type[Session], error: type[ImgfsError]) -> None:
    with liar(session) as server:

        async def main() -> None:
            async with opened(server.url, timeout_s=1) as source:
                with pytest.raises(error) as caught:
                    await source.extents(0, source.size)
                assert f"127.0.0.1:{server.port}" in str(caught.value)

        run(main)


def test_extents_without_length() -> None:
    class Empty(Session):
        async def status(self, cookie: int, offset: int, length: int) -> None:
            self.extents(cookie, [0, 3])

    describing(Empty, ProtocolViolation)


def test_an_extent_without_length_behind_others() -> None:
    """libnbd 1.18 and later leave it out, and what follows it: then that is asked for again."""

    class Empty(Session):
        async def status(self, cookie: int, offset: int, length: int) -> None:
            flags = 3 if offset % 8192 else 0
            self.extents(cookie, [4096, flags, 0, 3, 4096, 3])

    with liar(Empty) as server:

        async def main() -> None:
            async with opened(server.url, timeout_s=5) as source:
                try:
                    found = await source.extents(0, 65536)
                except ProtocolViolation:
                    return
                assert [(e.start, e.end, e.is_zero) for e in found] == [
                    (at, at + 4096, bool(at % 8192)) for at in range(0, 65536, 4096)
                ]

        run(main)


def test_extents_of_another_context() -> None:
    class Other(Session):
        async def status(self, cookie: int, offset: int, length: int) -> None:
            self.extents(cookie, [length, 3], context=nbd_liar.CONTEXT + 1)

    describing(Other, ProtocolViolation)


def test_extents_that_never_come() -> None:
    class Silent(Session):
        async def status(self, cookie: int, offset: int, length: int) -> None:
            pass

    with liar(Silent) as server:

        async def main() -> None:
            async with opened(server.url, timeout_s=1) as source:
                # The map is given up, or the connection: whichever is first.
                try:
                    found = await source.extents(0, source.size)
                except SourceUnreachable:
                    return
                assert found == all_data(0, source.size)

        run(main)


@pytest.mark.parametrize("before", [0, 4096])
def test_extents_beyond_the_end_are_clipped(before: int) -> None:
    class Long(Session):
        async def status(self, cookie: int, offset: int, length: int) -> None:
            first = [before, 3] if before else []
            self.extents(cookie, [*first, length - before + (1 << 20), 3])

    with liar(Long) as server:

        async def main() -> None:
            async with opened(server.url) as source:
                found = await source.extents(0, source.size)
                assert [(e.start, e.end, e.is_zero) for e in found] == [(0, source.size, True)]

        run(main)


def test_what_is_wrong_besides_an_extent_beyond_the_end_is_said() -> None:
    class Twice(Session):
        async def status(self, cookie: int, offset: int, length: int) -> None:
            body = struct.pack(">LLL", nbd_liar.CONTEXT, length + 4096, 3)
            self.chunk(cookie, nbd_liar.BLOCK_STATUS, body, flags=0)
            self.chunk(cookie, nbd_liar.BLOCK_STATUS, body)

    describing(Twice, ProtocolViolation)


@pytest.mark.parametrize(
    ("blocks", "said"), [((3, 4096, 65536), "lock size"), ((4096, 4096, 512), "lock size")]
)
def test_impossible_block_sizes(blocks: tuple[int, int, int], said: str) -> None:
    with liar(blocks=blocks) as server:

        async def main() -> None:
            # libnbd forgets constraints that make no sense; then reads are as without any.
            try:
                async with opened(server.url) as source:
                    assert bytes(await source.read(1, 10)) == DATA[1:11]
            except ProtocolViolation as exc:
                assert said in str(exc)

        run(main)


def test_sizes_beyond_an_off_t() -> None:
    with liar(size=(1 << 64) - 1) as server:
        refused(server.url, ProtocolViolation, timeout_s=2)


def test_a_size_that_is_not_there() -> None:
    """The export says more than it has: an error, and never zeroes."""
    with liar(size=4 * MIB) as server:

        async def main() -> None:
            async with opened(server.url, timeout_s=1) as source:
                with pytest.raises(ProtocolViolation):
                    await source.read(3 * MIB, 100)

        run(main)


def test_size_changes_at_a_reconnect() -> None:
    with liar() as server:

        async def main() -> None:
            async with opened(server.url, pin="same", timeout_s=5) as source:
                assert bytes(await source.read(0, 10)) == DATA[:10]
                server.size -= 512
                server.cut()
                await trio.sleep(0.1)
                for _ in range(2):
                    with pytest.raises(SourceChanged, match="had 2097152"):
                        await source.read(0, 10)
                with pytest.raises(SourceChanged):
                    await source.check_identity()

        run(main)


def test_flags_change_at_a_reconnect() -> None:
    with liar() as server:

        async def main() -> None:
            async with opened(server.url, pin="same", timeout_s=5) as source:
                server.flags = 1
                server.cut()
                await trio.sleep(0.1)
                with pytest.raises(SourceChanged, match="other properties"):
                    await source.read(0, 10)

        run(main)


def test_one_of_several_connections_is_lost() -> None:
    """The others go on, and prove that it is the same export."""
    with liar(flags=3 | nbd_liar.MULTI_CONN) as server:

        async def main() -> None:
            async with opened(server.url, timeout_s=5) as source:
                await trio.sleep(0.2)
                assert server.connections == 4
                first = server._writers[0]
                server._call(first.transport.abort)
                assert bytes(await source.read(0, 2 * MIB)) == DATA
                await trio.sleep(0.1)
                assert bytes(await source.read(0, 2 * MIB)) == DATA
                assert server.connections == 4
                assert len(source._link._alive) == 3

        run(main)
