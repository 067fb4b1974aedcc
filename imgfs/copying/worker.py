"""What runs on a worker of a Dask cluster: one task of `imgfs copy --dask`, in a thread.

The worker is told no errors: an outcome has them, so that dask neither logs what was asked, which
may hold secrets, nor tries again what cannot succeed.  What it does, the client hears of by events
of one topic; the scheduler keeps so many events of each, so there is one for all copies.

Dask gives a lost worker's tasks to others, and cannot know whether the lost one is dead; it may
only have been stopped, or cut off.  So a task holds a lease from the scheduler while it runs, which
outlives its holder by distributed.scheduler.locks.lease-timeout; and it changes nothing unless the
scheduler has said, less than half of that ago, that the task is this worker's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pickle
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import dask
import trio
from dask.utils import parse_timedelta
from distributed import Semaphore, get_worker
from distributed.core import Status
from distributed.utils import sync
from distributed.worker import Worker

from imgfs import __version__
from imgfs.copying.progress import Copy, Reporter
from imgfs.copying.record import Facts, Notes
from imgfs.copying.shares import Plan, Task, Work
from imgfs.errors import ImgfsError, SourceChanged

log = logging.getLogger(__name__)

TOPIC = "imgfs-copy"
TOLD_S = 0.5  # how often it is told how far a task is
WATCH_S = 0.5  # how soon a task ends that nobody wants any more
ASK_S = 5.0  # how often the scheduler is asked whose a task is, at least
GUARD_S = 0.02


@dataclass(frozen=True, slots=True)
class Request:
    """`run` is the client's, `key` names the task in it; `known` are an earlier copy's facts and
    mark."""

    run: str
    key: str
    lease: str
    task: Task
    known: tuple[dict[str, object], int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """`is_spoilt`: what was copied is of no use to anybody."""

    error: str = ""
    is_spoilt: bool = False
    plan: Plan | None = None
    done: int = 0
    verified: int = 0


def packed(found: Request | Outcome) -> bytes:
    """Not as text: the scheduler may show what it is given."""
    return zlib.compress(pickle.dumps(found), 1)


def unpacked(data: bytes) -> Any:
    """[blocks] What was packed, by one who may run programs here anyway."""
    return pickle.loads(zlib.decompress(data))


def run(version: str, request: bytes) -> bytes:
    """[blocks] Do it; the outcome, packed."""
    worker = get_worker()
    if version != __version__:
        where = f"the worker {worker.address} has imgfs {__version__}, and the client {version}"
        return packed(Outcome(f"{where}; they must be the same"))
    asked: Request = unpacked(request)
    return _Run(worker, asked).run()


def _now() -> float:
    """Seconds; a machine that sleeps goes on counting."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class _Unwanted(Exception):
    """The task has been cancelled, or its worker is about to end."""


