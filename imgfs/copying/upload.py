"""A copy to S3: an object is written from its beginning to its end, and is there when it is whole.

Pieces that are ready wait for those before them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from imgfs.copying.destination import Destination
from imgfs.image import Buffer, Image
from imgfs.sources.base import Source
from imgfs.sources.objects.upload import ObjectUpload

ZEROES = bytes(1 << 20)  # at once: an object has no holes


class Upload(Destination):
    """An object that is being uploaded; `read` opens what is there."""

    can_resume = False
    is_seen_at_end = True

    def __init__(
        self, name: str, upload: ObjectUpload, read: Callable[[], Awaitable[Source]]
    ) -> None:
        super().__init__(name)
        self._upload = upload
        self._read = read
        self._source: Source | None = None
        self._at = 0
        self._turns: dict[int, trio.Event] = {}

    async def _write(self, offset: int, data: Buffer) -> None:
        await self._turn(offset)
        await self._upload.write(data)
        self._next(offset + len(data))

    async def _zero(self, offset: int, length: int) -> None:
        await self._turn(offset)
        for at in range(0, length, len(ZEROES)):
            await self._upload.write(memoryview(ZEROES)[: length - at])
        self._next(offset + length)

    async def _turn(self, offset: int) -> None:
        if offset != self._at:
            self._turns[offset] = trio.Event()
            await self._turns[offset].wait()

    def _next(self, offset: int) -> None:
        self._at = offset
        if offset in self._turns:
            self._turns.pop(offset).set()

    async def flush(self) -> None:
        """It is durable when it is finished."""

    async def _finish(self) -> None:
        await self._upload.finish()

    async def written(self) -> Image:
        self._source = self._source or await self._read()
        return self._source

    async def aclose(self) -> None:
        if self._source is not None:
            await self._source.aclose()
