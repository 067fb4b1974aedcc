"""One object at a server, on the asyncio side of the bridge.

Every answer says which state of the object it is of: size, ETag, Last-Modified.  All are compared
with what was opened before a byte is used, so that If-Match only saves the transfer; where a
server denies it wrongly, or the ETag is weak (RFC 9110, 13.1.1: never matches), it is not sent.

Whether a failure may pass says errors.py.  Silence for the timeout is final; anything else is
tried again until the timeout has passed since it went wrong first.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from imgfs.errors import (
    ImgfsError,
    NotAnImage,
    ProtocolViolation,
    SourceChanged,
    SourceNotFound,
    SourceTimeout,
    SourceUnreachable,
    again,
)
from imgfs.sources.base import SourceStat
from imgfs.sources.bridge import Bridge
from imgfs.sources.objects.client import PIECE, Client
from imgfs.sources.objects.errors import Again, Mismatch, NoSuchRange
from imgfs.sources.objects.settings import ObjectSettings
from imgfs.sources.objects.state import State
from imgfs.url.source import ObjectUrl

log = logging.getLogger(__name__)

Result = TypeVar("Result")

TRIES = 3  # to see an object that somebody is writing in one state
FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 2.0


def make_client(url: ObjectUrl, settings: ObjectSettings, bridge: Bridge) -> Client:
    """On the bridge's loop.  Raises UsageError."""
    if url.scheme == "s3":
        from imgfs.sources.objects.s3 import S3Client

        return S3Client(url, settings)
    from imgfs.sources.objects.http import HttpClient
    from imgfs.sources.objects.transfer import Transfers

    return HttpClient(url, settings, bridge.shared(Transfers))


