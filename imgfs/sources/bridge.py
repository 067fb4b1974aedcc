"""The bridge: asyncio in a thread of its own, called from trio.

asyncssh is asyncio, everything else is trio.  One loop in one thread serves all sources that
need it.  A call crosses twice, whatever it does in between.

States of a call: started (a task on the loop, the trio task parked), finished (the outcome is
on its way back through run_sync_soon), abandoned (trio cancelled it: the trio task has
gone on, the asyncio task is told to end and nobody waits for that).  Invariant: the trio
task is rescheduled exactly once, because `abandoned` is read and written on trio's thread only.

Not done: asyncio's cancellation is not waited for.  A reader that is killed must be gone within a
second, whatever its server does.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import outcome
import trio

Result = TypeVar("Result")


class Bridge:
    """Starts its thread at the first call; `close` ends it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    async def call(self, function: Callable[..., Awaitable[Result]], *args: Any) -> Result:
        """Run `function(*args)` on the loop and give its result, or raise what it raised.

        When cancelled it returns at once; what the call has done by then is unknown.
        """
        loop = self._started()
        token = trio.lowlevel.current_trio_token()
        caller = trio.lowlevel.current_task()
        abandoned = False
        running: asyncio.Task[None] | None = None

        def deliver(result: outcome.Outcome[Result]) -> None:
            if not abandoned:
                trio.lowlevel.reschedule(caller, result)

        async def work() -> None:
            result: outcome.Outcome[Result] = await outcome.acapture(function, *args)
            if isinstance(result, outcome.Error) and isinstance(
                result.error, asyncio.CancelledError
            ):
                result = outcome.Error(RuntimeError("the bridge was closed"))
            token.run_sync_soon(deliver, result)

        def start() -> None:
            nonlocal running
            running = loop.create_task(work())

        def stop() -> None:
            if running is not None:
                running.cancel()

        def abandon(_: object) -> trio.lowlevel.Abort:
            nonlocal abandoned
            abandoned = True
            loop.call_soon_threadsafe(stop)
            return trio.lowlevel.Abort.SUCCEEDED

        loop.call_soon_threadsafe(start)
        result: Result = await trio.lowlevel.wait_task_rescheduled(abandon)
        return result

    def close(self) -> None:
        """End every call that still runs, and the thread."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop = self._thread = None

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            import uvloop

            self._loop = uvloop.new_event_loop()
            self._thread = threading.Thread(
                target=self._run, args=(self._loop,), name="imgfs-asyncio", daemon=True
            )
            self._thread.start()
        return self._loop

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()
        rest = asyncio.all_tasks(loop)
        for task in rest:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
        loop.close()
