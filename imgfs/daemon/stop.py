"""The wish to end, which may come at any moment from before the source is open until after INIT."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import TypeVar

import trio

from imgfs.daemon.processes import Watched
from imgfs.errors import MountError

Result = TypeVar("Result")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GIVE_UP = signal.SIGUSR1  # from `imgfs umount --force`


def hold_back() -> None:
    """Let the signals wait until somebody listens.

    Python's own answer to SIGINT is an exception wherever it happens to be, and where that is a
    callback of the import system nobody hears of it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def let_through() -> None:
    """There is a handler now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """In it SIGTERM is as ^C, so that what is open is let go of in order; the exit status tells.

    Where ^C is ignored, as it is in a job of a shell's background, SIGTERM works all the same.
    """
    asked = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        # Trio has put its own there, which knows where it must not raise.
        interrupt = signal.getsignal(signal.SIGINT)
        assert callable(interrupt)
        interrupt(signal.SIGINT, frame)

    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        if asked:
            sys.exit(128 + signal.SIGTERM)
        raise


class Stop:
    """Asked for once or more; `at_once` is set by the second time, and cuts the drain short.

    `given_up`: what cannot be made durable is not waited for (holding.py).  That takes a request
    that came after it was said what would be lost, or GIVE_UP.
    """

    def __init__(self) -> None:
        self.asked = trio.Event()
        self.at_once = trio.Event()
        self.given_up = trio.Event()
        self.why = ""
        self._holds = False
        #: what SIGHUP means instead of a stop, where there is something to read again
        self.on_hangup: Callable[[], None] | None = None

    def ask(self, why: str) -> None:
        if self.asked.is_set():
            self.at_once.set()
            if self._holds:
                self.given_up.set()
        else:
            self.why = why
            self.asked.set()

    def holds(self) -> None:
        """It has been said what is not durable: whoever asks again knows what that means."""
        self._holds = True

    def holds_no_more(self) -> None:
        self._holds = False

    def error(self) -> MountError:
        """What a stop before the mount was ready is to the person."""
        return MountError(f"{self.why or 'unmounted'} before the mount was ready")

    async def unless(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """`await work()`.  Raises MountError when a stop is asked for before it is done."""
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await self.asked.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            result = await work()
            nursery.cancel_scope.cancel()
            return result
        raise self.error()

    async def listen(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Take the signals that end a process, from the moment that this has started."""
        # At the end it may come too late: then it is not to kill us.
        signal.signal(GIVE_UP, signal.SIG_IGN)
        with trio.open_signal_receiver(*SIGNALS, GIVE_UP) as signals:
            let_through()
            task_status.started()
            async for number in signals:
                if number == GIVE_UP:
                    self.given_up.set()
                    continue
                if number == signal.SIGHUP and self.on_hangup is not None:
                    self.on_hangup()
                    continue
                self.ask(f"stopped by {signal.Signals(number).name}")

    async def follow(self, parent: int) -> None:
        """Ask for a stop when the process `parent`, which made this one, is gone."""
        with contextlib.suppress(ProcessLookupError):
            process = Watched(parent)
            try:
                # It may have gone, and its number been given away, before that.
                if os.getppid() == parent:
                    await process.wait()
            finally:
                process.close()
        self.ask("the command that began it was killed")
