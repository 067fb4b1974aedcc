"""A directory behind ssh, as SFTP lists it."""

from __future__ import annotations

import dataclasses
import os
import stat
import time
from typing import Any

import asyncssh

from imgfs.sources.bridge import Bridge
from imgfs.sources.listing import Listed, Listing
from imgfs.sources.ssh_errors import file_errors
from imgfs.sources.ssh_link import Session, SshLink
from imgfs.url import SshUrl

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

        return await self._bridge.call(self._link.run, work)

    async def token(self) -> str | None:
        async def work(session: Session) -> Any:
            with file_errors(self.url):
                return await self._link.request(lambda: session.sftp.stat(self._path))

        found = await self._bridge.call(self._link.run, work)
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
