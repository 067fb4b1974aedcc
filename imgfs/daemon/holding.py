"""A process that is to end and has something that is not durable: it stays, and tries again.

    asked to end -> all durable? -> unmounted, open files drained -> all durable? -> ended
                      |  ^                                            |  ^
                      v  | every second                               v  | every second
                     holding, mounted                                holding

The kernel may have unmounted by itself (fusermount3 -u); then it begins at the second question.
A signal gives up when the process has been asked to end before and has said that it holds; one
that comes earlier only asks.  SIGUSR1, which `imgfs umount --force` sends, gives up at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from imgfs.daemon.outcome import Outcome
from imgfs.daemon.stop import Stop
from imgfs.daemon.systemd import notify
from imgfs.status.durable import Unsaved, while_holding

log = logging.getLogger(__name__)

RETRY_S = 1.0
EXTEND_S = 15.0  # what the service manager is asked for each time
LONGEST_S = 600.0  # how long it is asked; then it may kill us, so that a machine can be shut down

#: Makes all durable; returns what is not.
Attempt = Callable[[], Awaitable[list[Unsaved]]]


class Holding:
    """`line` says why the process holds; empty: it does not."""

    def __init__(self, stop: Stop, outcome: Outcome) -> None:
        self._stop = stop
        self._outcome = outcome
        self._said: list[str] = []
        self._since = 0.0

    @property
    def line(self) -> str:
        return "; ".join(self._said)

    async def until_durable(self, attempt: Attempt) -> None:
        """Return when all is durable, when nothing can save the rest, or when it is given up."""
        self._since = trio.current_time()
        try:
            while not self._stop.given_up.is_set():
                unsaved = await attempt()
                if not any(each["can_retry"] for each in unsaved):
                    break
                self._hold([while_holding(each) for each in unsaved])
                with trio.move_on_after(RETRY_S):
                    await self._stop.given_up.wait()
        finally:
            self._let_go()

    def _hold(self, lines: list[str]) -> None:
        if lines != self._said:
            for line in lines:
                log.error("%s", line)
        self._said = lines
        self._outcome.say("holding", *lines)
        self._stop.holds()
        words = [f"STATUS={lines[0]}"]
        if trio.current_time() < self._since + LONGEST_S:
            words.append(f"EXTEND_TIMEOUT_USEC={int(EXTEND_S * 1e6)}")
        notify(*words)

    def _let_go(self) -> None:
        if self._said:
            notify("STATUS=")
        self._said = []
        self._outcome.say("serving")
        self._stop.holds_no_more()
