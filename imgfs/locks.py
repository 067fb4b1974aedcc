"""A lock that costs no turn of the loop, and hardly any memory, while nobody else has it.

`trio.Lock` lets all other tasks run at each use.  Of a directory's names each asks for a few locks,
and such a turn costs more than what they guard.
"""

from __future__ import annotations

from types import TracebackType

import trio


class Lock:
    """Held within `async with`; who waits gets it in order.  Not a checkpoint when it is free."""

    __slots__ = ("_waiting", "is_held")

    def __init__(self) -> None:
        self.is_held = False
        self._waiting: trio.lowlevel.ParkingLot | None = None  # from when somebody has waited

    async def __aenter__(self) -> None:
        if self.is_held:
            if self._waiting is None:
                self._waiting = trio.lowlevel.ParkingLot()
            await self._waiting.park()  # and it is ours, and was held all the time
        self.is_held = True

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._waiting:
            self._waiting.unpark()
        else:
            self.is_held = False
