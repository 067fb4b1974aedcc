"""Which blocks are on their way: single flight, and readers before readahead.

    queued ----> running ----> fetched ----> ended
       |            ^             |
       |            |             +-- its bytes can be read from `parts` until it ends
       |            +-- at once when a reader wants it, else when the window has room (window.py)
       +----> dropped (its stream is gone)

What is written while a fill runs spoils it: its bytes may be old.  It goes on for those who wait
for it, who asked before; nobody else is given it, and it is not kept.

An error is remembered for a moment: the kernel asks twice, and who has waited for the timeout
once must not wait for it again.

A block is in at most one fill.  A fill belongs to the cache: a reader that goes away
disturbs nobody, and the bytes that are on the wire are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from imgfs.budget import Budget, Lease
from imgfs.cache.directory import BLOCK
from imgfs.cache.window import MIB, Flight, Window
from imgfs.errors import ImgfsError
from imgfs.image import Buffer

WRITING = 8 * MIB  # fetched ahead, and not written yet
FAILED_S = 0.25  # how long an error is remembered


@dataclass(slots=True, eq=False)
class Fill:
    """A run of `count` blocks.  `parts` are (offset, bytes) of the source's data in it."""

    first: int
    count: int
    ahead: bool
    fetched: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    parts: list[tuple[int, Buffer]] | None = None
    error: ImgfsError | None = None
    running: bool = False
    flight: Flight | None = None  #: while its bytes are on their way
    lease: Lease | None = None  #: of the budget, for its bytes
    spoilt: bool = False  #: something in it was written since it began
    kept: bool = False  #: whether its blocks became present (or are known to be zero)
    got: bool = False  #: whether its bytes came
    readers: int = 0  #: who still looks at `parts`

    @property
    def error_is_for_all(self) -> bool:
        """Does its error tell a reader of some of its blocks anything?

        Readahead takes more than a reader wants, and a bad spot in that is not the reader's.
        """
        return self.error is not None and (self.error.temporary or not self.ahead)

    def let_go(self) -> None:
        if self.ended.is_set() and not self.readers:
            self.parts = None

    @property
    def is_awaited(self) -> bool:
        return not self.ahead or bool(self.fetched.statistics().tasks_waiting)


@contextmanager
def looked_at(fills: list[Fill]) -> Iterator[None]:
    """The fills keep their bytes as long as the block runs: streams keep ended fills for long."""
    for fill in fills:
        fill.readers += 1
    try:
        yield
    finally:
        for fill in fills:
            fill.readers -= 1
            fill.let_go()