class ObjectFile:
    """All methods run on the bridge's loop and raise ImgfsErrors."""

    def __init__(self, url: ObjectUrl, settings: ObjectSettings, bridge: Bridge) -> None:
        self.name = url.text
        self._url = url
        self._settings = settings
        self._client = make_client(url, settings, bridge)
        self._slots = asyncio.Semaphore(settings.depth)
        self._state: State | None = None
        self._if_match: State | None = None
        self._use_head = False

    async def open(self) -> SourceStat:
        """Look whether it is there and can be read piece by piece.

        Raises SourceNotFound, NotAnImage, AccessDenied, UnsupportedFeature for a server without
        ranges, HostKeyError, SourceChanged when it does not keep still, SourceUnreachable,
        SourceTimeout, ProtocolViolation.
        """
        if not self._url.basename:
            raise NotAnImage(f"{self.name}: is a directory, not an image")
        for _ in range(TRIES):
            head = asyncio.create_task(self._usable_head())
            try:
                probe = await self._persist(self._client.probe)
                by_head = await head
            finally:
                head.cancel()
            self._use_head = by_head is not None and not by_head.differs(probe)
            # Where HEAD says something else, another probe tells whether that means anything.
            if self._use_head or not (await self._persist(self._client.probe)).differs(probe):
                break
        else:
            said = "is being written to, or the server says something else of it each time"
            raise SourceChanged(f"{self.name}: {said}")
        self._state = probe
        self._if_match = probe if probe.strong is not None else None
        mtime_ns = 0 if probe.modified is None else int(probe.modified.timestamp()) * 10**9
        return SourceStat(probe.size, mtime_ns, 0o444, probe.identity(self._where()))

    def _where(self) -> str:
        """What of its address is not in the URL that is shown: another one is another image."""
        if self._url.scheme == "s3":
            return "" if self._settings.endpoint is None else f"@{self._settings.endpoint}"
        query = self._url.query
        return "" if query is None else "?" + hashlib.sha256(query.encode()).hexdigest()[:16]

    async def check(self) -> None:
        """Raises SourceChanged when the server has another state of it now."""
        async with self._of_what_was_opened():
            self._compare(
                await self._persist(self._client.head if self._use_head else self._client.probe)
            )

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of the object that was opened."""
        if length <= PIECE:
            return await self._piece(offset, length)
        end = offset + length
        try:
            async with asyncio.TaskGroup() as group:
                pieces = [
                    group.create_task(self._piece(at, min(PIECE, end - at)))
                    for at in range(offset, end, PIECE)
                ]
        except BaseExceptionGroup as group_error:
            raise _one_of(group_error) from group_error
        return b"".join(piece.result() for piece in pieces)

    async def _piece(self, offset: int, length: int) -> bytes:
        async with self._slots, self._of_what_was_opened():
            data = await self._persist(partial(self._get, offset, length))
            while len(data) < length:  # a server may send less than was asked for, but something
                at, left = offset + len(data), length - len(data)
                data += await self._persist(partial(self._get, at, left))
            return data

    async def _get(self, offset: int, length: int, by: float) -> bytes:
        """As Client.get, with If-Match where the server gets that right."""
        if_match = self._if_match
        try:
            data, state = await self._client.get(offset, length, by, if_match)
        except (Mismatch, NoSuchRange) as exc:
            # Not proof of a change yet: some servers get If-Match wrong.
            self._compare(await self._client.probe(by))
            if isinstance(exc, NoSuchRange):
                raise ProtocolViolation(str(exc)) from exc
            if if_match is None:
                raise ProtocolViolation(f"{self.name}: answers 412 unasked") from exc
            log.info("%s: the server denies its own ETag; reading without If-Match", self.name)
            self._if_match = None
            data, state = await self._client.get(offset, length, by, None)
        self._compare(state)
        if not 0 < len(data) <= length:
            raise ProtocolViolation(f"{self.name}: the server sent {len(data)} bytes for {length}")
        return data

    async def _usable_head(self) -> State | None:
        """What HEAD says; None where the server does not do that."""
        try:
            return await self._persist(self._client.head)
        except ImgfsError as exc:
            log.info("HEAD is of no use: %s", exc)
            return None

    async def _persist(self, ask: Callable[[float], Awaitable[Result]]) -> Result:
        """`await ask(by)`, which must be answered by then; again when that may help.

        Raises what went wrong once the timeout has passed since it first did, and at once when the
        server was silent for as long, or could not be reached at all so far.
        """
        loop = asyncio.get_running_loop()
        patience, pause = self._settings.timeout_s, FIRST_PAUSE_S
        deadline: float | None = None
        failure: SourceUnreachable | None = None
        while True:
            try:
                return await ask(deadline or loop.time() + patience)
            except (Mismatch, NoSuchRange) as exc:
                raise ProtocolViolation(str(exc) or f"{self.name}: answers 412 unasked") from exc
            except Again as exc:
                failed = exc
                ended = isinstance(exc.error, SourceTimeout)
                ended |= self._state is None and not exc.answered
                # That the rest of the time was not enough says less than what came before.
                failure = exc.error if failure is None or not ended else failure
            deadline = deadline or loop.time() + patience
            if ended or loop.time() >= deadline:
                raise again(failure)
            log.info("%s; trying again", failure)
            # Spread out: a server that has just come back is not to get all of them at once.
            wait_s = max(failed.pause_s, pause * random.uniform(0.5, 1))
            await asyncio.sleep(min(wait_s, deadline - loop.time()))
            pause = min(LAST_PAUSE_S, pause * 2)

    @asynccontextmanager
    async def _of_what_was_opened(self) -> AsyncIterator[None]:
        try:
            yield
        except SourceNotFound as exc:
            raise SourceChanged(f"{self.name}: was deleted since it was opened") from exc

    def _compare(self, found: State) -> None:
        assert self._state is not None
        if found.differs(self._state):
            raise SourceChanged(f"{self.name}: changed since it was opened")


def _one_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """That it changed says more than what else went wrong."""
    changed = (exc for exc in group.exceptions if isinstance(exc, SourceChanged))
    return next(changed, group.exceptions[0])
