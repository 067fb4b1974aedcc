"""One read of a file on a server: many requests at once, and one that tells if it is the same."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from imgfs.errors import ImgfsError, ProtocolViolation, ShortRead, SourceChanged
from imgfs.sources.ssh.errors import file_errors
from imgfs.sources.ssh.lanes import Lane
from imgfs.sources.ssh.link import Session, in_background
from imgfs.sources.ssh.state import State, state_of

if TYPE_CHECKING:
    from imgfs.sources.ssh.file import SshFile


class Batch:
    """The requests of one read.

    When the reader goes away or a piece fails, requests that were sent are answered all the same
    and their answers dropped; those still waiting for a slot are never sent.
    """

    def __init__(self, owner: SshFile, session: Session, lane: Lane, file: Any) -> None:
        self._owner = owner
        self._session = session
        self._lane = lane
        self._link = owner.link
        self._file = file
        self._known = owner.state
        self._wanted = True
        self._answered = 0  # how many answers have come

    async def run(self, offset: int, length: int) -> bytes:
        step, end = self._session.read_size, offset + length
        pieces = [
            in_background(self._piece(at, min(step, end - at))) for at in range(offset, end, step)
        ]
        behind = in_background(self._look())
        try:
            # Unlike gather it leaves them alone when this is cancelled.
            await asyncio.wait([*pieces, behind])
        finally:
            self._wanted = False
        with file_errors(self._owner.name), self._owner.gone_is_changed():
            parts = [piece.result() for piece in pieces]
        try:
            with file_errors(self._owner.name), self._owner.gone_is_changed():
                found, answered_then = behind.result()
                if answered_then < self._answered:
                    # Something was read after the look: asked for again, or out of order.
                    found = await self._owner.attributes(self._lane)
            self._owner.compare(found, self._known)
        except SourceChanged:
            # With its name it lost what is compared: what it is now is what its handle says.
            if not await self._owner.goes_on(self._session):
                raise
            known = self._owner.state
            self._owner.compare(await self._owner.attributes(self._lane), known)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _look(self) -> tuple[State, int]:
        found = await self._owner.attributes(self._lane)
        return found, self._answered

    async def _piece(self, offset: int, length: int) -> bytes:
        data = b""
        while len(data) < length:
            at, left = offset + len(data), length - len(data)
            with self._lane.asking(left):
                more = await self._link.request(partial(self._ask, at, left))
            if len(more) > left:
                raise ProtocolViolation(f"{self._owner.name}: the server sent more than was asked")
            data = data + more if data else more
        return data

    async def _ask(self, offset: int, length: int) -> bytes:
        if not self._wanted:
            raise ImgfsError("nobody wants it any more")
        more: bytes = await self._file.read(length, offset)
        self._answered += 1
        if not more:
            self._owner.compare(await self._session_attributes(), self._known)
            raise ShortRead(f"{self._owner.name}: ends at {offset}, before its size")
        return more

    async def _session_attributes(self) -> State:
        if self._owner.outlives_name:
            return state_of(await self._file.stat(), None)
        return state_of(await self._lane.sftp.stat(self._owner.path), None)
