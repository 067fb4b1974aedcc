"""One object at a server, on the asyncio side of the bridge.

Every answer says which state of the object it is of: size (in Content-Range), ETag, Last-Modified.
All are compared with what was opened before a byte is used, so that If-Match only saves the
transfer; where a server denies it wrongly, or the ETag is weak (RFC 9110, 13.1.1: never matches),
it is not sent.  obstore has checked by then that the status is 206 and Content-Range is what was
asked for; it does not check that the body is as long, and knows of Content-Encoding but
decodes nothing: that is checked here.

Whether a failure may pass says errors.py.  Silence for the timeout is final; anything else is
tried again until the timeout has passed since it went wrong first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import obstore

from imgfs.errors import (
    ImgfsError,
    NotAnImage,
    ProtocolViolation,
    ShortRead,
    SourceChanged,
    SourceNotFound,
    SourceTimeout,
    SourceUnreachable,
    UnsupportedFeature,
)
from imgfs.sources.base import Identity, SourceStat
from imgfs.sources.objects.errors import (
    NO_RANGES,
    Again,
    Mismatch,
    NoSuchRange,
    Undecodable,
    object_errors,
)
from imgfs.sources.objects.settings import ObjectSettings
from imgfs.sources.objects.store import PIECE, Store, longest_s, looked_for, make_store
from imgfs.url.source import ObjectUrl

log = logging.getLogger(__name__)

Result = TypeVar("Result")

TRIES = 3  # to see an object that somebody is writing in one state
FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 2.0
EPOCH = datetime.fromtimestamp(0, UTC)  # what obstore says where there is no Last-Modified


@dataclass(frozen=True, slots=True)
class State:
    """What an answer says of the object.  `modified` has whole seconds."""

    size: int
    etag: str | None
    modified: datetime | None

    @property
    def is_weak(self) -> bool:
        return self.etag is not None and self.etag.startswith("W/")

    @property
    def strong(self) -> str | None:
        """What If-Match may be sent with."""
        etag = self.etag
        return etag if etag and len(etag) > 2 and etag[0] == etag[-1] == '"' else None

    def differs(self, other: State) -> bool:
        """Are these states of different objects, or of different times?"""
        if (self.size, self.etag) != (other.size, other.etag):
            return True
        # Equal weak ETags promise no equal bytes.
        return (self.etag is None or self.is_weak) and self.modified != other.modified

    def identity(self, where: str) -> Identity | None:
        """None where the server gives neither an ETag nor a date; `where` becomes part of it."""
        when = "" if self.modified is None else f"{self.modified:%Y-%m-%dT%H:%M:%SZ}"
        if self.is_weak:
            return Identity("weak-etag", f"{self.etag}:{when}:{self.size}{where}")
        if self.etag is not None:
            return Identity("etag", f"{self.etag}:{self.size}{where}")
        if self.modified is not None:
            return Identity("modified", f"{when}:{self.size}{where}")
        return None


class ObjectFile:
    """All methods run on the bridge's loop and raise ImgfsErrors."""

    def __init__(self, url: ObjectUrl, settings: ObjectSettings) -> None:
        self.name = url.text
        self._url = url
        self._settings = settings
        self._looked_for = looked_for(url, settings)
        self._store: Store
        self._store, self._path = make_store(url, settings)
        self._slots = asyncio.Semaphore(settings.depth)
        self._state: State | None = None
        self._if_match: str | None = None
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
                probe = await self._persist(self._probe)
                by_head = await head
            finally:
                head.cancel()
            self._use_head = by_head is not None and not by_head.differs(probe)
            # Where HEAD says something else, another probe tells whether that means anything.
            if self._use_head or not (await self._persist(self._probe)).differs(probe):
                break
        else:
            said = "is being written to, or the server says something else of it each time"
            raise SourceChanged(f"{self.name}: {said}")
        self._state, self._if_match = probe, probe.strong
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
            self._compare(await self._persist(self._head if self._use_head else self._probe))

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
            return await self._persist(lambda by: self._get(offset, length, by))

    async def _get(self, offset: int, length: int, by: float) -> bytes:
        if_match = self._if_match
        try:
            result, state = await self._request((offset, offset + length), by, if_match)
        except (Mismatch, NoSuchRange) as exc:
            # Not proof of a change yet: some servers get If-Match wrong.
            self._compare(await self._probe(by))
            if isinstance(exc, NoSuchRange):
                raise ProtocolViolation(str(exc)) from exc
            log.info("%s: the server denies its own ETag; reading without If-Match", self.name)
            self._if_match = None
            if if_match is None:
                raise ProtocolViolation(f"{self.name}: answers 412 unasked") from exc
            result, state = await self._request((offset, offset + length), by, None)
        self._compare(state)
        return await self._body(result, length)

    async def _request(
        self, span: tuple[int, int], by: float, if_match: str | None
    ) -> tuple[Any, State]:
        """Ask for a range: the answer without its body, and what it says of the object."""
        options: dict[str, Any] = {"range": span}
        if if_match is not None:
            options["if_match"] = if_match
        try:
            with object_errors(self.name, self._looked_for):
                async with self._until(by):
                    result = await obstore.get_async(
                        self._store,
                        self._path,
                        options=options,  # type: ignore[arg-type]
                    )
        except Undecodable as exc:
            await self._head(by)  # has no text, so that the status is told
            raise Again(SourceUnreachable(str(exc)), answered=True) from exc
        coding = result.attributes.get("Content-Encoding")
        if coding is not None and coding.strip().lower() not in ("", "identity"):
            # The range is one of the coded bytes, whatever those are of.
            raise ProtocolViolation(f"{self.name}: the server sends it coded as {coding[:20]!r}")
        return result, _state(result.meta)

    async def _body(self, result: Any, length: int) -> bytes:
        """The answer's body, which must have so many bytes; no more of it are ever held."""
        with object_errors(self.name, self._looked_for):
            by = asyncio.get_running_loop().time() + longest_s(length, self._settings)
            async with self._until(by):
                try:
                    # Ends at the end of the body, or with one byte too many.
                    data: bytes = await anext(result.stream(min_chunk_size=length + 1))
                except StopAsyncIteration:
                    data = b""
        if len(data) > length:
            raise ProtocolViolation(f"{self.name}: the server sent more than was asked for")
        if len(data) < length:
            said = f"{len(data)} bytes where it promised {length}"
            raise ShortRead(f"{self.name}: the server sent {said}")
        return data

    async def _probe(self, by: float) -> State:
        """The object's state by its first byte, which also proves that there are ranges."""
        try:
            result, state = await self._request((0, 1), by, None)
        except NoSuchRange as exc:
            # An empty file has no range, and some servers then send all of it.
            with contextlib.suppress(ImgfsError, Again):
                head = await self._head(by)
                if head.size == 0:
                    return head
            raise UnsupportedFeature(f"{self.name}: {NO_RANGES}") from exc
        await self._body(result, 1)
        return state

    async def _head(self, by: float) -> State:
        with object_errors(self.name, self._looked_for):
            async with self._until(by):
                return _state(await obstore.head_async(self._store, self._path))

    async def _usable_head(self) -> State | None:
        """What HEAD says; None where the server does not do that."""
        try:
            return await self._persist(self._head)
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
            except (Mismatch, NoSuchRange, Undecodable) as exc:
                raise ProtocolViolation(str(exc) or f"{self.name}: answers 412 unasked") from exc
            except Again as exc:
                ended = isinstance(exc.error, SourceTimeout)
                ended |= self._state is None and not exc.answered
                # That the rest of the time was not enough says less than what came before.
                failure = exc.error if failure is None or not ended else failure
            deadline = deadline or loop.time() + patience
            if ended or loop.time() >= deadline:
                raise type(failure)(str(failure))
            log.info("%s; trying again", failure)
            # Spread out: a server that has just come back is not to get all of them at once.
            await asyncio.sleep(min(pause * random.uniform(0.5, 1), deadline - loop.time()))
            pause = min(LAST_PAUSE_S, pause * 2)

    @asynccontextmanager
    async def _until(self, by: float) -> AsyncIterator[None]:
        """Raises Again with SourceTimeout at the loop's time `by`."""
        try:
            async with asyncio.timeout_at(by):
                yield
        except TimeoutError as exc:
            raise Again(SourceTimeout(f"{self.name}: the server does not answer")) from exc

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


def _state(meta: Any) -> State:
    modified = meta["last_modified"]
    return State(meta["size"], meta["e_tag"] or None, None if modified == EPOCH else modified)


def _one_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """That it changed says more than what else went wrong."""
    changed = (exc for exc in group.exceptions if isinstance(exc, SourceChanged))
    return next(changed, group.exceptions[0])
