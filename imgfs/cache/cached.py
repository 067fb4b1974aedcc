"""A bounded cache on disk in front of a source, shaped for the fast path.

A block of 64 KiB is absent, being filled, present, or known to be zero.  The store is a
sparse file addressed by the source's own offsets, so no slot is ever another block's.  The
segment map says STORE for the source's data and ZERO for its holes; the fast path
reads both without Python.  Only absent blocks come here.

Invariants: room is reserved before a fetch, so present and filling blocks together never
exceed the limit; a block has at most one fill, on which any number of readers wait; a
fill belongs to the cache and not to a reader, so a reader that is cancelled disturbs nobody; a
block becomes present only after its bytes are in the file; an evicted block is
cleared, then every reader that may still hold it is waited for, then it is punched.

Readahead: hits are served natively and Python does not see them.  So one page in the middle of
what was read ahead is left to ASK: the stream's arrival there comes to Python, which puts
the page back and fetches the next, doubled, window.  Random reads never arrive there twice.

Not done here: survival of a restart.  The file has no name, so nothing is left behind.
"""

from __future__ import annotations

import logging
import os
import pwd
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import trio

from imgfs._native import _map
from imgfs.errors import ImgfsError, SourceChanged
from imgfs.extents import ExtentList, all_data
from imgfs.image import Image
from imgfs.sources.base import Source

log = logging.getLogger(__name__)

BLOCK = 64 << 10
FILL_BLOCKS = 15  # a fetch is at most four of OpenSSH's reads of 255 KiB
PAGE = 4096
FIRST_WINDOW = 256 << 10
LAST_WINDOW = 16 << 20
BACKGROUND_FILLS = 24
EVICT_SHARE = 16  # at least a sixteenth of the limit goes at once
ZEROES = bytes(BLOCK)


