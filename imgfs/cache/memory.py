"""Bytes that come faster than a disk could keep them: in memory until they have been read.

A source that gives hundreds of megabytes a second, and cannot tell one of its states from another,
gains nothing from a cache on disk: no later mount may use it, and writing it costs more than
fetching it again.  So what is fetched ahead of a sequential reader is held for him, and let go
when he has it (the kernel's page cache has it by then).

All images of a mount share the room.  What nobody has read is let go only when it is old: where
there is no room the cache on disk is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from imgfs._native import _map
from imgfs.budget import Budget, Lease, shared
from imgfs.image import Buffer

LIMIT = 32 << 20
OLD_S = 10.0  # who has not come for it by then does not read in sequence any more


@dataclass(frozen=True, slots=True)
class _Held:
    store: _map.Store
    offset: int
    length: int
    until: float


class Memory:
    """Ranges of stores; offsets and lengths are bytes."""

    def __init__(
        self, clock: Callable[[], float], limit: int | None = None, budget: Budget | None = None
    ) -> None:
        self.budget = shared() if budget is None else budget
        self.limit = min(LIMIT, self.budget.limit // 2) if limit is None else limit
        self.used = 0
        self._clock = clock
        self._held: deque[_Held] = deque()

    def reserve(self, length: int) -> bool:
        """Room for so many bytes, when what was read or is old is let go; False: there is none."""
        self._let_go()  # at once: memory that was used just now is fast
        if self.used + length > self.limit:
            return False
        self.used += length
        return True

    def release(self, length: int) -> None:
        """What was reserved has come, or will not: what is held of it is counted by itself."""
        self.used -= length

    def hold(
        self, store: _map.Store, parts: list[tuple[int, Buffer]], lease: Lease | None = None
    ) -> bool:
        """Have the store's readers find these (offset, bytes) here; `lease` is for them.

        False: there are too many pieces, and none is held.
        """
        length = sum(len(data) for _, data in parts)
        if lease is not None:
            length -= min(length, lease.cost)
            self.budget.keep(lease, sum(len(data) for _, data in parts))
        self.budget.add(length)
        until = self._clock() + OLD_S
        for number, (offset, data) in enumerate(parts):
            if not store.hold(offset, data):
                for begin, held in parts[:number]:
                    self.forget(store, begin, begin + len(held))
                self.budget.sub(sum(len(data) for _, data in parts[number:]))
                return False
            self._held.append(_Held(store, offset, len(data), until))
            self.used += len(data)
        return True

    def forget(self, store: _map.Store, start: int, end: int) -> None:
        """Let go of what touches the range of the store."""
        if self._held:
            self._forget(
                lambda held: (
                    held.store is store and held.offset < end and start < held.offset + held.length
                )
            )

    def _let_go(self) -> None:
        now = self._clock()
        self._forget(
            lambda held: held.until <= now or not held.store.held_left(held.offset, held.length)
        )

    def _forget(self, is_meant: Callable[[_Held], bool]) -> None:
        still: deque[_Held] = deque()
        for held in self._held:
            if is_meant(held):
                held.store.unhold(held.offset, held.length)
                self.used -= held.length
                self.budget.sub(held.length)
            else:
                still.append(held)
        self._held = still
