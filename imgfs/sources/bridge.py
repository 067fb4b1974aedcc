"""The bridge: asyncio in a thread of its own, called from trio.

asyncssh is asyncio, everything else is trio.  One loop in one thread serves all sources that
need it.  A call crosses twice, whatever it does in between: so callers batch, and one read is
one call.

States of a call:

    started     a task on the loop; the trio task is parked
    finished    the outcome is on its way back through run_sync_soon
    abandoned   trio cancelled it: the trio task has gone on, the asyncio task is told to end
                and nobody waits for that

Invariants.  The trio task is rescheduled exactly once: `abandoned` is read and written on trio's
thread only, and only an outcome that finds it unset reschedules.  The asyncio task never
raises: its outcome is a value.  A task is made before it is cancelled, because both are queued on
the loop from trio's thread, in that order.

Not done: asyncio's cancellation is not waited for.  A reader that is killed must be gone within a
second, whatever its server does; what a cancelled call holds on the loop's side must be safe to
let go later.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar, cast

import outcome
import trio

from imgfs.errors import NoThread, SourceUnreachable
from imgfs.threads import NO_THREAD

Result = TypeVar("Result")


class Closable(Protocol):
    def close(self) -> None: ...


Shared = TypeVar("Shared", bound=Closable)

END_S = 2.0  # how long tasks may take to notice that the bridge closes


class Bridge:
    """Starts its thread at the first call; `aclose` ends it for good."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._shared: dict[Callable[[], Closable], Closable] = {}

    def shared(self, make: Callable[[], Shared]) -> Shared:
        """The only object of its kind on this loop, from where it is called; made when missing.

        It is closed, on the loop's thread, when the bridge is.
        """
        found = self._shared.get(make)
        if found is None:
            found = self._shared[make] = make()
        return cast(Shared, found)

    async def call(self, function: Callable[..., Awaitable[Result]], *args: Any) -> Result:
        """Run `function(*args)` on the loop and give its result, or raise what it raised.

        When cancelled it returns at once; what the call has done by then is unknown.  Raises
        SourceUnreachable when the bridge is closed before or meanwhile.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
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
                result = outcome.Error(SourceUnreachable("the connection was closed"))
            elif isinstance(result, outcome.Error) and not isinstance(result.error, Exception):
                # A panic of what is written in Rust, as where it can start no thread.
                result = outcome.Error(SourceUnreachable(f"the client failed: {result.error}"))
            with contextlib.suppress(trio.RunFinishedError):
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
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                loop.call_soon_threadsafe(stop)
            return trio.lowlevel.Abort.SUCCEEDED

        loop.call_soon_threadsafe(start)
        result: Result = await trio.lowlevel.wait_task_rescheduled(abandon)
        return result

    async def aclose(self) -> None:
        """End every call that still runs, and the thread; returns when it is gone.

        Not cancellable, but bounded: about two seconds.
        """
        self._closed = True
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(thread.join)

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            raise SourceUnreachable("the connection was closed")
        if self._loop is None:
            import uvloop

            loop = uvloop.new_event_loop()
            thread = threading.Thread(
                target=self._run, args=(loop,), name="imgfs-asyncio", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:
                loop.close()
                raise NoThread(NO_THREAD) from None
            self._loop, self._thread = loop, thread
        return self._loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()
        rest = asyncio.all_tasks(loop)
        for task in rest:
            task.cancel()
        if rest:
            loop.run_until_complete(asyncio.wait(rest, timeout=END_S))
        for each in self._shared.values():
            each.close()
        # Callbacks of what ended just now still retrieve its errors.
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
