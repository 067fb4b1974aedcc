"""Images behind ssh, on trio's side of the bridge.

A source is an `SshFile`, which lives on the asyncio side; each call here is one call over
the bridge.  What happens there: link.py (connections), file.py (reads, identity), write.py,
helper.py (extents, holes).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import trio

from imgfs.errors import SourceUnreachable
from imgfs.extents import ExtentList, all_data
from imgfs.image import Buffer
from imgfs.locks import Lock
from imgfs.sources.base import SourceStat, WritableSource
from imgfs.sources.bridge import Bridge
from imgfs.sources.ssh.file import SshFile
from imgfs.sources.ssh.link import SshLink
from imgfs.sources.ssh.listing import SshListing
from imgfs.sources.ssh.settings import SshSettings
from imgfs.sources.ssh.write import SshWriter
from imgfs.url.source import SshUrl, parse


class SshSource(WritableSource):
    """An open image behind ssh.

    `read` raises SourceChanged, SourceUnreachable or SourceTimeout (after the settings' timeout;
    it works again when the server is back), ShortRead, ProtocolViolation.
    """

    def __init__(
        self,
        url: SshUrl,
        bridge: Bridge,
        file: SshFile,
        stat: SourceStat,
        *,
        write: bool,
        can_punch: bool,
    ) -> None:
        super().__init__(url.basename, url.text, stat)
        self.is_writable = write
        self.can_punch = can_punch
        self.is_resizable = not file.is_device
        self._writer = SshWriter(file)
        self._bridge = bridge
        self._file = file
        self._asking = Lock()
        looked, file.looked = file.looked, None
        self.glimpse = looked.glimpse if looked is not None else None
        self._known = looked.extents if looked is not None else None

    @property
    def round_trip_s(self) -> float:
        return self._file.round_trip_s

    @property
    def file_token(self) -> str:
        return self._file.place[1] or self._file.token_file

    @property
    def is_nameless(self) -> bool:  # type: ignore[override]
        return self._file.is_nameless

    def outlive_name(self) -> None:
        self._file.outlives_name = True

    async def keep(self) -> None:
        await self._bridge.call(self._file.keep)

    async def moved(self, url: str) -> None:
        found = parse(url)
        assert isinstance(found, SshUrl)
        self.url, self.name = url, found.basename

        async def move() -> None:
            self._file.moved(found)

        await self._bridge.call(move)

    async def lost_name(self) -> None:
        async def lose() -> None:
            self._file.lost_name()

        await self._bridge.call(lose)

    @property
    def takes_several(self) -> bool:
        return True

    async def check_identity(self) -> None:
        await self._bridge.call(self._file.check)

    async def begin_writing(self) -> None:
        await self._bridge.call(self._file.begin_writing)

    @property
    def keeps_mtime(self) -> bool:
        return self.is_resizable  # a device's node tells nothing of its bytes

    async def set_mtime(self, mtime_ns: int | None) -> None:
        await self._bridge.call(self._writer.set_mtime, mtime_ns)

    async def pin(self) -> None:
        self.stat = await self._bridge.call(self._file.pin, self.size if self.knows_size else None)
        self.size, self.knows_size = self.stat.size, True

    async def aclose(self) -> None:
        """Give the handle back.  Never waits for the server; not an error when it is gone."""
        with trio.CancelScope(shield=True), contextlib.suppress(SourceUnreachable):
            await self._bridge.call(self._file.close)

    async def _read(self, offset: int, length: int) -> bytes:
        return await self._bridge.call(self._file.read, offset, length)

    async def _peek(self, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        if self.is_writable:
            return None
        return await self._bridge.call(self._file.peek, ranges)

    async def _write(self, offset: int, data: Buffer) -> None:
        self._known = None
        await self._bridge.call(self._writer.write, offset, data)

    async def _zero(self, offset: int, length: int) -> None:
        self._known = None
        await self._bridge.call(self._writer.zero, offset, length)

    async def _resize(self, size: int) -> None:
        self._known = None
        await self._bridge.call(self._writer.resize, size)
        self._file.size = size

    async def _flush(self) -> None:
        await self._bridge.call(self._writer.sync)

    async def _extents(self, offset: int, length: int) -> ExtentList:
        async with self._asking:
            if self._known is None:
                found = await self._bridge.call(self._file.extents)
                self._known = all_data(0, self.size) if found is None else found
        return self._known.clip(offset, offset + length)


class SshHosts:
    """The connections of a process, one for each host and way to reach it; hands out sources."""

    def __init__(self, bridge: Bridge | None = None) -> None:
        """Without a bridge it makes its own; `aclose` closes either."""
        self._bridge = bridge or Bridge()
        self._links: dict[tuple[str | None, str, int | None, SshSettings], SshLink] = {}

    async def open(
        self,
        url: SshUrl,
        settings: SshSettings,
        *,
        write: bool = False,
        among_others: bool = False,
    ) -> SshSource:
        """Open an image, read-only unless `write`; `among_others`: who write it meanwhile.

        Raises SourceNotFound, NotAnImage, AccessDenied, LoginRefused, HostKeyError,
        SourceUnreachable, SourceTimeout, UsageError.  When cancelled nothing is open.
        """

        async def work() -> tuple[SshFile, SourceStat, bool]:
            link = self._link(url, settings)
            file = SshFile(link, url, write=write, among_others=among_others)
            stat = await file.open()
            return file, stat, write and await SshWriter(file).can_punch()

        file, stat, can_punch = await self._bridge.call(work)
        return SshSource(url, self._bridge, file, stat, write=write, can_punch=can_punch)

    async def list(self, url: SshUrl, settings: SshSettings) -> SshListing:
        """A directory, which is asked nothing yet.  Raises UsageError."""

        async def work() -> SshListing:
            return SshListing(url, self._bridge, self._link(url, settings))

        return await self._bridge.call(work)

    def _link(self, url: SshUrl, settings: SshSettings) -> SshLink:
        key = (url.user, url.host, url.port, settings)
        if key not in self._links:
            self._links[key] = SshLink(url, settings)
        return self._links[key]

    async def aclose(self) -> None:
        """End every connection; reads that still run get SourceUnreachable."""

        async def drop() -> None:
            for link in self._links.values():
                await link.close()

        with trio.CancelScope(shield=True):
            if self._links:
                await self._bridge.call(drop)
            await self._bridge.aclose()
