"""Where a copy goes: a file that gets its name when it is whole, or what is there already.

What a person names is a path, ssh://, an NBD export or s3://.  A file, here or behind ssh, is
written as NAME.part beside its place and renamed.  A block device and an NBD export are written in
place, and what of them is longer than the image stays as it was.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from imgfs.config import Options
from imgfs.errors import NotAnImage, SourceNotFound, TooLarge, UsageError
from imgfs.extents import ExtentList, all_data
from imgfs.image import Buffer, Image
from imgfs.opener import Sources, absolute, shown_source
from imgfs.sources.base import Source, WritableSource
from imgfs.sources.file import FileSource
from imgfs.sources.listing import Listing
from imgfs.url import ObjectUrl, SshUrl, parse
from imgfs.url_nbd import NbdCommand, NbdUrl


class Destination(ABC):
    """Open to be written, in any order.  `name` is shown.

    `is_blank`: what is not written reads as zeroes.  `can_resume`: what was made durable stays
    where it is when the copy is interrupted, and `token` tells it from anything else there.
    `is_seen_at_end`: nobody can read it before it is finished.
    """

    is_blank = False
    can_resume = True
    is_seen_at_end = False
    token = ""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    async def write(self, offset: int, data: Buffer) -> None:
        """Raises NoSpace, AccessDenied, SourceUnreachable and other ImgfsErrors."""

    @abstractmethod
    async def zero(self, offset: int, length: int) -> None:
        """The range is to read as zeroes, and to take no space where that can be.  As `write`."""

    @abstractmethod
    async def flush(self) -> None:
        """What was written is durable.  Raises NotDurable, and as `write`."""

    @abstractmethod
    async def finish(self) -> None:
        """All has been written and flushed: it gets its name, durably.  Raises as `write`."""

    @abstractmethod
    async def written(self) -> Image:
        """What is there now, to be compared; closed with the destination."""

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of it; what was not finished has no name, and stays to be resumed."""


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

    async def write(self, offset: int, data: Buffer) -> None:
        await self.source.write(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        # What is zero already need not become so.
        for start, end in self._known.clip(offset, offset + length).data_ranges():
            await self.source.zero(start, end - start)

    async def flush(self) -> None:
        await self.source.flush()

    async def finish(self) -> None:
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

    async def write(self, offset: int, data: Buffer) -> None:
        await self._source.write(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        await self._source.zero(offset, length)

    async def flush(self) -> None:
        await self._source.flush()

    async def finish(self) -> None:
        await self._source.pin()
        await self._listing.rename(part_name(self._file_name), self._file_name, replace=True)

    async def written(self) -> Image:
        await self._source.pin()
        await _forget_pages(self._source)
        return self._source

    async def aclose(self) -> None:
        await self._source.aclose()


async def _forget_pages(source: Source) -> None:
    """What is compared is to come from the disk."""
    if isinstance(source, FileSource):
        await trio.to_thread.run_sync(
            os.posix_fadvise, source.fd, 0, 0, os.POSIX_FADV_DONTNEED, abandon_on_cancel=True
        )


def part_name(file_name: str) -> str:
    return f"{file_name}.part"


class Place:
    """What a person named as a destination, before anything is done to it."""

    def __init__(self, text: str, sources: Sources, options: Options) -> None:
        """Raises UsageError for what can only be read."""
        where = parse(text)
        if isinstance(where, ObjectUrl) and where.scheme != "s3":
            raise UsageError(f"{where.text}: a web server can only be read")
        self._text = absolute(where) if isinstance(where, str) else text
        self.shown = shown_source(text)
        self._where = where
        self._sources = sources
        # What was said of the source's content is not said of this.
        self._options = replace(
            options, write=True, read_only=False, format=None, backing=None, identity=None
        )

    async def open(self, size: int, resumed: str | None) -> tuple[Destination, bool]:
        """To be written with so many bytes; and whether it is what had the token `resumed`.

        Raises TooLarge when they do not fit, and what opening and writing raise.
        """
        if isinstance(self._where, ObjectUrl):
            from imgfs.copying.upload import Upload

            read = partial(self._sources.open, self._text, replace(self._options, write=False))
            upload = await self._sources.upload(self._where, self._options, size)
            return Upload(self.shown, upload, read), False
        device = await self._device()
        if device is None:
            return await self._open_part(size, resumed)
        try:
            if device.size < size:
                raise TooLarge(f"{self.shown}: has {device.size} bytes, and the copy needs {size}")
            found = InPlace(device)
            await found.begin()
        except BaseException:
            with trio.CancelScope(shield=True):
                await device.aclose()
            raise
        return found, resumed == found.token

    async def _device(self) -> WritableSource | None:
        """What is there and is to be written in place; None: a file is to be made."""
        try:
            if isinstance(self._where, str):
                found = await trio.to_thread.run_sync(os.stat, self._text)
                if stat.S_ISREG(found.st_mode):
                    return None
            elif isinstance(self._where, SshUrl):
                source = await self._sources.open(self._text, replace(self._options, write=False))
                await source.aclose()
                if isinstance(source, WritableSource) and source.is_resizable:
                    return None
            return await self._open_writable(self._text)
        except (SourceNotFound, FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            raise UsageError(f"{self.shown}: {exc.strerror}") from exc

    async def _open_part(self, size: int, resumed: str | None) -> tuple[Destination, bool]:
        directory, name = self._split()
        listing = await self._sources.listing(directory)
        assert listing is not None
        part = self._part_text(name)
        if resumed is not None:
            source = await self._open_known(part, size, resumed)
            if source is not None:
                await source.begin_writing()
                return NewFile(listing, name, source), True
        with contextlib.suppress(SourceNotFound):
            await listing.unlink(part_name(name))
        await listing.create(part_name(name))
        source = await self._open_writable(part)
        try:
            await source.begin_writing()
            await source.resize(size)
        except BaseException:
            with trio.CancelScope(shield=True):
                await source.aclose()
            raise
        return NewFile(listing, name, source), False

    async def _open_writable(self, text: str) -> WritableSource:
        source = await self._sources.open(text, self._options)
        assert isinstance(source, WritableSource)
        return source

    async def _open_known(self, text: str, size: int, token: str) -> WritableSource | None:
        """What was written before, if it is that."""
        try:
            source = await self._open_writable(text)
        except (SourceNotFound, NotAnImage):
            return None
        if source.size == size and source.file_token == token:
            return source
        await source.aclose()
        return None

    def _split(self) -> tuple[str, str]:
        """The directory as a source, with a slash at its end, and the file's name."""
        if isinstance(self._where, SshUrl):
            path = self._where.path
            directory = posixpath.dirname(path) or b"."
            url = replace(self._where, path=directory.rstrip(b"/") + b"/")
            return url.text, self._where.basename
        assert not isinstance(self._where, ObjectUrl | NbdUrl | NbdCommand)
        path_ = Path(self._text)
        return f"{str(path_.parent).rstrip('/')}/", path_.name

    def _part_text(self, name: str) -> str:
        if isinstance(self._where, SshUrl):
            path = posixpath.join(posixpath.dirname(self._where.path), os.fsencode(part_name(name)))
            return replace(self._where, path=path).text
        return str(Path(self._text).with_name(part_name(name)))
