"""How many bytes may be in memory at a time: on their way, read ahead, waiting to be written.

All images of a process share one budget.  Who fetches takes a lease before, and waits where there
is no room; a program's own reads come before what is only read ahead.

    taken ----> silent for STALL_S, and somebody waits: lent to others ----> its bytes come:
      |                                                                      counted again
      +----> landed: its bytes are here ----> given back

A server that does not answer takes no memory, and must not stop other images: so what is on its way
from one is lent to who waits.  When it answers after all the limit is exceeded by that, for as long
as it takes to hand the bytes on; what one image may have on its way is bounded by itself.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from imgfs.limits import bound

STALL_S = 0.5
FIRST_SHARE = 4  # what is not waited for by a program leaves this part of the limit free


@dataclass(slots=True, eq=False)
class Lease:
    """Room for `cost` bytes, until `Budget.give`."""

    cost: int
    since: float = 0.0
    landed: bool = False
    lent: bool = False


@dataclass(slots=True, eq=False)
class _Waiter:
    lease: Lease
    most: int  #: up to which use it is let in
    event: trio.Event


class Budget:
    """Bytes; who asks first gets them first, of those who are alike."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.kept = 0  #: of that, what was counted without a lease
        self.peak = 0
        self._first: deque[_Waiter] = deque()
        self._others: deque[_Waiter] = deque()
        self._silent: dict[Lease, None] = {}  # in the order in which they were taken

    @property
    def waiting(self) -> int:
        """How many wait for room."""
        return len(self._first) + len(self._others)

    async def lease(self, cost: int, *, first: bool = False) -> Lease:
        """Wait for so much room; more than there is at all counts as all of it.

        `first`: a program waits for the bytes.
        """
        most = self.limit if first else self.limit - self.limit // FIRST_SHARE
        lease = Lease(min(cost, most))
        queue = self._first if first else self._others
        if not self._first and not (queue or self.used + lease.cost > most):
            await trio.lowlevel.checkpoint_if_cancelled()
            self._take(lease)
            return lease
        waiter = _Waiter(lease, most, trio.Event())
        queue.append(waiter)
        try:
            while not waiter.event.is_set():
                with trio.move_on_after(STALL_S):
                    await waiter.event.wait()
                if not waiter.event.is_set():
                    self._lend()
        except trio.Cancelled:
            if waiter.event.is_set():
                self.give(lease)
            else:
                queue.remove(waiter)
                self._admit()
            raise
        return lease

    @asynccontextmanager
    async def holding(self, cost: int) -> AsyncIterator[None]:
        """Room for a program's read, as long as the block runs."""
        lease = await self.lease(cost, first=True)
        try:
            yield
        finally:
            self.give(lease)

    def land(self, lease: Lease) -> None:
        """Its bytes are here: it is lent to nobody."""
        if not lease.landed:
            lease.landed = True
            self._silent.pop(lease, None)
            if lease.lent:
                lease.lent = False
                self._use(lease.cost)

    def give(self, lease: Lease) -> None:
        """Its bytes are gone."""
        self._silent.pop(lease, None)
        if not lease.lent:
            self._use(-lease.cost)
        lease.cost, lease.lent = 0, False
        self._admit()

    def keep(self, lease: Lease, length: int) -> None:
        """So much of it stays, until `sub`; the rest is given back."""
        self.land(lease)
        length = min(length, lease.cost)
        lease.cost -= length
        self.kept += length
        self.give(lease)

    def add(self, length: int) -> None:
        """Count bytes that are here, whether there is room or not, until `sub`."""
        self.kept += length
        self._use(length)

    def sub(self, length: int) -> None:
        self.kept -= length
        self._use(-length)
        self._admit()

    def has_room(self, length: int) -> bool:
        """To `add` so much?  What stays for long leaves the rest to what comes and goes."""
        most = self.limit - self.limit // FIRST_SHARE
        return self.kept + length <= self.limit * 5 // 8 and self.used + length <= most

    def _use(self, length: int) -> None:
        self.used += length
        self.peak = max(self.peak, self.used)

    def _take(self, lease: Lease) -> None:
        lease.since = trio.current_time()
        self._silent[lease] = None
        self._use(lease.cost)

    def _admit(self) -> None:
        for queue in (self._first, self._others):
            while queue and self.used + queue[0].lease.cost <= queue[0].most:
                waiter = queue.popleft()
                self._take(waiter.lease)
                waiter.event.set()
            if queue:
                return

    def _lend(self) -> None:
        until = trio.current_time() - STALL_S
        for lease in list(self._silent):
            if lease.since > until:
                break
            del self._silent[lease]
            lease.lent = True
            self.used -= lease.cost
        self._admit()


@functools.cache
def shared() -> Budget:
    """The process's own, of what the limits in force let it have."""
    return Budget(bound())
