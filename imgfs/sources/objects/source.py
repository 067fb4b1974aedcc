"""Images at web servers and in S3, on trio's side of the bridge.

A source is an `ObjectFile`, which lives on the asyncio side (file.py); each call here is one
call over the bridge.  What a URL and the settings become in obstore: store.py.
"""

from __future__ import annotations

from imgfs.sources.base import Source, SourceStat
from imgfs.sources.bridge import Bridge
from imgfs.sources.objects.file import ObjectFile
from imgfs.sources.objects.settings import ObjectSettings
from imgfs.url.source import ObjectUrl


class ObjectSource(Source):
    """An open image behind http, https or s3; all of it is data, as neither knows of holes.

    `read` raises SourceChanged, SourceUnreachable or SourceTimeout (after the settings' timeout;
    it works again when the server is back), AccessDenied, ShortRead, ProtocolViolation.
    """

    def __init__(self, url: ObjectUrl, bridge: Bridge, file: ObjectFile, stat: SourceStat) -> None:
        super().__init__(url.basename, url.text, stat)
        self._bridge = bridge
        self._file = file

    async def check_identity(self) -> None:
        await self._bridge.call(self._file.check)

    async def _read(self, offset: int, length: int) -> bytes:
        return await self._bridge.call(self._file.read, offset, length)


async def open_object(url: ObjectUrl, settings: ObjectSettings, bridge: Bridge) -> ObjectSource:
    """Open an image.  The bridge is its owner's to close, after the source.

    Raises SourceNotFound, NotAnImage, AccessDenied, HostKeyError, UnsupportedFeature for a server
    without ranges, SourceUnreachable, SourceTimeout, ProtocolViolation, UsageError.
    """

    async def work() -> tuple[ObjectFile, SourceStat]:
        file = ObjectFile(url, settings, bridge)
        return file, await file.open()

    file, stat = await bridge.call(work)
    return ObjectSource(url, bridge, file, stat)
