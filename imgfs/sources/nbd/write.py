"""Writing to an NBD export (proto.md: NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, NBD_CMD_FLUSH).

Several connections are used only where the server says that they show the same, and then a flush on
one of them covers what was answered on any (NBD_FLAG_CAN_MULTI_CONN).  NBD_CMD_TRIM is of no use:
what was trimmed may read as anything.

A server that has no flush but FUA gets FUA with each write; one that has neither promises nothing.
When all connections were lost the server may have crashed, and with it what it had answered and
not flushed: the next flush fails, though a new connection may be as good as the old one.
"""

from __future__ import annotations

from functools import partial

import trio

from imgfs.errors import NeverDurable, NotDurable, UnsupportedFeature
from imgfs.image import Buffer
from imgfs.sources.nbd.connection import Connection
from imgfs.sources.nbd.link import PIECE, Batch, NbdLink
from imgfs.sources.nbd.requests import Done

MOST_ZEROES = 1 << 30  # has no payload, so the server's longest request does not bound it
ZEROES = 1 << 20  # written at once where the server cannot write zeroes itself


class NbdWriter:
    """Writes over `link`, which is open.  All ranges are inside the export."""

    def __init__(self, link: NbdLink, name: str) -> None:
        self._link = link
        self._name = name
        facts = link.facts
        self._fua = facts.can_fua and not facts.can_flush
        self._edges = trio.Lock()
        #: at which of the link's epochs the oldest write was answered that is not flushed
        self._unflushed: int | None = None

    async def write(self, offset: int, data: Buffer) -> None:
        """Raises NoSpace, AccessDenied, and what reading raises."""
        block, size = self._link.facts.minimum, self._link.facts.size
        end = offset + len(data)
        if offset % block == 0 and (end % block == 0 or end == size):
            await self._write(offset, memoryview(data))
            return
        # Two writes must not put back each other's bytes of one block.
        async with self._edges:
            start = offset - offset % block
            stop = min(end + -end % block, size)
            whole = bytearray(await self._link.read(start, stop - start))
            whole[offset - start : end - start] = data
            await self._write(start, memoryview(whole))

    async def zero(self, offset: int, length: int) -> None:
        """The range reads as zeroes afterwards; it is a hole where the server makes one.

        Raises as `write` does.
        """
        facts = self._link.facts
        start = offset + -offset % facts.minimum
        end = offset + length
        stop = end if end == facts.size else end - end % facts.minimum
        if not facts.can_zero or start >= stop:
            zeroes = memoryview(bytes(min(length, ZEROES)))
            for at in range(offset, end, ZEROES):
                await self.write(at, zeroes[: end - at])
            return
        if start > offset:
            await self.write(offset, bytes(start - offset))
        try:
            await self._zero(start, stop, MOST_ZEROES)
        except UnsupportedFeature:
            await self._zero(start, stop, facts.most)
        if stop < end:
            await self.write(stop, bytes(end - stop))

    async def flush(self) -> None:
        """Raises NeverDurable when the server cannot, NotDurable when it may have lost what it had
        answered."""
        facts = self._link.facts
        if not facts.can_flush and not facts.can_fua:
            said = "the server has no flush: what was written may not survive a crash there"
            raise NeverDurable(f"{self._name}: {said}")

        async def work() -> None:
            if facts.can_flush:
                batch = Batch()
                await self._link.issue(batch, Connection.flush)
                await batch.wait()

        # Writes that are answered from now on may be for the next flush.
        before, self._unflushed = self._unflushed, None
        try:
            await self._link.run(work)
        except BaseException:
            self._unflushed = self._unflushed if before is None else before
            raise
        if before is not None and before != self._link.epoch and not self._fua:
            said = "the connection was lost before what had been written was flushed"
            raise NotDurable(f"{self._name}: {said}; write it again")

    async def _write(self, offset: int, view: memoryview) -> None:
        facts = self._link.facts
        step = min(facts.most, max(PIECE, facts.preferred))
        step -= step % facts.minimum

        async def work() -> None:
            batch, at = Batch(), 0
            while at < len(view) and batch.error is None:
                issue = partial(_write, view[at : at + step], offset + at, self._fua)
                await self._link.issue(batch, issue)
                at += step
            await batch.wait()

        await self._link.run(work)
        self._answered()

    async def _zero(self, start: int, stop: int, step: int) -> None:
        step -= step % self._link.facts.minimum

        async def work() -> None:
            batch, at = Batch(), start
            while at < stop and batch.error is None:
                issue = partial(_zero, at, min(step, stop - at), self._fua)
                await self._link.issue(batch, issue)
                at += step
            await batch.wait()

        await self._link.run(work)
        self._answered()

    def _answered(self) -> None:
        if self._unflushed is None:
            self._unflushed = self._link.epoch


def _write(view: memoryview, offset: int, fua: bool, connection: Connection, done: Done) -> None:
    connection.write(view, offset, fua, done)


def _zero(offset: int, length: int, fua: bool, connection: Connection, done: Done) -> None:
    connection.zero(offset, length, fua, done)
