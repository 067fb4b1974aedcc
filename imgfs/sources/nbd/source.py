"""Images behind NBD: an export of a server, or of one that imgfs starts.

What happens where: link (the connections of an export, reconnecting), connection (libnbd and trio),
requests (what is a good reply), extents (block status), command (starting a server).
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path

import trio

from imgfs.errors import ImgfsError, UnsupportedFeature
from imgfs.extents import ExtentList, all_data
from imgfs.image import Buffer
from imgfs.sources.base import Identity, SourceStat, WritableSource
from imgfs.sources.nbd.command import Command
from imgfs.sources.nbd.errors import library
from imgfs.sources.nbd.extents import NbdExtents
from imgfs.sources.nbd.link import NbdLink
from imgfs.sources.nbd.settings import NbdSettings
from imgfs.sources.nbd.write import NbdWriter
from imgfs.url.nbd import NbdCommand, NbdUrl


class NbdSource(WritableSource):
    """An open export.

    `read` raises SourceChanged, SourceUnreachable or SourceTimeout (after the settings' timeout),
    AccessDenied, ProtocolViolation, and ImgfsError for what the server cannot read.  Without a pin
    a lost connection is a change, because NBD has no identity: see link.py.
    """

    def __init__(
        self,
        name: str,
        url: str,
        link: NbdLink,
        settings: NbdSettings,
        command: Command | None = None,
        marks: str = "",
    ) -> None:
        """For `open_nbd` and `open_command` only; the link is open.

        `marks` tells it from other sources with the same URL.
        """
        facts, pin = link.facts, settings.pin
        identity = None if pin is None else Identity("pin", f"{facts.size}:{marks}{pin}")
        mode = 0o600 if settings.write else 0o400
        super().__init__(name, url, SourceStat(facts.size, time.time_ns(), mode, identity))
        self.is_writable = settings.write
        self.is_resizable = False
        self.can_punch = facts.can_zero
        self._link = link
        self._writer = NbdWriter(link, url)
        self._command = command
        self._map = NbdExtents(
            url, facts.size, facts.minimum, facts.most, settings.timeout_s, link.status
        )

    @property
    def takes_several(self) -> bool:
        return self._link.facts.multi_conn

    async def check_identity(self) -> None:
        """Of a connection that lives it asks nothing: only the lack of one tells something."""
        await self._link.check()

    async def begin_writing(self) -> None:
        await self.check_identity()

    async def pin(self) -> None:
        """There is nothing that a write changes: only the connection tells which image it is."""
        self.stat = replace(self.stat, mtime_ns=time.time_ns())

    async def aclose(self) -> None:
        """End the connections, and the server that was started for them: two seconds at most."""
        self._link.end()
        if self._command is not None:
            await self._command.aclose()

    async def _read(self, offset: int, length: int) -> memoryview:
        return await self._link.read(offset, length)

    async def _write(self, offset: int, data: Buffer) -> None:
        await self._writer.write(offset, data)
        self._map.forget()

    async def _zero(self, offset: int, length: int) -> None:
        await self._writer.zero(offset, length)
        self._map.forget()

    async def _resize(self, size: int) -> None:
        raise UnsupportedFeature(f"{self.url}: NBD cannot change an export's size")

    async def _flush(self) -> None:
        await self._writer.flush()

    async def _extents(self, offset: int, length: int) -> ExtentList:
        if not self._link.facts.has_extents:
            return all_data(offset, offset + length)
        return await self._map.of(offset, offset + length)


async def open_nbd(url: NbdUrl, settings: NbdSettings, nursery: trio.Nursery) -> NbdSource:
    """Open an export; the tasks of its connections run in `nursery` until it is closed.

    Raises SourceNotFound, AccessDenied, SourceUnreachable, SourceTimeout, ProtocolViolation,
    UnsupportedFeature (also when libnbd is not installed).  When cancelled nothing is open.
    """
    library()

    async def dial() -> NbdUrl:
        return url

    link = NbdLink(url.text, dial, settings, nursery)
    try:
        await link.open()
    except BaseException:
        link.end()
        raise
    return NbdSource(url.basename, url.text, link, settings)


async def open_command(
    command: NbdCommand, directory: Path, settings: NbdSettings, nursery: trio.Nursery
) -> NbdSource:
    """Start a server in `directory` and open its default export.

    The server ends with the source, or with this process.  Raises what `open_nbd` raises, and
    UsageError when it ends by itself before that.
    """
    library()
    server = Command(command, directory, nursery)
    link = NbdLink(command.name, server.running, settings, nursery)
    try:
        try:
            await link.open()
        except ImgfsError as exc:
            await server.explain(exc)
            raise
        # The URL has no arguments, but what is kept of one command must not be another's.
        told = os.fsencode(f"{directory}\0{command.text}")
        marks = hashlib.sha256(told).hexdigest()[:16] + ":"
        return NbdSource(command.basename, command.name, link, settings, server, marks)
    except BaseException:
        link.end()
        await server.aclose()
        raise
