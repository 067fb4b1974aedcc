"""A lock that costs no turn of the loop while nobody else has it.

`trio.Lock` lets all other tasks run at each use.  Of a directory's names each asks for a few locks,
and such a turn costs more than what they guard.
"""

from __future__ import annotations

from types import TracebackType

import trio


class Lock:
    """Held within `async with`; who waits gets it in order.  Not a checkpoint when it is free."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = trio.Lock()

    @property
    def is_held(self) -> bool:
        return self._lock.locked()

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()
