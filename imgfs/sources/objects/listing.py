"""s3://bucket/prefix/ as a directory of images."""

from __future__ import annotations

import dataclasses
import time

from imgfs.sources.bridge import Bridge
from imgfs.sources.listing import Listed, Listing
from imgfs.sources.objects.pages import list_objects
from imgfs.sources.objects.settings import ObjectSettings
from imgfs.url.source import ObjectUrl

AGE_S = 10.0  # nothing says that a prefix has changed but listing it again


class ObjectListing(Listing):
    """The objects directly under a prefix; what looks like a directory is left out."""

    def __init__(self, url: ObjectUrl, settings: ObjectSettings, bridge: Bridge) -> None:
        super().__init__(url.text)
        self._where = url
        self._settings = settings
        self._bridge = bridge
        self._listed = 0.0

    async def files(self) -> list[Listed]:
        found = []
        self._listed = time.monotonic()
        async for page in list_objects(self._where, self._settings, self._bridge):
            for entry in page:
                if not entry.is_directory and entry.name:
                    url = dataclasses.replace(self._where, path=self._where.path + entry.name)
                    found.append(Listed(entry.name, url.text, entry.mtime_ns))
        return found

    async def token(self) -> str | None:
        if time.monotonic() - self._listed > AGE_S:
            return None
        return str(self._listed)
