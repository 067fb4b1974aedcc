"""The disks in sources, for as long as a block runs: for commands and programs, without a mount."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from imgfs.cache.cached import Policy
from imgfs.config.options import Options
from imgfs.errors import sole
from imgfs.opener.sources import Sources
from imgfs.opener.stored import StoredViews, Wanted
from imgfs.overlays.records import SnapshotPath
from imgfs.overlays.store import SnapshotStore
from imgfs.sources.base import Source
from imgfs.url.shown import absolute, shown_source
from imgfs.url.source import parse
from imgfs.views.opening import Chain
from imgfs.views.overlay import OverlayView


class Opened:
    """Disks of one process that share its connections; each can be closed before the others."""

    def __init__(self, sources: Sources) -> None:
        """For `opening` only."""
        self.sources = sources

    @asynccontextmanager
    async def disk(
        self, text: str, options: Options, directory: Path | None = None
    ) -> AsyncIterator[tuple[str, Chain]]:
        """The disk in a source, for as long as the block runs, and the source as it is shown.

        `directory` is where a command of it is to run.
        """
        where = parse(text)
        text = absolute(where) if isinstance(where, str) else text

        async def open_source(wanted: Wanted) -> Source:
            return await self.sources.open(wanted.text, wanted.options, wanted.directory)

        stored = StoredViews(open_source, self.sources.open_by_qemu)
        try:
            view = await stored.get(Wanted(text, options, Policy(), directory))
            yield shown_source(text), await stored.chain(view.name, view, options.format)
        finally:
            with trio.CancelScope(shield=True):
                await stored.aclose()


@asynccontextmanager
async def opening(options: Options) -> AsyncIterator[Opened]:
    """What opens disks, for as long as the block runs.  What happens in it is raised as it is."""
    try:
        async with trio.open_nursery() as nursery:
            sources = Sources(options, nursery)
            try:
                yield Opened(sources)
            finally:
                with trio.CancelScope(shield=True):
                    await sources.aclose()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise sole(group) from None


@asynccontextmanager
async def open_disk(text: str, options: Options) -> AsyncIterator[tuple[str, Chain]]:
    """One disk, as `Opened.disk` gives it."""
    async with opening(options) as opened, opened.disk(text, options) as found:
        yield found


@asynccontextmanager
async def open_snapshot(
    path: SnapshotPath, url: str, chain: Chain, *, check: bool = True, writable: bool = False
) -> AsyncIterator[OverlayView]:
    """The disk of a snapshot of what `open_disk` gave; nobody writes it meanwhile, and with
    `writable` nobody reads it either.

    Raises SnapshotNotFound, CorruptSnapshot, Busy when somebody does, OSError; with `check`
    SourceChanged, too, when it is over another base.
    """
    store = SnapshotStore(url)
    if check:
        await trio.to_thread.run_sync(store.check_base, chain.base(url))
    layers = await trio.to_thread.run_sync(partial(store.open_layers, path, writable=writable))
    disk = OverlayView("/".join(path), layers[0].size, layers, chain.disk)
    try:
        yield disk
    finally:
        with trio.CancelScope(shield=True):
            await disk.aclose()
