"""Every source that is open in this process, once, however many images are over it."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import trio

from imgfs.cache.cached import CachedImage, Policy
from imgfs.config.options import Options
from imgfs.errors import (
    CorruptImage,
    ImgfsError,
    NeverDurable,
    SourceChanged,
    SourceNotFound,
    UsageError,
)
from imgfs.formats.probe import RAW, probe
from imgfs.formats.served import Node
from imgfs.locks import Lock
from imgfs.overlays.rawpins import is_pinned_raw, pin_raw, unpin_raw
from imgfs.sources.base import Source, WritableSource
from imgfs.sources.local.file import FileSource
from imgfs.status.durable import Unsaved
from imgfs.url.beside import beside
from imgfs.views.drive import drive, run_on
from imgfs.views.opening import Asked, Chain, open_chain
from imgfs.views.raw import RawView
from imgfs.views.through import StoredView, ThroughView
from imgfs.views.view import View

log = logging.getLogger(__name__)


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
#: Has qemu open a node, and gives its disk.
OpenByQemu = Callable[[Node, Options], Awaitable[Source]]
MakeView = Callable[[Source, CachedImage | None, Policy], StoredView]
OpenCache = Callable[[Source, Policy], Awaitable[CachedImage]]
#: Does the work some time soon, whatever becomes of the caller.
Soon = Callable[[Callable[[], Awaitable[None]]], object]


@dataclass(slots=True)
class _Entry:
    lock: Lock = field(default_factory=Lock)
    view: StoredView | None = None


class StoredViews:
    """Views of sources' own bytes; with `open_cache`, through a cache where that pays.

    A source that turned out to have changed is closed at once, by `soon`.  One that no image needs
    any more is closed by `close_unused`.
    """

    def __init__(
        self,
        open_source: OpenSource,
        open_by_qemu: OpenByQemu,
        open_cache: OpenCache | None = None,
        make_view: MakeView = lambda source, cache, policy: RawView(source, cache),
        soon: Soon = lambda work: None,
    ) -> None:
        self._soon = soon
        self._make_view = make_view
        self._open_source = open_source
        self._open_by_qemu = open_by_qemu
        self._open_cache = open_cache
        self._entries: dict[Wanted, _Entry] = {}
        self._wanted: dict[StoredView, Wanted] = {}
        self._served: list[RawView] = []
        self._nameless: list[ThroughView] = []
        self._written: dict[str, ThroughView] = {}  # by their files' tokens
        self._in_chains: Counter[StoredView] = Counter()  # that are being put together

    async def get(self, wanted: Wanted) -> StoredView:
        """The source as it is now, as far as is known: opened, if it is not open or stale.

        Raises what opening raises.
        """
        entry = self._entries.setdefault(wanted, _Entry())
        async with entry.lock:
            if entry.view is not None and entry.view.is_nameless:
                self._let_go(entry)
            if entry.view is None or entry.view.stale is not None:
                entry.view = await self._opened(wanted, entry.view)
                self._wanted[entry.view] = wanted
                if isinstance(entry.view, ThroughView) and entry.view.source.file_token:
                    self._written[entry.view.source.file_token] = entry.view
                entry.view.when_stale(partial(self._discard_stale, entry.view))
            return entry.view

    async def _opened(self, wanted: Wanted, old: StoredView | None) -> StoredView:
        source = await self._open_source(wanted)
        try:
            known = await self._renamed(source)
            if known is not None:
                await source.aclose()
                return known
            if old is not None and old.cache is not None:
                await old.cache.closed.wait()  # it was stale, and has the directory yet
            cache = None
            if self._open_cache is not None and not isinstance(source, FileSource):
                cache = await self._open_cache(source, wanted.policy)
            return self._make_view(source, cache, wanted.policy)
        except BaseException:
            with trio.CancelScope(shield=True):
                await source.aclose()
            raise

    def _discard_stale(self, view: StoredView, why: SourceChanged) -> None:
        self._soon(partial(self._discard, view))

    async def _discard(self, view: StoredView) -> None:
        """Close what is below a view that nobody reads any more.  Raises nothing."""
        if view in self._served:
            self._served.remove(view)
        elif self._wanted.pop(view, None) is None:
            return
        view.forget_hooks()
        with trio.CancelScope(shield=True):
            if view.cache is not None:
                await view.cache.closed.wait()
            try:
                await view.source.aclose()
            except ImgfsError as exc:
                log.info("%s: while it was closed: %s", view.name, exc)

    async def close_unused(self, used: Collection[View]) -> None:
        """Close all that is open and neither used nor about to be.

        `used` are the files of the images' disks, and the views in their layers.
        """
        closed: list[StoredView] = []
        for wanted, entry in list(self._entries.items()):
            view = entry.view
            if entry.lock.is_held or view in used or view in self._in_chains:
                continue
            if isinstance(view, ThroughView) and view.writers:
                continue
            if isinstance(view, ThroughView) and view.stale is None and not view.is_durable:
                self._soon(partial(self._sync, view))  # the next time
                continue
            del self._entries[wanted]
            if view is not None and view.stale is None:
                closed.append(view)
        if not self._in_chains:
            closed += [view for view in self._served if view not in used]
        for view in closed:
            if view.cache is not None:
                view.cache.retire()
            await self._discard(view)

    @staticmethod
    async def _sync(view: ThroughView) -> None:
        """Make durable what nobody has open any more; what fails is told at the end, too."""
        with contextlib.suppress(ImgfsError):
            await view.sync()

    async def _renamed(self, source: Source) -> ThroughView | None:
        """The view of this very file, if it was opened by a name that it has not any more."""
        if not isinstance(source, WritableSource) or not source.is_writable:
            return None
        view = self._written.get(source.file_token)
        if view is None or view.stale is not None or view not in self._wanted:
            return None
        with contextlib.suppress(ImgfsError):
            await view.check()
            if view.is_nameless:
                await view.source.moved(source.url)
                self._forget(view)
                return view
        return None

    def moved(self, text: str, new_text: str) -> None:
        """What is written by the one name has the other one now."""
        self.removed(new_text)
        for wanted, entry in list(self._entries.items()):
            if wanted.text == text and isinstance(entry.view, ThroughView):
                del self._entries[wanted]
                fresh = replace(wanted, text=new_text)
                self._entries[fresh] = entry
                self._wanted[entry.view] = fresh

    def removed(self, text: str) -> None:
        """What is written by this name has none any more."""
        for wanted, entry in self._entries.items():
            if wanted.text == text:
                self._let_go(entry)

    @property
    def has_nameless(self) -> bool:
        return bool(self._nameless)

    async def close_nameless(self, used: Collection[View]) -> None:
        """Close those that have no name, and that nobody has open.  Raises nothing."""
        for view in [each for each in self._nameless if each not in used and not each.writers]:
            self._nameless.remove(view)
            try:
                await view.finish()
            except ImgfsError as exc:
                log.error("%s: when it was closed: %s", view.name, exc)
            view.mark_stale(SourceChanged(f"{view.name}: has no name, and was closed"))
            await self._discard(view)

    def _let_go(self, entry: _Entry) -> None:
        if isinstance(entry.view, ThroughView):
            self._nameless.append(entry.view)
            entry.view = None

    def _forget(self, view: ThroughView) -> None:
        self._nameless = [each for each in self._nameless if each is not view]
        self._written = {of: each for of, each in self._written.items() if each is not view}
        for entry in self._entries.values():
            if entry.view is view:
                entry.view = None

    async def chain(self, name: str, stored: StoredView, format: str | None) -> Chain:
        """The disk in it, to be called `name`, with what its options say, and this format if
        it is known.  Raises as `open_chain` does.

        A file that the image needs and that is not there, or must not be followed, is a
        CorruptImage: the image's own name is there, and has no use for ENOENT or EINVAL.
        """
        wanted = self._known(stored)
        options = wanted.options
        if format is None:
            format = await self._probed(stored, wanted)
        asked = Asked(format, options.snapshot, options.luks_key is not None)

        async def serve(node: Node) -> RawView:
            return await self._serve(node, options)

        held = [stored]
        self._in_chains[stored] += 1

        async def open_beside(view: StoredView, name: str) -> StoredView:
            found = await self._beside(view, name)
            held.append(found)
            self._in_chains[found] += 1
            return found

        try:
            chain = await open_chain(name, stored, open_beside, asked, serve)
        except (UsageError, SourceNotFound) as exc:
            raise CorruptImage(f"{stored.name}: is not whole: {exc}") from exc
        finally:
            self._in_chains -= Counter(held)
        if chain.formats != (RAW,):
            if options.format is not None:
                await trio.to_thread.run_sync(unpin_raw, wanted.text)
        elif options.write_through:
            await trio.to_thread.run_sync(pin_raw, wanted.text)
        return chain

    def _known(self, view: StoredView) -> Wanted:
        """What it was opened for.  Raises SourceChanged when it is closed."""
        wanted = self._wanted.get(view)
        if wanted is None:
            view.refuse_stale()
            raise SourceChanged(f"{view.name}: is closed; open it again")
        return wanted

    @staticmethod
    async def _probed(stored: StoredView, wanted: Wanted) -> str | None:
        """What its content says, if that can be trusted; None: LUKS, if a person gives its key."""
        glimpse, stored.source.glimpse = stored.source.glimpse, None
        looks = None
        if glimpse is not None and glimpse.size == stored.size:
            looks = run_on(probe(stored.size), glimpse.read)
        if looks is None:
            looks = await drive(probe(stored.size), [stored])
        if looks == "luks":
            return None
        if looks != RAW and await trio.to_thread.run_sync(is_pinned_raw, wanted.text):
            log.warning(
                "%s: looks like %s, but was raw when imgfs wrote to it, and stays raw; "
                "if that is wrong mount it with -o format=%s",
                *(stored.name, looks, looks),
            )
            return RAW
        return looks

    async def _serve(self, node: Node, options: Options) -> RawView:
        """Not through a cache: what was locked stays in memory."""
        view = RawView(await self._open_by_qemu(node, options))
        for each in node.chain():
            assert isinstance(each.file, View)
            each.file.when_stale(view.mark_stale)
        view.when_stale(partial(self._discard_stale, view))
        self._served.append(view)
        return view

    async def _beside(self, view: StoredView, name: str) -> StoredView:
        wanted = self._known(view)
        # Only the image itself is written, never what is below it.
        wanted = replace(wanted, options=replace(wanted.options, write=False))
        options = wanted.options
        if options.backing is not None and options.backing != "any":
            # What a person said is of this image, not of the next one in the chain.
            return await self.get(
                replace(wanted, text=options.backing, options=replace(options, backing=None))
            )
        text = beside(wanted.text, name, any_place=options.backing == "any")
        return await self.get(replace(wanted, text=text))

    async def sync(self) -> list[Unsaved]:
        """Make durable what was written to the sources; returns what is not.

        What a server can never promise is not waited for: `finish` says so.
        """
        unsaved: list[Unsaved] = []

        async def one(view: ThroughView) -> None:
            told, dirty = view.failures, view.dirty_bytes
            try:
                await view.sync()
                if view.failures == told or view.failure is None:
                    return
                why = str(view.failure)
            except NeverDurable:
                return
            except ImgfsError as exc:
                why = str(exc)
            said = why.removeprefix(f"{view.name}: ")
            can_retry = view.failures == told
            unsaved.append(
                {
                    "name": view.name,
                    "bytes": dirty,
                    "why": said,
                    "place": "",
                    "can_retry": can_retry,
                }
            )

        async with trio.open_nursery() as nursery:
            for entry in self._entries.values():
                view = entry.view
                if isinstance(view, ThroughView) and not view.is_durable and view.stale is None:
                    nursery.start_soon(one, view)
        return unsaved

    async def finish(self) -> None:
        """See that all that was written is durable; raises the first error, and logs each."""
        failed: list[ImgfsError] = []

        async def one(view: ThroughView) -> None:
            try:
                await view.finish()
            except ImgfsError as exc:
                log.error("%s: at the end of the mount: %s", view.name, exc)
                failed.append(exc)

        views = [*self._nameless, *(entry.view for entry in self._entries.values())]
        async with trio.open_nursery() as nursery:
            for view in views:
                if isinstance(view, ThroughView):
                    nursery.start_soon(one, view)
        if failed:
            raise failed[0]

    async def aclose(self) -> None:
        """Close them all; their caches must have been closed before."""
        for view in [*self._served, *self._wanted]:
            await view.source.aclose()
