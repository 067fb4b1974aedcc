"""Images behind ssh: SFTP reads, many in flight, and exact extents from the helper."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncssh

from imgfs.errors import (
    AccessDenied,
    ImgfsError,
    NotAnImage,
    ProtocolViolation,
    ShortRead,
    SourceChanged,
    SourceNotFound,
)
from imgfs.extents import ExtentList, all_data
from imgfs.sources.base import Identity, Source, SourceStat
from imgfs.sources.bridge import Bridge
from imgfs.sources.ssh_link import SshLink
from imgfs.sources.ssh_settings import SshSettings
from imgfs.url import SshUrl

NS = 1_000_000_000
TYPE_DIRECTORY = asyncssh.FILEXFER_TYPE_DIRECTORY


class SshFile:
    """One open file on the server.  All methods run on the bridge's loop."""

    def __init__(self, link: SshLink, url: SshUrl) -> None:
        self._link = link
        self._url = url
        self._file: Any = None
        self._generation = 0
        self._opening = asyncio.Lock()
        self.stat: SourceStat | None = None

    async def open(self) -> SourceStat:
        await self._link.attempt(self._opened)
        assert self.stat is not None
        return self.stat

    async def _opened(self) -> Any:
        """The handle, of the present connection; a file that was opened before must be the same."""
        async with self._opening:
            sftp = await self._link.sftp()
            if self._file is None or self._generation != self._link.generation:
                found = await self._look(sftp)
                if self.stat is not None and found.identity != self.stat.identity:
                    raise SourceChanged(f"{self._url.text}: changed since it was opened")
                self._file = await self._sftp_call(sftp.open(self._url.path, "rb", block_size=0))
                self._generation = self._link.generation
                self.stat = self.stat or found
            return self._file

    async def _look(self, sftp: asyncssh.SFTPClient) -> SourceStat:
        attrs = await self._sftp_call(sftp.stat(self._url.path))
        if attrs.type == TYPE_DIRECTORY:
            raise NotAnImage(f"{self._url.text}: is a directory, not an image")
        identity = Identity("sftp", f"{attrs.size}:{attrs.mtime}")
        mtime_ns = (attrs.mtime or 0) * NS
        exact = await self._link.ask_helper("id", self._url.path) if self._helped else None
        if exact is not None:
            identity = Identity("stat", exact)
            mtime_ns = int(exact.split(":")[3])
        return SourceStat(attrs.size or 0, mtime_ns, (attrs.permissions or 0) & 0o777, identity)

    @property
    def _helped(self) -> bool:
        # A file once identified without the helper is compared without it.
        known = self.stat.identity if self.stat else None
        return self._link.settings.extents and (known is None or known.kind == "stat")

    async def _sftp_call(self, call: Any) -> Any:
        try:
            return await call
        except asyncssh.SFTPNoSuchFile as exc:
            kind = SourceChanged if self.stat else SourceNotFound
            raise kind(f"{self._url.text}: no such file") from exc
        except asyncssh.SFTPPermissionDenied as exc:
            raise AccessDenied(f"{self._url.text}: permission denied") from exc

    async def check(self) -> None:
        async def work() -> None:
            found = await self._look(await self._link.sftp())
            assert self.stat is not None
            if found.identity != self.stat.identity:
                raise SourceChanged(f"{self._url.text}: changed since it was opened")

        await self._link.attempt(work)

    async def extents(self) -> ExtentList | None:
        async def work() -> Any:
            return await self._link.ask_helper("map", self._url.path)

        assert self.stat is not None
        answer = await self._link.attempt(work)
        if answer is None:
            return None
        found: ExtentList
        found, token = answer
        if Identity("stat", token) != self.stat.identity:
            raise SourceChanged(f"{self._url.text}: changed since it was opened")
        return found

    async def read(self, offset: int, length: int) -> bytes:
        async def work() -> bytes:
            file = await self._opened()
            step = self._link.read_size
            pieces = [
                asyncio.ensure_future(self._piece(file, at, min(step, offset + length - at)))
                for at in range(offset, offset + length, step)
            ]
            try:
                parts = await asyncio.gather(*pieces)
            finally:
                for piece in pieces:
                    piece.cancel()
            await self._unchanged()
            return parts[0] if len(parts) == 1 else b"".join(parts)

        result: bytes = await self._link.attempt(work)
        return result

    async def _piece(self, file: Any, offset: int, length: int) -> bytes:
        data = b""
        while len(data) < length:
            async with self._link.slots:
                request = asyncio.ensure_future(file.read(length - len(data), offset + len(data)))
                try:
                    more = await self._link.wait_for_answer(request)
                finally:
                    request.cancel()
            if not more:
                raise ShortRead(f"{self._url.text}: ends at {offset + len(data)}, before its size")
            if len(more) > length - len(data):
                raise ProtocolViolation(f"{self._url.text}: the server sent more than was asked")
            data = data + more if data else more
        return data

    async def _unchanged(self) -> None:
        """What was just read belongs to the file that was opened, as far as SFTP can tell."""
        sftp = await self._link.sftp()
        attrs = await self._sftp_call(sftp.stat(self._url.path))
        assert self.stat is not None
        if (attrs.size, attrs.mtime) != (self.stat.size, self.stat.mtime_ns // NS):
            raise SourceChanged(f"{self._url.text}: changed since it was opened")


class SshSource(Source):
    """An open image behind ssh; trio's side of an SshFile."""

    def __init__(self, url: SshUrl, bridge: Bridge, file: SshFile, stat: SourceStat) -> None:
        super().__init__(url.basename, url.text, stat)
        self._bridge = bridge
        self._file = file
        self._known: ExtentList | None = None

    async def check_identity(self) -> None:
        await self._bridge.call(self._file.check)

    async def _read(self, offset: int, length: int) -> bytes:
        return await self._bridge.call(self._file.read, offset, length)

    async def _extents(self, offset: int, length: int) -> ExtentList:
        if self._known is None:
            identity = self.stat.identity
            found = None
            if self.size and identity is not None and identity.kind == "stat":
                found = await self._bridge.call(self._file.extents)
            self._known = found if found is not None else all_data(0, self.size)
        return self._known.clip(offset, offset + length)


class SshHosts:
    """The connections of a process, one a host; hands out sources."""

    def __init__(self) -> None:
        self._bridge = Bridge()
        self._links: dict[tuple[str | None, str, int | None], SshLink] = {}

    async def open(self, url: SshUrl, settings: SshSettings) -> SshSource:
        """Open an image.  Raises SourceNotFound, NotAnImage, AccessDenied, LoginRefused,
        HostKeyError, SourceUnreachable."""

        async def work() -> SshFile:
            key = (url.user, url.host, url.port)
            if key not in self._links:
                self._links[key] = SshLink(url, settings)
            file = SshFile(self._links[key], url)
            await file.open()
            return file

        file = await self._bridge.call(work)
        if file.stat is None:
            raise ImgfsError(f"{url.text}: was not opened")
        return SshSource(url, self._bridge, file, file.stat)

    async def aclose(self) -> None:
        """Close every connection."""

        async def drop() -> None:
            for link in self._links.values():
                link.drop()

        if self._links:
            await self._bridge.call(drop)
        self._bridge.close()
