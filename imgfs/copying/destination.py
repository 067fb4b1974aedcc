"""Where a copy goes: a file that gets its name when it is whole, or what is there already.

What a person names is a path, ssh://, an NBD export or s3://.  A file, here or behind ssh, is
written as NAME.part beside its place and renamed.  A block device and an NBD export are written in
place, and what of them is longer than the image stays as it was.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

import trio

from imgfs.errors import NeverDurable
from imgfs.extents import ExtentList, all_data
from imgfs.image import Buffer, Image
from imgfs.sources.base import Source, WritableSource
from imgfs.sources.listing import Listing
from imgfs.sources.local.file import FileSource

Guard = Callable[[], Awaitable[None]]


class Destination(ABC):
    """Open to be written, in any order.  `name` is shown.

    `is_blank`: what is not written reads as zeroes.  `can_resume`: what was made durable stays
    where it is when the copy is interrupted, and `token` tells it from anything else there.
    `is_seen_at_end`: nobody can read it before it is finished.  `part_name`: of the file that stays
    when it is not finished.
    """

    is_blank = False
    can_resume = True
    is_seen_at_end = False
    token = ""
    part_name = ""

    def __init__(self, name: str) -> None:
        self.name = name
        #: returns once it may be changed
        self.guard: Guard | None = None

    async def write(self, offset: int, data: Buffer) -> None:
        """Raises NoSpace, AccessDenied, SourceUnreachable and other ImgfsErrors."""
        if self.guard is not None:
            await self.guard()
        await self._write(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        """The range is to read as zeroes, and to take no space where that can be.  As `write`."""
        if self.guard is not None:
            await self.guard()
        await self._zero(offset, length)

    async def finish(self) -> None:
        """All has been written and flushed: it gets its name, durably.  Raises as `write`."""
        if self.guard is not None:
            await self.guard()
        await self._finish()

    @abstractmethod
    async def flush(self) -> None:
        """What was written is durable.  Raises NotDurable, and as `write`."""

    @abstractmethod
    async def written(self) -> Image:
        """What is there now, to be compared; closed with the destination."""

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of it; what was not finished has no name, and stays to be resumed."""

    @abstractmethod
    async def _write(self, offset: int, data: Buffer) -> None: ...

    @abstractmethod
    async def _zero(self, offset: int, length: int) -> None: ...

    @abstractmethod
    async def _finish(self) -> None: ...


class InPlace(Destination):
    """A block device, or an NBD export."""

    def __init__(self, source: WritableSource) -> None:
        super().__init__(source.url)
        self.source = source
        self._known: ExtentList = all_data(0, source.size)

    async def begin(self) -> None:
        """Before it is written."""
        self._known = await self.source.extents(0, self.source.size)
        await self.source.begin_writing()

    async def _write(self, offset: int, data: Buffer) -> None:
        await self.source.write(offset, data)

    async def _zero(self, offset: int, length: int) -> None:
        # What is zero already need not become so.
        for start, end in self._known.clip(offset, offset + length).data_ranges():
            await self.source.zero(start, end - start)

    async def flush(self) -> None:
        await self.source.flush()

    async def _finish(self) -> None:
        await self.source.pin()

    async def written(self) -> Image:
        await self.source.pin()
        await _forget_pages(self.source)
        return self.source

    async def aclose(self) -> None:
        await self.source.aclose()


class NewFile(Destination):
    """A file in `listing`, which is called NAME.part until it is whole."""

    is_blank = True

    def __init__(self, listing: Listing, file_name: str, source: WritableSource) -> None:
        super().__init__(listing.url + file_name)
        self._listing = listing
        self._file_name = file_name
        self._source = source
        self.token = source.file_token
        self.part_name = part_name(file_name)

    async def _write(self, offset: int, data: Buffer) -> None:
        await self._source.write(offset, data)

    async def _zero(self, offset: int, length: int) -> None:
        await self._source.zero(offset, length)

    async def flush(self) -> None:
        await self._source.flush()

    async def _finish(self) -> None:
        await self._source.pin()
        await self._listing.rename(part_name(self._file_name), self._file_name, replace=True)

    async def written(self) -> Image:
        await self._source.pin()
        await _forget_pages(self._source)
        return self._source

    async def aclose(self) -> None:
        await self._source.aclose()


class SharedFile(NewFile):
    """NAME.part as several processes write it, perhaps on several machines.

    What tells it from any other file of that name, wherever one looks, is its token, which stands
    behind its last byte until it is whole.
    """

    def __init__(
        self, listing: Listing, file_name: str, source: WritableSource, size: int, token: str
    ) -> None:
        super().__init__(listing, file_name, source)
        self._size = size
        self.file_token = self.token
        self.token = token

    async def mark(self) -> None:
        """The first of them: make it so long, and put the token there."""
        await self._source.resize(self._size)
        await self._source.write(self._size, self.token.encode())
        await self._flush_if_it_can()

    async def is_marked(self) -> bool:
        token = self.token.encode()
        if self._source.size != self._size + len(token):
            return False
        return bytes(await self._source.read(self._size, len(token))) == token

    def is_cut(self, file_token: str) -> bool:
        """Is it this file, and whole, but for its name?"""
        return self._source.size == self._size and self.file_token == file_token != ""

    async def _finish(self) -> None:
        await self._source.resize(self._size)
        await self._flush_if_it_can()
        await super()._finish()

    async def _flush_if_it_can(self) -> None:
        with contextlib.suppress(NeverDurable):  # who wrote the data has said so
            await self._source.flush()


async def _forget_pages(source: Source) -> None:
    """What is compared is to come from the disk."""
    if isinstance(source, FileSource):
        async with source.opened() as fd:
            await trio.to_thread.run_sync(
                os.posix_fadvise, fd, 0, 0, os.POSIX_FADV_DONTNEED, abandon_on_cancel=True
            )


def part_name(file_name: str) -> str:
    return f"{file_name}.part"
