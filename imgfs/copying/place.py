"""Where a person wants a copy to be, and how it is opened there.

Several processes write one image, each its own ranges, where a file of that name is the same for
all of them, or an export is: `begin_shared` is called by the first, `join` by all.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from imgfs.config.options import Options
from imgfs.copying.destination import Destination, Guard, InPlace, NewFile, SharedFile, part_name
from imgfs.errors import NotAnImage, SourceChanged, SourceNotFound, TooLarge, UsageError
from imgfs.opener.sources import Sources
from imgfs.sources.base import WritableSource
from imgfs.sources.listing import Listing
from imgfs.url.nbd import NbdCommand, NbdUrl
from imgfs.url.shown import absolute, shown_source
from imgfs.url.source import ObjectUrl, SshUrl, parse


@dataclass(frozen=True, slots=True)
class Shared:
    """What several processes are to write; `file_token` tells a file from others where it is."""

    destination: Destination
    token: str
    file_token: str
    is_known: bool


@contextlib.asynccontextmanager
async def _closed_on_error(opened: Destination | WritableSource) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        with trio.CancelScope(shield=True):
            await opened.aclose()
        raise


class Place:
    """What a person named as a destination, before anything is done to it."""

    def __init__(
        self,
        text: str,
        sources: Sources,
        options: Options,
        guard: Guard | None = None,
        *,
        among_others: bool = False,
    ) -> None:
        """`guard` is asked before each change; `among_others`: who write there meanwhile.

        Raises UsageError for what can only be read.
        """
        where = parse(text)
        if isinstance(where, ObjectUrl) and where.scheme != "s3":
            raise UsageError(f"{where.text}: a web server can only be read")
        self._text = absolute(where) if isinstance(where, str) else text
        self.shown = shown_source(text)
        self._where = where
        self._sources = sources
        self._guard = guard
        # What was said of the source's content is not said of this.
        self._options = replace(
            options,
            write=True,
            read_only=False,
            format=None,
            backing=None,
            identity=None,
            among_others=among_others,
        )

    async def open(self, size: int, resumed: str | None) -> tuple[Destination, bool]:
        """To be written with so many bytes; and whether it is what had the token `resumed`.

        Raises TooLarge when they do not fit, and what opening and writing raise.
        """
        found, is_known = await self._open(size, resumed)
        found.guard = self._guard
        return found, is_known

    async def _open(self, size: int, resumed: str | None) -> tuple[Destination, bool]:
        if isinstance(self._where, ObjectUrl):
            from imgfs.copying.upload import Upload

            read = partial(self._sources.open, self._text, replace(self._options, write=False))
            upload = await self._sources.upload(self._where, self._options, size)
            return Upload(self.shown, upload, read), False
        device = await self._device()
        if device is None:
            return await self._open_part(size, resumed)
        found = await self._in_place(device, size)
        return found, resumed == found.token

    async def begin_shared(self, size: int, token: str, resumed: str | None) -> Shared | None:
        """As `open`, to be written by several processes, each of which calls `join`.

        A file gets `token`, or had `resumed`.  None: one alone can write there.
        """
        if isinstance(self._where, ObjectUrl | NbdCommand):
            return None
        if isinstance(self._where, NbdUrl) and self._where.transport != "tcp":
            return None
        device = await self._device()
        if device is not None:
            if not device.takes_several:
                await device.aclose()
                return None
            found = await self._in_place(device, size)
            return Shared(found, found.token, "", resumed == found.token)
        if resumed is not None:
            known = await self._shared_part(size, resumed)
            if known is not None:
                async with _closed_on_error(known):
                    if await known.is_marked():
                        return Shared(known, resumed, known.file_token, True)
                await known.aclose()
        source = await self._make_part()
        part = SharedFile(*await self._listed(), source, size, token)
        async with _closed_on_error(part):
            await source.begin_writing()
            await part.mark()
        return Shared(part, token, part.file_token, False)

    async def join(self, size: int, token: str, file_token: str = "") -> Destination:
        """What `begin_shared` made.  Raises SourceNotFound, or SourceChanged for another file.

        With `file_token` it may be whole, but for its name.
        """
        found = await self._join(size, token, file_token)
        found.guard = self._guard
        return found

    async def _join(self, size: int, token: str, file_token: str) -> Destination:
        device = await self._device()
        if device is not None:
            return await self._in_place(device, size)
        part = await self._shared_part(size, token)
        shown = f"{self.shown}.part"
        if part is None:
            raise SourceNotFound(f"{shown}: no such file; do all workers see that directory?")
        async with _closed_on_error(part):
            if not await part.is_marked() and not part.is_cut(file_token):
                raise SourceChanged(f"{shown}: is not the file that the others write")
        return part

    async def is_finished(self, size: int, file_token: str) -> bool:
        """Has the file with this token its name already?"""
        try:
            source = await self._sources.open(self._text, self._options)
        except SourceNotFound:
            return False
        try:
            assert isinstance(source, WritableSource)
            return source.size == size and source.file_token == file_token != ""
        finally:
            await source.aclose()

    async def _in_place(self, device: WritableSource, size: int) -> InPlace:
        async with _closed_on_error(device):
            if device.size < size:
                raise TooLarge(f"{self.shown}: has {device.size} bytes, and the copy needs {size}")
            found = InPlace(device)
            await found.begin()
        return found

    async def _shared_part(self, size: int, token: str) -> SharedFile | None:
        listing, name = await self._listed()
        try:
            source = await self._open_writable(self._part_text(name))
        except (SourceNotFound, NotAnImage):
            return None
        part = SharedFile(listing, name, source, size, token)
        async with _closed_on_error(part):
            await source.begin_writing()
        return part

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
        listing, name = await self._listed()
        if resumed is not None:
            source = await self._open_known(self._part_text(name), size, resumed)
            if source is not None:
                await source.begin_writing()
                return NewFile(listing, name, source), True
        source = await self._make_part()
        part = NewFile(listing, name, source)
        async with _closed_on_error(part):
            await source.begin_writing()
            await source.resize(size)
        return part, False

    async def _listed(self) -> tuple[Listing, str]:
        directory, name = self._split()
        listing = await self._sources.listing(directory)
        assert listing is not None
        return listing, name

    async def _make_part(self) -> WritableSource:
        """NAME.part, new and empty."""
        if self._guard is not None:
            await self._guard()
        listing, name = await self._listed()
        with contextlib.suppress(SourceNotFound):
            await listing.unlink(part_name(name))
        try:
            await listing.create(part_name(name))
        except SourceNotFound as exc:
            raise SourceNotFound(f"{listing.url}: no such directory") from exc
        return await self._open_writable(self._part_text(name))

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
