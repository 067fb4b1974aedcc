"""The SFTP channels of one connection, and their windows, which follow the round trip.

A channel's window (RFC 4254, section 5.2) is how many bytes the server may send before it is told
to go on.  asyncssh tells it when half of them have come, so with 2 MiB, its default, no more than
1 MiB may come in a round trip: 5 MB/s at 200 ms.  But a large one makes OpenSSH's server slow.
It takes from sftp-server what the window allows, into a buffer that it copies whenever that grows:
tens of megabytes cost it seconds, in which it sends next to nothing.

So where the round trip is long there are several channels, *lanes*, each with a part of the window
and a buffer of its own.  Of 600 MiB at 200 ms, 32 MiB in flight, 125 MB/s: 93 MB/s with one
lane, 118 with three, 120 with six.  The server takes from its lanes in turn, so a read in a lane
that is empty does not wait for what is queued in the others.

The socket's own buffers are left to the kernel: to set them would end its own tuning of them, and
net.core.rmem_max allows less than that arrives at.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import asyncssh

log = logging.getLogger(__name__)

RATE = 500e6  # bytes a second; asyncssh decrypts no more
LEAST = 2 << 20  # asyncssh's default
MOST = 64 << 20  # of all lanes
LANES = 4  # OpenSSH allows ten channels on a connection: the helpers need some
LONG_S = 0.01  # a round trip from which on one lane is not enough


def channel_window(round_trip_s: float, lanes: int) -> int:
    """Bytes of each lane's window, for RATE though half of them must come before it goes on."""
    return int(max(LEAST, min(MOST, 2 * RATE * round_trip_s) / lanes))


class Lane:
    """One SFTP channel.  `out` is the bytes that were asked of it and have not come."""

    def __init__(self, sftp: Any) -> None:
        self.sftp = sftp
        self.out = 0
        reader = getattr(getattr(sftp, "_handler", None), "_reader", None)
        self._channel: Any = getattr(reader, "channel", None)

    @contextlib.contextmanager
    def asking(self, length: int) -> Iterator[None]:
        self.out += length
        try:
            yield
        finally:
            self.out -= length

    def set_window(self, size: int) -> None:
        """asyncssh takes the size when a channel opens only; the protocol lets it change."""
        if hasattr(self._channel, "_init_recv_window"):
            self._channel._init_recv_window = size
        else:
            log.info("asyncssh keeps its window elsewhere; it stays as it is")


class Lanes:
    """`trip_s` is the shortest time of a request on the connection; 0 until there is one."""

    def __init__(self, connection: asyncssh.SSHClientConnection, sftp: Any) -> None:
        self.first = Lane(sftp)
        self.more: list[Lane] = []
        self.trip_s = 0.0
        self._connection = connection
        self._widening = asyncio.Lock()
        self._wide = False
        self._apart: Lane | None = None
        self._has_apart = False

    def answered(self, seconds: float) -> None:
        """A request took so long."""
        if not self.trip_s or seconds < self.trip_s:
            self.trip_s = seconds
            self._follow()

    async def widen(self) -> list[Lane]:
        """All lanes but the first; opens them if the round trip is long.  Raises nothing of ssh."""
        async with self._widening:
            if not self._wide and self.trip_s >= LONG_S:
                self._wide = True
                self.more = await self._opened(LANES - 1)
                self._follow()
        return self.more

    async def apart(self) -> Lane | None:
        """A lane for requests that take long, in which nobody reads; None: the server has none."""
        async with self._widening:
            if not self._has_apart:
                self._has_apart = True
                self._apart = next(iter(await self._opened(1)), None)
        return self._apart

    async def _opened(self, count: int) -> list[Lane]:
        attempts = [self._connection.start_sftp_client(path_encoding=None) for _ in range(count)]
        found = await asyncio.gather(*attempts, return_exceptions=True)
        lanes = [Lane(each) for each in found if not isinstance(each, BaseException)]
        for failure in found:
            if isinstance(failure, asyncssh.Error | OSError):
                log.info("one lane less: %s", failure)
            elif isinstance(failure, BaseException):
                raise failure
        if 0 < len(lanes) < count:
            # It allows no more sessions than these; leave one for a helper.
            lanes.pop().sftp.exit()
        return lanes

    def _follow(self) -> None:
        size = channel_window(self.trip_s, 1 + len(self.more))
        for lane in (self.first, *self.more):
            lane.set_window(size)


def emptiest(lanes: Iterable[Lane]) -> Lane:
    """The one that will answer first."""
    return min(lanes, key=lambda lane: lane.out)
