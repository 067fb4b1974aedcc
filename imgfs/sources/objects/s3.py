"""Requests to S3, by obstore.

obstore has checked by the time that it answers that the status is 206 and Content-Range is what
was asked for; it does not check that the body is as long, and knows of Content-Encoding but
decodes nothing: that is checked here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import obstore

from imgfs.errors import (
    ImgfsError,
    ProtocolViolation,
    ShortRead,
    SourceTimeout,
    SourceUnreachable,
    UnsupportedFeature,
)
from imgfs.sources.objects.client import Got, longest_s
from imgfs.sources.objects.errors import NO_RANGES, Again, NoSuchRange
from imgfs.sources.objects.s3_errors import Undecodable, object_errors
from imgfs.sources.objects.settings import ObjectSettings
from imgfs.sources.objects.state import State
from imgfs.sources.objects.store import looked_for, make_store
from imgfs.url.source import ObjectUrl

EPOCH = datetime.fromtimestamp(0, UTC)  # what obstore says where there is no Last-Modified


class S3Client:
    """A Client of one object."""

    def __init__(self, url: ObjectUrl, settings: ObjectSettings) -> None:
        """Raises UsageError."""
        self.name = url.text
        self._settings = settings
        self._looked_for = looked_for(settings)
        self._store, self._path = make_store(url, settings)

    async def get(self, offset: int, length: int, by: float, if_match: State | None) -> Got:
        tag = None if if_match is None else if_match.strong
        result, state = await self._request((offset, offset + length), by, tag)
        return await self._body(result, length), state

    async def probe(self, by: float) -> State:
        try:
            result, state = await self._request((0, 1), by, None)
        except NoSuchRange as exc:
            # An empty object has no range, and some servers then send all of it.
            with contextlib.suppress(ImgfsError, Again):
                head = await self.head(by)
                if head.size == 0:
                    return head
            raise UnsupportedFeature(f"{self.name}: {NO_RANGES}") from exc
        await self._body(result, 1)
        return state

    async def head(self, by: float) -> State:
        try:
            with object_errors(self.name, self._looked_for):
                async with self._until(by):
                    return _state(await obstore.head_async(self._store, self._path))
        except Undecodable as exc:
            raise ProtocolViolation(str(exc)) from exc

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
            await self.head(by)  # has no text, so that the status is told
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

    @asynccontextmanager
    async def _until(self, by: float) -> AsyncIterator[None]:
        """Raises Again with SourceTimeout at the loop's time `by`."""
        try:
            async with asyncio.timeout_at(by):
                yield
        except TimeoutError as exc:
            raise Again(SourceTimeout(f"{self.name}: the server does not answer")) from exc


def _state(meta: Any) -> State:
    modified = meta["last_modified"]
    return State(meta["size"], meta["e_tag"] or None, None if modified == EPOCH else modified)