def cache_directory() -> Path:
    """$CACHE_DIRECTORY (systemd's), $XDG_CACHE_HOME/imgfs or ~/.cache/imgfs; made 0700."""
    given = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]
    if given:
        path = Path(given)
    else:
        home = os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
        path = Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache") / "imgfs"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def default_limit(directory: Path) -> int:
    """Bytes: 10 GiB or a tenth of the free disk, the less."""
    disk = os.statvfs(directory)
    return min(10 << 30, disk.f_bavail * disk.f_frsize // 10)


@dataclass(slots=True)
class Fill:
    """A run of blocks on its way."""

    first: int
    count: int
    done: trio.Event = field(default_factory=trio.Event)
    error: Exception | None = None
    no_room: bool = False


@dataclass(slots=True)
class Stream:
    """A sequential reader: where its next window begins, and what brings it back to Python."""

    next: int
    window: int
    trigger: int = -1


class CachedImage(Image):
    """The source through the cache.  No await happens while `_fills`, `_filling` or the
    streams are being changed."""

    def __init__(self, source: Source, limit: int, nursery: trio.Nursery, fd: int) -> None:
        super().__init__(source.name, source.size)
        self.source = source
        self.map = _map.SegmentMap(source.size)
        self.store = _map.Store(fd, source.size, BLOCK)
        self._limit_blocks = limit // BLOCK
        self._nursery = nursery
        self._fills: dict[int, Fill] = {}
        self._filling = 0
        self._streams: list[Stream] = []
        self._background = trio.CapacityLimiter(BACKGROUND_FILLS)
        self._room = trio.Lock()
        self._known: ExtentList = all_data(0, source.size)
        self._broken = False
        self._stale = False

    async def prepare(self) -> ExtentList:
        """Learn the source's extents.  Raises what the source raises."""
        self._known = await self.source.extents(0, self.size)
        if self.size:
            self.map.load(self._known.ends, self._known.flags, self.store)
        return self._known

    def retract(self) -> None:
        """Forget every byte: the source is not what it was."""
        self._stale = True
        self.map.set_ask(0, self.size)

    async def _extents(self, offset: int, length: int) -> ExtentList:
        return self._known.clip(offset, offset + length)

    async def _read(self, offset: int, length: int) -> bytes:
        end = offset + length
        self._follow(offset, end)
        for _ in range(3):
            try:
                local = await trio.to_thread.run_sync(
                    self.map.read, offset, length, abandon_on_cancel=True
                )
            except OSError as exc:
                self._give_up(exc)
                break
            if local is not None:
                return local
            fills = [] if self._broken else self._fill(offset, end)
            if not fills:
                break
            for fill in fills:
                await fill.done.wait()
                if fill.error is not None:
                    raise fill.error
            if any(fill.no_room for fill in fills):
                break
        return bytes(await self.source.read(offset, length))

    def _absent(self, start: int, end: int) -> list[tuple[int, int]]:
        """Runs (first, count) of absent blocks that hold data of `[start, end)`."""
        runs: list[tuple[int, int]] = []
        for a, b, kind, _ in self.map.segments(start, end - start):
            if kind != _map.STORE:
                continue
            for first, count in self.store.missing(a, b - a):
                if runs and first <= runs[-1][0] + runs[-1][1]:
                    runs[-1] = (runs[-1][0], first + count - runs[-1][0])
                else:
                    runs.append((first, count))
        return runs

    def _fill(self, start: int, end: int, *, ahead: bool = False) -> list[Fill]:
        """See to it that all blocks of the range are fetched; the fills to wait for."""
        wanted: list[Fill] = []
        for first, count in self._absent(start, end):
            block = first
            while block < first + count:
                fill = self._fills.get(block)
                if fill is None:
                    run = 1
                    while (
                        run < FILL_BLOCKS
                        and block + run < first + count
                        and block + run not in self._fills
                    ):
                        run += 1
                    fill = Fill(block, run)
                    self._fills.update(dict.fromkeys(range(block, block + run), fill))
                    self._nursery.start_soon(self._run_fill, fill, ahead)
                wanted.append(fill)
                block = fill.first + fill.count
        return wanted

    async def _run_fill(self, fill: Fill, ahead: bool) -> None:
        try:
            if ahead:
                async with self._background:
                    await self._fetch(fill)
            else:
                await self._fetch(fill)
        except ImgfsError as exc:
            fill.error = exc
            if isinstance(exc, SourceChanged):
                self.retract()
        except OSError as exc:
            self._give_up(exc)
            fill.no_room = True
        finally:
            for block in range(fill.first, fill.first + fill.count):
                del self._fills[block]
            fill.done.set()

    async def _fetch(self, fill: Fill) -> None:
        if not await self._reserve(fill.count):
            fill.no_room = True
            return
        try:
            start = fill.first * BLOCK
            end = min(start + fill.count * BLOCK, self.size)
            for a, b in self._known.clip(start, end).data_ranges():
                data = memoryview(await self.source.read(a, b - a))
                await trio.to_thread.run_sync(self._keep, a, data)
            self.store.set_present(fill.first, fill.count)
            if self._stale:
                self.map.set_ask(0, self.size)  # what `_keep` said of zeroes meanwhile
        finally:
            self._filling -= fill.count

    def _keep(self, offset: int, data: memoryview) -> None:
        """In a thread: write what is not zero, and let the map say which blocks' worth is."""
        at, kept = 0, 0
        while at < len(data):
            step = min(BLOCK - (offset + at) % BLOCK, len(data) - at)
            # A view's == goes item by item; startswith is memcmp.
            if ZEROES.startswith(data[at : at + step]):
                if at > kept:
                    self.store.write(offset + kept, data[kept:at])
                self.map.set_zero(offset + at, offset + at + step)
                kept = at + step
            at += step
        if at > kept:
            self.store.write(offset + kept, data[kept:at])

    async def _reserve(self, blocks: int) -> bool:
        """Make room for a fill by evicting what was not used for longest; False: there is none."""
        async with self._room:
            over = self.store.present + self._filling + blocks - self._limit_blocks
            if over > 0:
                batch = max(over, self._limit_blocks // EVICT_SHARE)
                await trio.to_thread.run_sync(self._evict, batch)
            if self.store.present + self._filling + blocks > self._limit_blocks:
                return False
            self._filling += blocks
            return True

    def _evict(self, blocks: int) -> None:
        runs = self.store.oldest(blocks)
        for first, count in runs:
            self.store.clear_present(first, count)
        self.store.quiesce()
        for first, count in runs:
            start = first * BLOCK
            self.store.punch(start, min(count * BLOCK, self.size - start))

    def _give_up(self, exc: OSError) -> None:
        if not self._broken:
            log.warning("%s: the cache failed (%s); reading without it", self.name, exc)
        self._broken = True
        if self.size and not self._stale:
            self.map.load(self._known.ends, self._known.flags, None)

    def _follow(self, start: int, end: int) -> None:
        """Notice sequential readers and fetch ahead of them."""
        for stream in self._streams:
            if start <= stream.next <= end + BLOCK or start <= stream.trigger < end:
                self._put_back(stream)
                stream.next = max(stream.next, end)
                self._ahead(stream)
                return
        self._streams.append(Stream(end, FIRST_WINDOW // 2))
        if len(self._streams) > 8:
            self._put_back(self._streams.pop(0))

    def _ahead(self, stream: Stream) -> None:
        most = min(LAST_WINDOW, self._limit_blocks * BLOCK // 8)
        stream.window = min(stream.window * 2, most)
        until = min(stream.next + stream.window, self.size)
        if stream.window < BLOCK or until <= stream.next or self._broken:
            return
        self._fill(stream.next, until, ahead=True)
        middle = (stream.next + until) // 2 // PAGE * PAGE
        if middle > stream.next and middle + PAGE <= until:
            (segment, *_) = self.map.segments(middle, PAGE)
            if segment[1] - segment[0] == PAGE and segment[2] == _map.STORE:
                self.map.set_ask(middle, middle + PAGE, _map.DATA)
                stream.trigger = middle
        stream.next = until

    def _put_back(self, stream: Stream) -> None:
        if stream.trigger >= 0:
            kind = self.map.segments(stream.trigger, PAGE)[0][2:]
            if kind == (_map.ASK, _map.DATA):
                self.map.set_store(
                    stream.trigger, stream.trigger + PAGE, self.store, stream.trigger
                )
            stream.trigger = -1


def make_cached(source: Source, nursery: trio.Nursery, limit: int | None = None) -> CachedImage:
    """The source through a cache of at most `limit` bytes; its fetches run in the nursery."""
    directory = cache_directory()
    bound = default_limit(directory) if limit is None else limit
    with tempfile.TemporaryFile(dir=directory) as file:  # the store keeps an fd of its own
        file.truncate(source.size)
        return CachedImage(source, bound, nursery, file.fileno())