def joined(fills: list[Fill], start: int, end: int) -> Buffer | None:
    """The range from the fills' parts, when those cover all of it."""
    pieces: list[memoryview] = []
    at = start
    for fill in fills:
        for offset, data in fill.parts or ():
            if offset <= at < min(end, offset + len(data)):
                pieces.append(memoryview(data)[at - offset : end - offset])
                at = min(end, offset + len(data))
    if at < end:
        return None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Fills:
    """All fills of one image.

    `run(fill)` fetches one, calls `came` as soon as its bytes are there, and raises nothing but
    Cancelled.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        most_blocks: int,
        run: Callable[[Fill], Awaitable[None]],
        window: Window,
        budget: Budget,
    ) -> None:
        self.window = window
        self._budget = budget
        self._nursery = nursery
        self._most = most_blocks
        self._run = run
        self._of_block: dict[int, Fill] = {}
        self._queue: deque[Fill] = deque()
        self._spoilt: set[Fill] = set()  # that still run
        self._writing = 0  # bytes of fills ahead that were fetched
        self._failed: deque[tuple[float, Fill]] = deque(maxlen=64)
        self._may_start = trio.Event()
        nursery.start_soon(self._start_ahead)

    def wanted(self, first: int, count: int) -> list[Fill]:
        """A reader needs these blocks: the fills to wait for, running or just failed."""
        fills, _ = self._cover(first, count, ahead=False)
        for fill in fills:
            if not fill.running and not fill.ended.is_set():
                if fill.ahead:
                    self._queue.remove(fill)
                self._start(fill)
        return fills

    def ahead(self, first: int, count: int) -> list[Fill]:
        """A stream will soon need these blocks: the fills that this made."""
        _, new = self._cover(first, count, ahead=True)
        self._queue.extend(new)
        self._may_start.set()
        return new

    def came(self, fill: Fill) -> None:
        """Its bytes are there, or it failed: readers go on, and the line has room."""
        if fill.flight is not None:
            if fill.lease is not None:
                self._budget.land(fill.lease)
            got = sum(len(data) for _, data in fill.parts or ())
            self.window.ended(fill.flight, trio.current_time(), got)
            self._writing += fill.flight.length if fill.ahead else 0
            fill.flight = None
            fill.fetched.set()
            self._may_start.set()

    def drop(self, fills: list[Fill]) -> None:
        """Nobody waits for these any more; those that still queue are forgotten."""
        for fill in fills:
            if not fill.running and fill in self._queue:
                self._queue.remove(fill)
                self._forget(fill)

    def spoil(self, first: int, count: int) -> None:
        """These blocks are being written, or were just now."""
        if not self._of_block:
            return
        blocks: Iterable[int] = range(first, first + count)
        if count > len(self._of_block):
            blocks = [block for block in self._of_block if first <= block < first + count]
        for fill in {self._of_block[block] for block in blocks if block in self._of_block}:
            if fill.running:
                fill.spoilt = True
                self._spoilt.add(fill)
                self._detach(fill)

    def may_keep(self, fill: Fill) -> bool:
        """Are the fill's bytes those of the source, and its blocks no other's that still runs?"""
        end = fill.first + fill.count
        return not fill.spoilt and not any(
            each.first < end and fill.first < each.first + each.count for each in self._spoilt
        )

    def _cover(self, first: int, count: int, *, ahead: bool) -> tuple[list[Fill], list[Fill]]:
        """The fills of these blocks, and those of them that are new."""
        fills: list[Fill] = []
        new: list[Fill] = []
        block, end = first, first + count
        while block < end:
            fill = self._of_block.get(block) or (None if ahead else self._failed_at(block))
            if fill is None:
                run = 1
                while run < self._most and block + run < end and block + run not in self._of_block:
                    run += 1
                fill = Fill(block, run, ahead)
                self._of_block.update(dict.fromkeys(range(block, block + run), fill))
                new.append(fill)
            fills.append(fill)
            block = fill.first + fill.count
        return fills, new

    async def _start_ahead(self) -> None:
        """Start what is queued as there is room, in order.

        One at a time: trio runs tasks that were started together in any order, and a source that
        is asked for the last block first sends it first, while the reader waits for the first.
        """
        while True:
            while self._queue and self._has_room:
                fill = self._queue[0]
                lease = await self._budget.lease(fill.count * BLOCK)
                # Meanwhile a reader may have wanted it, or its stream is gone.
                if not (self._queue and self._queue[0] is fill and self._has_room):
                    self._budget.give(lease)
                    continue
                fill.lease = lease
                self._start(self._queue.popleft())
                await trio.lowlevel.checkpoint()
            self._may_start = trio.Event()
            await self._may_start.wait()

    @property
    def _has_room(self) -> bool:
        return self.window.has_room and self._writing < WRITING

    def _start(self, fill: Fill) -> None:
        fill.running = True
        if fill.lease is not None:
            fill.flight = self.window.started(trio.current_time(), fill.count * BLOCK)
        self._nursery.start_soon(self._serve, fill)

    async def _serve(self, fill: Fill) -> None:
        try:
            if fill.lease is None:
                fill.lease = await self._budget.lease(fill.count * BLOCK, first=True)
                fill.flight = self.window.started(trio.current_time(), fill.count * BLOCK)
            await self._run(fill)
        finally:
            self.came(fill)
            if fill.lease is not None:
                self._budget.give(fill.lease)
            self._writing -= fill.count * BLOCK if fill.ahead else 0
            fill.running = False
            if fill.error_is_for_all:
                self._failed.append((trio.current_time(), fill))
            self._forget(fill)
            self._may_start.set()

    def _failed_at(self, block: int) -> Fill | None:
        """The fill that failed there a moment ago."""
        since = trio.current_time() - FAILED_S
        while self._failed and self._failed[0][0] < since:
            self._failed.popleft()
        for _, fill in self._failed:
            if fill.first <= block < fill.first + fill.count:
                return fill
        return None

    def _forget(self, fill: Fill) -> None:
        self._detach(fill)
        self._spoilt.discard(fill)
        fill.fetched.set()
        fill.ended.set()
        fill.let_go()

    def _detach(self, fill: Fill) -> None:
        for block in range(fill.first, fill.first + fill.count):
            if self._of_block.get(block) is fill:
                del self._of_block[block]
