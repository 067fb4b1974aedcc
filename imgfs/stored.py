"""Every source that is open in this process, once, however many images are over it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from imgfs.beside import beside
from imgfs.cache.cached import CachedImage, Policy
from imgfs.config import Options
from imgfs.sources.base import Source
from imgfs.sources.file import FileSource
from imgfs.views.opening import Chain, open_chain
from imgfs.views.raw import RawView


@dataclass(frozen=True, slots=True)
class Wanted:
    """A source as a person names it, and all that was said of it; two that are equal are one.

    `directory` is where a command of it is to run.
    """

    text: str = field(repr=False)
    options: Options
    policy: Policy
    directory: Path | None = None


OpenSource = Callable[[Wanted], Awaitable[Source]]
OpenCache = Callable[[Source, Policy], Awaitable[CachedImage]]


@dataclass(slots=True)
class _Entry:
    lock: trio.Lock = field(default_factory=trio.Lock)
    view: RawView | None = None
    cache: CachedImage | None = None


class StoredViews:
    """Views of sources' own bytes; with `open_cache`, through a cache where that pays."""

    def __init__(self, open_source: OpenSource, open_cache: OpenCache | None = None) -> None:
        self._open_source = open_source
        self._open_cache = open_cache
        self._entries: dict[Wanted, _Entry] = {}
        self._wanted: dict[RawView, Wanted] = {}
        self._sources: list[Source] = []

    async def get(self, wanted: Wanted) -> RawView:
        """The source as it is now, as far as is known: opened, if it is not open or stale.

        Raises what opening raises.
        """
        entry = self._entries.setdefault(wanted, _Entry())
        async with entry.lock:
            if entry.view is None or entry.view.stale is not None:
                source = await self._open_source(wanted)
                self._sources.append(source)
                if entry.cache is not None:
                    await entry.cache.closed.wait()  # it was stale, and has the directory still
                    entry.cache = None
                if self._open_cache is not None and not isinstance(source, FileSource):
                    entry.cache = await self._open_cache(source, wanted.policy)
                entry.view = RawView(source, entry.cache)
                self._wanted[entry.view] = wanted
            return entry.view

    async def chain(self, name: str, stored: RawView, format: str | None) -> Chain:
        """The disk in it, to be called `name`.  Raises as `open_chain` does."""
        return await open_chain(name, stored, self._beside, format)

    async def _beside(self, view: RawView, name: str) -> RawView:
        wanted = self._wanted[view]
        options = wanted.options
        if options.backing is not None and options.backing != "any":
            # What a person said is of this image, not of the next one in the chain.
            return await self.get(
                replace(wanted, text=options.backing, options=replace(options, backing=None))
            )
        text = beside(wanted.text, name, any_place=options.backing == "any")
        return await self.get(replace(wanted, text=text))

    async def aclose(self) -> None:
        """Close them all; their caches must have been closed before."""
        for source in self._sources:
            await source.aclose()
