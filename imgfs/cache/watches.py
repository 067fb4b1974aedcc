"""Who is to be told when the first bytes of a range of a store are read natively."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import trio

from imgfs._native import _map


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    slot: int
    then: Callable[[], None]


class Watches:
    """At most `_map.WATCHES` at once: a new one takes the place of the oldest."""

    def __init__(self, store: _map.Store) -> None:
        self._store = store
        self._set: dict[int, Watch] = {}
        self._free = deque(range(_map.WATCHES))

    def set(self, start: int, end: int, then: Callable[[], None]) -> Watch:
        """`then` is called once, when bytes of [start, end) of the store's file are read."""
        if not self._free:
            self.cancel(next(iter(self._set.values())))
        watch = Watch(self._free.popleft(), then)
        self._set[watch.slot] = watch
        self._store.watch(watch.slot, start, end)
        return watch

    def cancel(self, watch: Watch) -> None:
        """It is not called any more."""
        if self._set.get(watch.slot) is watch:
            self._store.watch(watch.slot, 0, 0)
            self._forget(watch.slot)

    def _forget(self, slot: int) -> None:
        del self._set[slot]
        self._free.append(slot)

    async def run(self) -> None:
        """Call them, for ever."""
        while True:
            await trio.lowlevel.wait_readable(self._store.watch_fd())
            for slot in self._store.take_seen():
                watch = self._set.get(slot)
                if watch is not None:
                    self._forget(slot)
                    watch.then()