class _Run:
    def __init__(self, worker: Worker, asked: Request) -> None:
        self._worker = worker
        self._asked = asked
        self._key = worker.get_current_task()
        self._told = _Telling(self)
        notes = _TellingNotes(self, asked.known)
        self._work = Work(asked.task, self._told, notes, self._guard)
        lease = dask.config.get("distributed.scheduler.locks.lease-timeout")
        self._good_s = float(parse_timedelta(lease)) / 2 if lease != "inf" else math.inf
        self._good_until = 0.0

    def run(self) -> bytes:
        self.tell("begun")
        outcome = Outcome("cancelled")
        try:
            with contextlib.suppress(_Unwanted), self._leased():
                outcome = trio.run(self._watched)
                # Before the task ends: who hears this asks for nothing else.
                self.tell("outcome", outcome=packed(outcome))
        finally:
            self.tell("left")
        return packed(outcome)

    def tell(self, what: str, **more: object) -> None:
        """The client, soon."""
        said = {"run": self._asked.run, "key": self._asked.key, "what": what, **more}
        self._worker.log_event(TOPIC, {**said, "worker": self._worker.address})

    def _is_wanted(self) -> bool:
        if self._worker.status not in (Status.running, Status.paused, Status.closing_gracefully):
            return False
        task = self._worker.state.tasks.get(self._key)
        return task is not None and task.state != "cancelled"

    @contextlib.contextmanager
    def _leased(self) -> Iterator[None]:
        while True:
            lease = Semaphore(max_leases=1, name=self._asked.lease)
            with contextlib.suppress(RuntimeError, KeyError):  # a client has just closed it
                if lease.acquire(timeout=1):
                    break
            if not self._is_wanted():
                raise _Unwanted
        try:
            yield
        finally:
            if self._worker.status == Status.running:
                lease.release()

    async def _watched(self) -> Outcome:
        outcome: Outcome | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, nursery.cancel_scope)
            nursery.start_soon(self._keep_asking, nursery.cancel_scope)
            outcome = await self._outcome()
            nursery.cancel_scope.cancel()
        if outcome is None:
            raise _Unwanted
        return outcome

    async def _watch(self, scope: trio.CancelScope) -> None:
        while self._is_wanted():
            await trio.sleep(WATCH_S)
        scope.cancel()

    async def _keep_asking(self, scope: trio.CancelScope) -> None:
        """The scheduler, whether the task is ours."""
        while True:
            asked = _now()
            try:
                ours = await trio.to_thread.run_sync(self._ask, abandon_on_cancel=True)
            except OSError as exc:
                log.warning("%s: %s", self._asked.key, exc)
            else:
                if ours:
                    self._good_until = asked + self._good_s
                else:
                    scope.cancel()
            await trio.sleep(min(self._good_s / 4, ASK_S))

    def _ask(self) -> bool:
        worker = self._worker
        try:
            found = sync(worker.loop, worker.scheduler.processing, workers=[worker.address])
        except KeyError:  # it knows no such worker any more
            return False
        return any(self._key in keys for keys in found.values())

    async def _guard(self) -> None:
        while _now() >= self._good_until:
            await trio.sleep(GUARD_S)

    async def _outcome(self) -> Outcome:
        copy, plan = self._work.copy, None
        try:
            if self._asked.task.step == "begin":
                plan = await self._work.begin()
            else:
                await getattr(self._work, self._asked.task.step)()
        except (ImgfsError, OSError) as exc:
            error = f"{str(exc) or repr(exc)} (on {self._worker.address})"
            return Outcome(error, isinstance(exc, SourceChanged))
        except Exception as exc:
            log.exception("%s", self._asked.key)
            return Outcome(f"{copy.name}: {exc!r} (on {self._worker.address})")
        return Outcome(plan=plan, done=copy.done, verified=copy.verified)


class _Telling(Reporter):
    """Tells the client what a person is to see."""

    def __init__(self, run: _Run) -> None:
        super().__init__(1)
        self._run = run
        self._next = 0.0

    def begin(self, copy: Copy) -> None:
        self._run.tell("sizes", size=copy.size, data=copy.data, resumed=copy.resumed)

    def advance(self, copy: Copy) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + TOLD_S
            self._run.tell("progress", done=copy.done, verified=copy.verified)

    def note(self, text: str) -> None:
        self._run.tell("note", text=text.encode("utf-8", "surrogateescape"))

    def tell(self, text: str) -> None:
        self._run.tell("telling", text=text.encode("utf-8", "surrogateescape"))


class _TellingNotes(Notes):
    """Has the client keep the notes, which is where a person would go on."""

    def __init__(self, run: _Run, known: tuple[dict[str, object], int]) -> None:
        self._run = run
        self._known = known

    def known(self) -> tuple[dict[str, object], int]:
        return self._known

    def begin(self, facts: Facts, mark: int) -> None:
        self._run.tell("facts", facts=json.dumps(asdict(facts)), mark=mark)

    def mark(self, end: int) -> None:
        self._run.tell("mark", end=end)

    def remove(self) -> None:
        """The outcome says as much."""
