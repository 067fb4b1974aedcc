"""The channels of a connection over a long line: how many, how large, and still one file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from imgfs.errors import SourceChanged
from imgfs.sources.ssh.lanes import LANES, LEAST, LONG_S, MOST, RATE, Lane, channel_window, emptiest
from imgfs.sources.ssh.source import SshHosts, SshSource
from imgfs.url.source import SshUrl, parse
from tests.servers.delay_proxy import DelayProxy
from tests.servers.ssh import Sshd

MIB = 1 << 20
TRIP_S = 0.05


def test_window_holds_twice_the_line_and_is_bounded() -> None:
    assert channel_window(0.0005, 1) == LEAST
    assert channel_window(0.02, 4) * 4 == 2 * RATE * 0.02
    assert channel_window(0.2, 4) * 4 == channel_window(100, 4) * 4 == MOST
    assert channel_window(LONG_S, 1) < MOST


def test_the_emptiest_lane_is_taken() -> None:
    lanes = [Lane(None) for _ in range(3)]
    with lanes[0].asking(5), lanes[1].asking(3):
        assert emptiest(lanes) is lanes[2]
        with lanes[2].asking(4):
            assert emptiest(lanes) is lanes[1]
    assert [lane.out for lane in lanes] == [0, 0, 0]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(8 * MIB))
    return path


@pytest.fixture
def far(sshd: Sshd) -> Iterator[DelayProxy]:
    proxy = DelayProxy(sshd.port, TRIP_S)
    sshd.trust(proxy.port)
    yield proxy
    proxy.close()


def url_of(sshd: Sshd, path: Path, port: int) -> SshUrl:
    url = parse(sshd.url(path, port))
    assert isinstance(url, SshUrl)
    return url


async def widened(source: SshSource, count: int) -> list[Lane]:
    """The lanes in which the file is open, once there are so many."""
    with trio.fail_after(20):
        while len(source._file.files) < count:
            await trio.sleep(0.02)
    return list(source._file.files)


def run_far(sshd: Sshd, image: Path, port: int, body: Callable[[SshSource], Any]) -> None:
    async def main() -> None:
        hosts = SshHosts()
        try:
            source = await hosts.open(url_of(sshd, image, port), sshd.settings())
            await body(source)
            await source.aclose()
        finally:
            await hosts.aclose()

    trio.run(main)


def test_a_long_line_has_lanes_with_windows_to_fill_it(
    sshd: Sshd, image: Path, far: DelayProxy
) -> None:
    async def body(source: SshSource) -> None:
        lanes = await widened(source, LANES)
        assert 0.99 * TRIP_S <= source.round_trip_s < 3 * TRIP_S
        expected = channel_window(source.round_trip_s, LANES)
        assert [lane._channel.get_recv_window() for lane in lanes] == [expected] * LANES
        # All are read through, and give the same file.
        wanted = image.read_bytes()
        parts: dict[int, bytes] = {}

        async def one(offset: int) -> None:
            parts[offset] = bytes(await source.read(offset, MIB))

        async with trio.open_nursery() as nursery:
            for offset in range(0, 8 * MIB, MIB):
                nursery.start_soon(one, offset)
        assert b"".join(parts[offset] for offset in sorted(parts)) == wanted

    run_far(sshd, image, far.port, body)


def test_a_short_line_has_one(sshd: Sshd, image: Path) -> None:
    async def body(source: SshSource) -> None:
        for _ in range(3):  # the shortest time counts, on a busy machine too
            await source.check_identity()
        assert source.round_trip_s < LONG_S
        (lane,) = source._file.files
        assert lane._channel.get_recv_window() == channel_window(source.round_trip_s, 1)

    run_far(sshd, image, sshd.port, body)


def test_a_replaced_file_is_read_through_no_lane(
    sshd: Sshd, image: Path, far: DelayProxy, tmp_path: Path
) -> None:
    """It is replaced before the other lanes can have it open."""

    async def body(source: SshSource) -> None:
        times = image.stat()
        other = tmp_path / "other"
        other.write_bytes(os.urandom(8 * MIB))
        os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
        other.rename(image)
        await trio.sleep(15 * TRIP_S)
        assert len(source._file.files) == 1
        with pytest.raises(SourceChanged):
            await source.check_identity()

    run_far(sshd, image, far.port, body)


@pytest.mark.parametrize("sessions", [2, 5])
def test_a_server_that_allows_few_sessions(
    make_sshd: Callable[..., Sshd], image: Path, sessions: int
) -> None:
    """With room for the two helpers, and for one more: extents are found, and all is read."""
    server = make_sshd(MaxSessions=str(sessions))
    proxy = DelayProxy(server.port, TRIP_S)
    server.trust(proxy.port)
    with image.open("r+b") as file:
        file.truncate(16 * MIB)

    async def body(source: SshSource) -> None:
        await trio.sleep(15 * TRIP_S)
        assert len(source._file.files) == max(1, sessions - 3)
        found = await source.extents(0, source.size)
        assert found.stored_bytes() == (8 if sessions > 2 else 16) * MIB
        assert bytes(await source.read(MIB, 9 * MIB)) == image.read_bytes()[MIB : 10 * MIB]

    try:
        run_far(server, image, proxy.port, body)
    finally:
        proxy.close()
