"""What every view is: a file of a mount, in one state of what it is made from."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from types import MethodType
from typing import NamedTuple
from weakref import WeakMethod

import trio

from imgfs._native import _map
from imgfs.cache.readahead import Ahead
from imgfs.errors import SourceChanged, SourceUnreachable
from imgfs.image import Buffer, Counters, Image

PATIENCE_S = 2.0  # how long opening waits for the source to say that it is the same
MOST_NOW = 64 << 10  # bytes that are copied sooner than a thread is told to copy them
SILENT_S = 5.0  # how long it is not asked again after it did not


class Origin(NamedTuple):
    """The bytes `[start, end)` of a view: zeroes (None), those of a view from `offset` on, or those
    of the layer of this name, which does not change any more."""

    start: int
    end: int
    of: View | str | None
    offset: int


class View(Image):
    """`size` bytes, of which `map` says where they are; the fast path answers from it.

    `mtime_ns`, `ctime_ns` and `mode` (permission bits) are the source's.  When the source turns out
    to be another the view is stale for good.
    """

    map: _map.SegmentMap

    def __init__(self, name: str, size: int, mtime_ns: int, mode: int) -> None:
        super().__init__(name, size)
        self.mtime_ns = self.ctime_ns = mtime_ns
        self.mode = mode
        self.stored_bytes = size  #: not holes; known once it is measured or prepared
        self.answered = Counters()  #: what programs asked for, and Python answered
        self.stale: SourceChanged | None = None
        self._hooks: list[Callable[[], Callable[[SourceChanged], None] | None]] = []
        self._seen = 0
        self._silent_until = -1.0

    @abstractmethod
    async def prepare(self) -> None:
        """Learn what is data and what is a hole, once.  Raises what the source raises."""

    async def measure(self) -> None:
        """Learn `stored_bytes`, once; for who only looks at the file.  Raises as `prepare`."""
        await self.prepare()

    async def resolve(self, offset: int, length: int) -> None:
        """See to it that `map` says of the range whose bytes it is, without fetching them."""
        await self.prepare()

    async def trace(self, offset: int, length: int) -> list[Origin]:
        """Whose bytes those of a first part of the range are, as this view knows it.

        Its own where it is made of no other.  Raises as `resolve`.
        """
        self.refuse_stale()
        await self.resolve(offset, length)
        return [
            Origin(start, end, None if whose == _map.ZEROES else self, start)
            for start, end, whose in self.map.origins(offset, length, [])
        ]

    async def seek(self, offset: int, whence: int) -> int | None:
        """lseek's answer for SEEK_DATA or SEEK_HOLE; None where it cannot be found out.

        Raises OSError ENXIO at or past the end, or when no data follows.
        """
        return self.map.seek(offset, whence)

    @property
    def ahead(self) -> Ahead | None:
        """By what it can be fetched before it is read; None where it is all local, or nothing is
        kept."""
        return None

    async def plan_ahead(self, offset: int, length: int) -> None:
        """See to it that `ahead` knows the range.  Raises what reading tables raises."""

    async def peek(self, ranges: Sequence[tuple[int, int]]) -> list[Buffer] | None:
        """Some short ranges (offset, length), read without keeping them; None: read them.

        For who looks at an image that perhaps nobody will read.  Raises as `read` does.
        """
        return None

    def made_of(self) -> Sequence[View]:
        """The views that it reads from."""
        return ()

    @property
    def is_nameless(self) -> bool:
        """Is it not what its name leads to any more?  Who has it open goes on."""
        return False

    async def from_map(self, offset: int, length: int) -> bytes | None:
        """The bytes, where all are local; None also where they cannot be read: what is below is
        asked then, and says why."""
        try:
            if length <= MOST_NOW and (found := self.map.read(offset, length, True)) is not None:
                return found
            return await trio.to_thread.run_sync(
                self.map.read, offset, length, abandon_on_cancel=True
            )
        except OSError:
            return None

    async def make_local(self) -> None:
        """See that `map` says what is local, where that costs little.  Raises as `read`."""

    def read_now(self, offset: int, length: int) -> bytes | None:
        """As `read_local`, but no disk is waited for: for what is short."""
        if length > MOST_NOW:
            return None
        self._check_range("read_now", offset, length)
        try:
            return self.map.read(offset, length, True)
        except OSError:
            return None

    @property
    def is_only_looked_at(self) -> bool:
        """Has nothing of it been kept yet?  Then no disk is waited for by `read_local`."""
        return False

    def read_local(self, offset: int, length: int) -> bytes | None:
        """In a worker thread: the bytes, or None where not all of them are known to be local."""
        self._check_range("read_local", offset, length)
        try:
            return self.map.read(offset, length)
        except OSError:
            return None  # who reads it in earnest is told why

    @abstractmethod
    async def _check(self) -> None:
        """Raises SourceChanged when the source is another, SourceUnreachable when it is away."""

    async def check(self) -> None:
        """Raises SourceChanged, from now on at every read, when the source is another."""
        if self.stale is None:
            try:
                await self._check()
            except SourceChanged as exc:
                self.mark_stale(exc)
        self.refuse_stale()

    def refuse_stale(self) -> None:
        """Raises SourceChanged when the view is stale."""
        if self.stale is not None:
            raise SourceChanged(str(self.stale))

    def when_stale(self, hook: Callable[[SourceChanged], None]) -> None:
        """`hook` is called once, when the source turns out to be another.

        A method's object is not kept alive for that; as long as anybody else has it, it is called.
        """
        self._hooks = [each for each in self._hooks if each() is not None]
        self._hooks.append(WeakMethod(hook) if isinstance(hook, MethodType) else lambda: hook)

    def forget_hooks(self) -> None:
        """Nobody reads it any more: hooks may refer to it in turn."""
        self._hooks = []

    def mark_stale(self, why: SourceChanged) -> None:
        """From now on no byte is given any more."""
        if self.stale is None:
            self.stale = why
            self.map.set_ask(0, self.map.size)
            for known in self._hooks:
                hook = known()
                if hook is not None:
                    hook(why)

    async def check_for_open(self) -> None:
        """As `check`, but a source that does not answer soon is not a changed one.

        What is cached of it stays good; who reads the rest waits for it there.
        """
        if self.stale is None and trio.current_time() < self._silent_until:
            return
        with trio.move_on_after(PATIENCE_S), contextlib.suppress(SourceUnreachable):
            await self.check()
            return
        self._silent_until = trio.current_time() + SILENT_S

    @property
    def misses(self) -> int:
        """How often a read had to wait for the source."""
        return self.map.reads_waited + self.answered.misses

    def was_read(self) -> bool:
        """Has anything been read since this was asked last?"""
        seen = self.map.bytes_served + self.answered.bytes_read
        changed, self._seen = seen != self._seen, seen
        return changed
