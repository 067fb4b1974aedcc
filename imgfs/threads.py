"""Worker threads, also when no more can be started.

trio starts one for each job that finds none idle, and a job for which that fails (RLIMIT_NPROC,
pids.max, no memory for a stack) raises, wherever it is: in a request, or in a task without which
the mount ends.  Here some are started at the beginning and stay; where no more can be had a job
waits for one of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import outcome
from trio._core import _thread_cache

from imgfs.errors import NoThread

log = logging.getLogger(__name__)

LEAST = 6  # jobs may wait for a disk, or for the kernel, and one for another
IDLE_S = 10.0
AGAIN_S = 0.01
STACK = 1 << 20  # bytes; the usual 8 MiB count against RLIMIT_AS
SILENT_S = 60.0
NO_THREAD = "no thread can be started; raise the limit (ulimit -u, pids.max, TasksMax=)"

Result = TypeVar("Result")
Job = tuple[Callable[[], Any], Callable[[outcome.Outcome[Any]], object]]


class Workers:
    """As trio's own cache of threads, whose place it takes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._idle = 0
        self._count = 0
        self._least = 0
        self._silent_until = 0.0
        self._idle_workers: dict[object, None] = {}  # trio clears its own after a fork

    def start_thread_soon(
        self,
        fn: Callable[[], Any],
        deliver: Callable[[outcome.Outcome[Any]], object],
        name: str | None = None,
    ) -> None:
        """Have a thread run `deliver(outcome.capture(fn))`.

        Raises RuntimeError when there is no thread at all, and none can be started.
        """
        job = (fn, deliver)
        with self._changed:
            self._jobs.append(job)
            if self._idle >= len(self._jobs):
                self._changed.notify()
                return
        try:
            self._start()
        except RuntimeError:
            with self._changed:
                if not self._count:
                    self._jobs.remove(job)
                    raise
                self._changed.notify()
            self._tell()

    def reserve(self, least: int = LEAST) -> None:
        """Start so many threads, which stay.  Raises RuntimeError."""
        self._least = least
        while self._count < least:
            self._start()

    def _start(self) -> None:
        with self._changed:
            self._count += 1
        try:
            threading.Thread(target=self._work, name="imgfs worker", daemon=True).start()
        except BaseException as exc:
            with self._changed:
                self._count -= 1
            if isinstance(exc, MemoryError):
                raise RuntimeError("no memory for a thread") from exc
            raise

    def _tell(self) -> None:
        now = time.monotonic()
        if now >= self._silent_until:
            self._silent_until = now + SILENT_S
            log.warning("no thread can be started (see ulimit -u, pids.max); going on with fewer")

    def _next(self) -> Job | None:
        with self._changed:
            self._idle += 1
            try:
                while not self._jobs:
                    if not self._changed.wait(IDLE_S) and self._count > self._least:
                        if self._jobs:
                            break
                        self._count -= 1
                        return None
                return self._jobs.popleft()
            finally:
                self._idle -= 1

    def _work(self) -> None:
        while (job := _insist(self._next)) is not None:
            fn, deliver = job
            result = outcome.capture(fn)
            del job, fn
            try:
                # Whoever waits for it would wait for ever if it were lost.
                _insist(partial(deliver, result))
            except BaseException:
                log.exception("a thread's result could not be delivered")
            del result, deliver


def _insist(do: Callable[[], Result]) -> Result:
    """`do()`, again for as long as there is no memory for it."""
    while True:
        try:
            return do()
        except MemoryError:
            time.sleep(AGAIN_S)


def take_over() -> None:
    """From now on trio's jobs are done by these.  Raises NoThread when too few can be started."""
    threading.stack_size(STACK)
    workers = Workers()
    try:
        workers.reserve()
    except RuntimeError:
        raise NoThread(NO_THREAD) from None
    _thread_cache.THREAD_CACHE = workers  # type: ignore[assignment]
