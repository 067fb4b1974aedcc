"""A directory behind ssh, as SFTP lists it."""

from __future__ import annotations

import dataclasses
import os
import stat
import time
from collections.abc import Awaitable, Callable
from typing import Any

import asyncssh

from imgfs.errors import AlreadyThere, ImgfsError
from imgfs.sources.bridge import Bridge
from imgfs.sources.listing import Listed, Listing
from imgfs.sources.ssh.errors import file_errors
from imgfs.sources.ssh.link import Session, SshLink
from imgfs.url.source import SshUrl

NS = 1_000_000_000
SETTLED_S = 2  # SFTP has whole seconds: a directory may change twice in one


class SshListing(Listing):
    """`url` ends with a slash."""

    def __init__(self, url: SshUrl, bridge: Bridge, link: SshLink) -> None:
        super().__init__(url.text)
        self._where = url
        self._bridge = bridge
        self._link = link
        self._path = url.path.rstrip(b"/") or b"/"

    async def files(self) -> list[Listed]:
        async def work(session: Session) -> list[Listed]:
            with file_errors(self.url):
                names = await self._link.request(lambda: session.sftp.readdir(self._path))
                return [
                    listed
                    for name in names
                    if (listed := await self._listed(session, name)) is not None
                ]

        return await self._bridge.call(self._link.run, work, self.url)

    is_writable = True

    async def create(self, name: str) -> None:
        async def work(sftp: Any, path: bytes) -> None:
            file = await sftp.open(path, "xb", block_size=0)
            await file.close()

        try:
            await self._change(name, work)
        except ImgfsError as exc:
            # SFTP 3 has no word for it.
            if type(exc) is ImgfsError and name in {file.name for file in await self.files()}:
                raise AlreadyThere(f"{self.url}{name}: is there already") from exc
            raise

    async def unlink(self, name: str) -> None:
        await self._change(name, lambda sftp, path: sftp.remove(path))

    async def rename(self, name: str, new_name: str, *, replace: bool) -> None:
        new = self._path_of(new_name)
        if not replace and new_name in {file.name for file in await self.files()}:
            raise AlreadyThere(f"{self.url}{new_name}: is there already")

        def work(sftp: Any, path: bytes) -> Awaitable[None]:
            rename = sftp.posix_rename if replace else sftp.rename
            renaming: Awaitable[None] = rename(path, new)
            return renaming

        await self._change(name, work)

    def url_of(self, name: str) -> str:
        return dataclasses.replace(self._where, path=self._path_of(name)).text

    def _path_of(self, name: str) -> bytes:
        return self._path.rstrip(b"/") + b"/" + os.fsencode(name)

    async def _change(self, name: str, change: Callable[[Any, bytes], Awaitable[None]]) -> None:
        async def work(session: Session) -> None:
            with file_errors(f"{self.url}{name}"):
                await self._link.request(lambda: change(session.sftp, self._path_of(name)))

        await self._bridge.call(self._link.run, work, self.url)

    async def token(self) -> str | None:
        async def work(session: Session) -> Any:
            with file_errors(self.url):
                return await self._link.request(lambda: session.sftp.stat(self._path))

        found = await self._bridge.call(self._link.run, work, self.url)
        if not found.mtime or time.time() - found.mtime < SETTLED_S:
            return None
        return f"{found.mtime}:{found.size}"

    async def _listed(self, session: Session, entry: Any) -> Listed | None:
        """The entry when it is a file, or a link to one."""
        name: bytes = entry.filename
        attrs = entry.attrs
        path = self._path.rstrip(b"/") + b"/" + name
        if attrs.permissions is not None and stat.S_ISLNK(attrs.permissions):
            try:
                attrs = await self._link.request(lambda: session.sftp.stat(path))
            except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPPermissionDenied, asyncssh.SFTPFailure):
                return None  # leads nowhere
        kind = stat.S_IFMT(attrs.permissions or 0)
        if kind not in (stat.S_IFREG, stat.S_IFBLK):
            return None
        url = dataclasses.replace(self._where, path=path)
        return Listed(os.fsdecode(name), url.text, (attrs.mtime or 0) * NS)
