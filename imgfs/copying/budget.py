"""How much of all copies may be in memory at a time."""

from __future__ import annotations

from collections import deque

import trio

from imgfs.limits import MOST, bound

MIB = 1 << 20
LIMIT = 64 * MIB  # where no limit in force asks for less
LEAST = 64 << 10  # what the smallest piece counts for, so that there are not too many of them


class Budget:
    """Bytes that are shared by all copies of a process; who asks first gets them first."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = LIMIT * bound() // MOST if limit is None else limit
        self._used = 0
        self._waiting: deque[tuple[int, trio.Event]] = deque()

    async def take(self, cost: int) -> None:
        """Until so many are free; more than there are at all count as all of them."""
        cost = min(cost, self._limit)
        if not self._waiting and self._used + cost <= self._limit:
            self._used += cost
            await trio.lowlevel.checkpoint_if_cancelled()
            return
        mine = (cost, trio.Event())
        self._waiting.append(mine)
        try:
            await mine[1].wait()
        except trio.Cancelled:
            if mine[1].is_set():
                self.give(cost)
            else:
                self._waiting.remove(mine)
            raise

    def give(self, cost: int) -> None:
        """What was taken."""
        self._used -= min(cost, self._limit)
        while self._waiting and self._used + self._waiting[0][0] <= self._limit:
            cost, event = self._waiting.popleft()
            self._used += cost
            event.set()
