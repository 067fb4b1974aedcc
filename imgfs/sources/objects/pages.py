"""What is in s3://bucket/prefix/, a page at a time.

obstore has a listing with a delimiter only as one answer with all of it, and one by pages without.
So this walks the pages, shows what is deeper as a directory once, and where a page ends
inside of one goes on behind it: never more than a page is held, and a page is one request.

S3 lists keys in the order of their UTF-8 (ListObjectsV2, "Sort order of returned objects");
SeaweedFS in that of their parts.  A listing that keeps to neither could go in circles: an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import obstore

from imgfs.errors import ProtocolViolation, SourceTimeout, UsageError, again
from imgfs.sources.bridge import Bridge
from imgfs.sources.objects.errors import Again, Mismatch, NoSuchRange
from imgfs.sources.objects.s3_errors import Undecodable, object_errors
from imgfs.sources.objects.settings import ObjectSettings
from imgfs.sources.objects.store import looked_for, make_store
from imgfs.url.source import ObjectUrl

PAGE = 1000  # the most that S3 gives at once
BEHIND = "\U0010ffff"  # after all that a name may begin with


@dataclass(frozen=True, slots=True)
class Entry:
    """An object, or a common prefix; `name` has no slash.  `size` in bytes."""

    name: str
    is_directory: bool
    size: int = 0
    mtime_ns: int = 0
    etag: str | None = None


async def list_objects(
    url: ObjectUrl, settings: ObjectSettings, bridge: Bridge
) -> AsyncIterator[list[Entry]]:
    """The entries directly under a prefix, in pages of up to a thousand; a page may be empty.

    A name that is an object and a prefix as well comes twice.  Raises what opening raises, and
    ProtocolViolation when the listing makes no progress.  To be closed if not read to its end.
    """
    if url.scheme != "s3":
        raise UsageError(f"{url.text}: only s3:// can be listed")
    walk = _Walk(url, settings)
    while not walk.ended:
        yield await bridge.call(walk.next_page)


class _Walk:
    """Where a listing is.  Runs on the bridge's loop."""

    def __init__(self, url: ObjectUrl, settings: ObjectSettings) -> None:
        self.ended = False
        self._name = url.text
        self._settings = settings
        self._looked_for = looked_for(settings)
        self._store, path = make_store(url, settings)
        self._prefix = path.rstrip("/")
        self._start = f"{self._prefix}/" if self._prefix else ""
        self._after: str | None = None
        self._inside = ""  # the directory that was shown last
        self._by_bytes = self._by_parts = True

    async def next_page(self) -> list[Entry]:
        metas = await self._ask()
        entries: list[Entry] = []
        for meta in metas:
            key: str = meta["path"]
            if not key.startswith(self._start) or key == self._start:
                continue  # the prefix's own marker
            name, slash, _ = key[len(self._start) :].partition("/")
            if not slash:
                mtime_ns = int(meta["last_modified"].timestamp() * 1e9)
                entries.append(Entry(name, False, meta["size"], mtime_ns, meta["e_tag"]))
            elif name != self._inside:
                self._inside = name
                entries.append(Entry(name, True))
        # obstore fills a page up, whatever the server's pages are.
        self.ended = len(metas) < PAGE
        if not self.ended:
            self._go_on_after(metas[-1]["path"])
        return entries

    def _go_on_after(self, key: str) -> None:
        name, slash, _ = key.removeprefix(self._start).partition("/")
        after = f"{self._start}{name}/{BEHIND}" if slash else key
        if self._after is not None:
            self._by_bytes &= self._after.encode() < after.encode()
            self._by_parts &= self._after.split("/") < after.split("/")
            if not (self._by_bytes or self._by_parts):
                raise ProtocolViolation(f"{self._name}: the server's listing makes no progress")
        self._after = after

    async def _ask(self) -> list[Any]:
        """The keys after the last one, a page of them at most."""
        patience = self._settings.timeout_s
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + patience, 0.1
        while True:
            try:
                with object_errors(self._name, self._looked_for):
                    async with asyncio.timeout_at(deadline):
                        stream = obstore.list(
                            self._store, self._prefix, offset=self._after, chunk_size=PAGE
                        )
                        try:
                            return list(await anext(stream))
                        except StopAsyncIteration:
                            return []
            except TimeoutError as exc:
                raise SourceTimeout(f"{self._name}: the server does not answer") from exc
            except (Mismatch, NoSuchRange, Undecodable) as exc:
                raise ProtocolViolation(
                    f"{self._name}: the server's answer makes no sense"
                ) from exc
            except Again as exc:
                failure = exc.error
                if (
                    loop.time() >= deadline
                    or not exc.answered
                    or isinstance(failure, SourceTimeout)
                ):
                    raise again(failure) from exc
            await asyncio.sleep(min(pause, max(0.0, deadline - loop.time())))
            pause *= 2
