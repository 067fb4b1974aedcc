"""Writing an object to S3, in parts (CreateMultipartUpload, UploadPart, CompleteMultipartUpload).

obstore sends several parts at once, and tries a part again: it is the same part.  An upload that is
not finished leaves no object; its parts stay at the server until a rule of the bucket's lifecycle
(AbortIncompleteMultipartUpload) removes them.
"""

from __future__ import annotations

from typing import Any

import obstore

from imgfs.errors import ImgfsError, ProtocolViolation, TooLarge, again
from imgfs.image import Buffer
from imgfs.sources.bridge import Bridge
from imgfs.sources.objects.errors import Again, Mismatch, NoSuchRange
from imgfs.sources.objects.s3_errors import Undecodable, object_errors
from imgfs.sources.objects.settings import ObjectSettings
from imgfs.sources.objects.store import looked_for, make_store
from imgfs.url.source import ObjectUrl

MOST_PARTS = 10_000
LEAST_PART = 8 << 20
IN_MEMORY = 32 << 20  # of parts that are on their way
MOST_BYTES = 5 << 40


class ObjectUpload:
    """An object that is written from its beginning; all of it by one task at a time."""

    def __init__(self, url: ObjectUrl, settings: ObjectSettings, bridge: Bridge, size: int) -> None:
        """Raises TooLarge, UsageError."""
        if size > MOST_BYTES:
            raise TooLarge(f"{url.text}: an object in S3 has {MOST_BYTES} bytes at most")
        part = max(LEAST_PART, -(-size // MOST_PARTS))
        self._name = url.text
        self._bridge = bridge
        self._looked_for = looked_for(settings)
        store, path = make_store(url, settings, written=part)
        self._writer: Any = obstore.open_writer_async(
            store, path, buffer_size=part, max_concurrency=max(1, IN_MEMORY // part)
        )

    async def write(self, data: Buffer) -> None:
        """What comes next; it may be on its way still.  Raises AccessDenied, SourceUnreachable,
        SourceNotFound for a bucket that is not there, and other ImgfsErrors, for earlier parts,
        too."""
        await self._bridge.call(self._run, self._writer.write, data)

    async def finish(self) -> None:
        """All is there.  Raises as `write` does."""
        await self._bridge.call(self._run, self._writer.close)

    async def _run(self, work: Any, *args: Any) -> None:
        try:
            with object_errors(self._name, self._looked_for):
                await work(*args)
        except Again as exc:
            raise again(exc.error) from exc
        except (Mismatch, NoSuchRange, Undecodable) as exc:
            raise ProtocolViolation(f"{self._name}: the server's answer makes no sense") from exc
        except OSError as exc:
            raise ImgfsError(f"{self._name}: {exc}") from exc
