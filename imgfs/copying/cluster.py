"""`imgfs copy --dask`: who hands tasks to the workers of a Dask cluster, and hears of them.

What runs where, in which order, and again when a worker is lost, is dask's business.  Here is what
comes after what for each image (see shares.py), the notes by which an interrupted copy goes on, and
what a person sees.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imgfs import __version__
from imgfs.copying.batch import How
from imgfs.copying.jobs import Job
from imgfs.copying.progress import Copy, Reporter
from imgfs.copying.record import Facts, Record
from imgfs.copying.shares import Plan, Share, Step, Task
from imgfs.errors import ImgfsError, SourceUnreachable, UsageError
from imgfs.url.shown import shown_source

try:
    import distributed
    from distributed import Client, Future
    from distributed.comm.addressing import get_address_host_port, normalize_address
except ImportError as exc:
    raise ImgfsError(
        f"--dask needs dask.distributed, and {exc.name} is not there: pip install 'imgfs[dask]'"
    ) from None

from imgfs.copying.worker import TOPIC, Outcome, Request, packed, unpacked

ASK_S = 10.0  # how long workers are waited for to say which imgfs they have
LEAVE_S = 10.0  # how long it may take a task to end that has been cancelled
AT_ONCE = 256  # images, where nothing is said: each has a file open here
LOOK_S = 5.0  # how often it is looked whether there is any worker

# By name, not by reference: the scheduler unpickles it, and needs no imgfs for that.
_RUN = "__import__('imgfs.copying.worker').copying.worker.run(version, request)"
_VERSION = "__import__('imgfs').__version__"


@contextlib.contextmanager
def connected(address: str, timeout_s: float) -> Iterator[Client]:
    """A cluster, by its scheduler's address or the file that the scheduler wrote.

    Raises SourceUnreachable, and UsageError where no address is meant, or a worker has another
    imgfs.
    """
    for name in ("distributed", "distributed.client", "tornado", "tornado.application"):
        # What goes wrong is told in one place, which is ours.
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    where = _address(address)
    try:
        client = Client(where, timeout=timeout_s, set_as_default=False, name="imgfs-copy")
    except TimeoutError as exc:
        raise SourceUnreachable(f"{address}: no Dask scheduler in {timeout_s:.0f} s") from exc
    except (OSError, RuntimeError, OverflowError) as exc:
        raise SourceUnreachable(f"{address}: no Dask scheduler: {_one_line(exc)}") from exc
    try:
        _check_versions(client)
        yield client
    finally:
        client.close(timeout=2)


def _address(text: str) -> str:
    """Raises UsageError.  A Client that is given nonsense says more than one line."""
    try:
        found = str(json.loads(Path(text).read_text())["address"]) if _is_file(text) else text
        get_address_host_port(normalize_address(found))
    except (OSError, ValueError, KeyError, TypeError) as exc:
        what = "file" if _is_file(text) else "address"
        raise UsageError(f"{text}: not a Dask scheduler's {what}: {_one_line(exc)}") from exc
    return found


def _is_file(text: str) -> bool:
    return text.endswith(".json")


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__


def _check_versions(client: Client) -> None:
    """Raises UsageError.  A worker that does not answer is asked again by its first task."""
    answers: queue.SimpleQueue[dict[str, object]] = queue.SimpleQueue()

    def ask() -> None:
        with contextlib.suppress(Exception):
            answers.put(client.run(eval, _VERSION, on_error="return"))

    threading.Thread(target=ask, daemon=True).start()
    try:
        found = answers.get(timeout=ASK_S)
    except queue.Empty:
        return
    for worker, answer in sorted(found.items()):
        if isinstance(answer, ImportError):
            raise UsageError(f"the worker {worker} has no imgfs")
        if isinstance(answer, str) and answer != __version__:
            said = f"the worker {worker} has imgfs {answer}, and the client {__version__}"
            raise UsageError(f"{said}; they must be the same")


class _Image:
    """One job: begun, then perhaps in shares."""

    def __init__(self, index: int, job: Job) -> None:
        self.index = index
        self.job = job
        self.destination = shown_source(job.destination)
        self.copy: Copy | None = None
        self.is_shown = False
        self.record: Record | None = None
        self.known: tuple[dict[str, object], int] = ({}, 0)
        self.shares: list[tuple[int, int]] = []  # that an earlier copy made durable
        self.plan: Plan | None = None
        self.left = 0  # tasks of the step that is under way


@dataclass(slots=True, eq=False)
class _Asked:
    """A task; `done` and `verified` are as far as was told by `worker`."""

    image: _Image
    step: Step
    share: Share | None
    future: Future[bytes] | None = None
    worker: str = ""
    done: int = 0
    verified: int = 0


@dataclass(slots=True)
class _State:
    """What is under way: tasks by key, and who is at them; a lost worker never leaves."""

    asked: dict[str, _Asked] = field(default_factory=dict)
    inside: set[tuple[str, str]] = field(default_factory=set)
    leases: set[str] = field(default_factory=set)
    images: set[_Image] = field(default_factory=set)


class ClusterBatch:
    """As `Batch`, by the workers of a cluster; `reporter` hears of it in the calling thread."""

    def __init__(self, client: Client, how: How, reporter: Reporter) -> None:
        self._client = client
        self._how = how
        self._reporter = reporter
        self._run = uuid.uuid4().hex
        self._heard: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._state = _State()
        self._failures: dict[int, str] = {}
        self._notes: set[str] = set()

    def run(self, jobs: Sequence[Job]) -> list[str]:
        """[blocks] Make the copies; what failed, a line each.

        Raises SourceUnreachable when the scheduler is lost.
        """
        waiting = deque(_Image(index, job) for index, job in enumerate(jobs))
        limit = self._how.at_once or AT_ONCE
        self._client.subscribe_topic(TOPIC, self._hear)
        try:
            while waiting or self._state.images:
                while waiting and len(self._state.images) < limit:
                    self._start(waiting.popleft())
                self._next()
        finally:
            self._leave()
        return [self._failures[index] for index in sorted(self._failures)]

    def _start(self, image: _Image) -> None:
        self._state.images.add(image)
        try:
            image.record = Record(image.destination)
        except ImgfsError as exc:
            self._end(image, str(exc))
            return
        if self._how.resume:
            image.known, image.shares = image.record.known(), image.record.shares()
        self._ask(image, "begin")

    def _ask(self, image: _Image, step: Step, share: Share | None = None) -> None:
        at = "" if share is None else share.start
        key = f"{image.index}/{step}/{at}"
        lease = f"imgfs {image.destination} {at}"
        task = Task(step, image.job, self._how, image.plan, share)
        request = packed(Request(self._run, key, lease, task, image.known))
        asked = self._state.asked[key] = _Asked(image, step, share)
        self._state.leases.add(lease)
        asked.future = self._client.submit(
            eval,
            _RUN,
            {"version": __version__, "request": request},
            key=f"imgfs-copy-{self._run}-{key}",
            pure=False,
            priority=-image.index,
        )
        asked.future.add_done_callback(lambda future: self._heard.put(("ended", key)))

    def _hear(self, event: tuple[float, dict[str, Any]]) -> None:
        """In the client's thread."""
        if event[1]["run"] == self._run:
            self._heard.put(("said", event[1]))

    def _next(self) -> None:
        try:
            kind, found = self._heard.get(timeout=LOOK_S)
        except queue.Empty:
            if not self._workers():
                self._note("there is no worker; they are waited for")
            return
        if kind == "ended":
            self._ended(found)
        else:
            self._said(found)

    def _said(self, said: dict[str, Any]) -> None:
        key, what, worker = said["key"], said["what"], said["worker"]
        if what == "begun":
            self._state.inside.add((key, worker))
        elif what == "left":
            self._state.inside.discard((key, worker))
        asked = self._state.asked.get(key)
        if asked is None:
            return
        image = asked.image
        if what == "begun":
            self._begun(asked, worker)
        elif what == "sizes" and asked.step == "begin":
            self._show(image, said["size"], said["data"], said["resumed"])
            asked.done = said["resumed"]
        elif what == "progress":
            self._count(asked, said["done"], said["verified"])
        elif what == "note":
            self._note(said["text"].decode("utf-8", "surrogateescape"))
        elif what == "telling":
            self._reporter.tell(said["text"].decode("utf-8", "surrogateescape"))
        elif what == "facts" and image.record is not None:
            image.record.begin(Facts(**json.loads(said["facts"])), said["mark"])
        elif what == "mark" and image.record is not None:
            image.record.mark(said["end"])
        elif what == "outcome":
            self._outcome(key, unpacked(said["outcome"]))

    def _begun(self, asked: _Asked, worker: str) -> None:
        image = asked.image
        if asked.worker not in ("", worker):
            self._note(f"the worker {asked.worker} was lost; {worker} does its share again")
        asked.worker = worker
        if image.copy is None:
            image.copy = self._copy_of(image)
        if image.is_shown:
            self._count(asked, 0, 0)

    def _copy_of(self, image: _Image) -> Copy:
        return Copy(image.job.name, shown_source(image.job.wish.source), image.destination)

    def _show(self, image: _Image, size: int, data: int, resumed: int) -> None:
        if image.copy is not None and not image.is_shown:
            image.is_shown = True
            copy = image.copy
            copy.size, copy.data = size, data
            copy.done = copy.resumed = resumed
            self._reporter.begin(copy)

    def _count(self, asked: _Asked, done: int, verified: int) -> None:
        copy = asked.image.copy
        if copy is not None and asked.image.is_shown:
            copy.done += done - asked.done
            copy.verified += verified - asked.verified
            asked.done, asked.verified = done, verified
            self._reporter.advance(copy)

    def _ended(self, key: str) -> None:
        """What its events have not said: they come first, if they come."""
        asked = self._state.asked.get(key)
        if asked is None or asked.future is None:
            return
        status = asked.future.status
        if status == "finished":
            self._outcome(key, unpacked(asked.future.result()))
        elif status == "error":
            self._end(asked.image, _why(asked.future.exception()))
        elif status in ("cancelled", "lost"):
            raise SourceUnreachable("the Dask scheduler was lost; --resume goes on")

    def _outcome(self, key: str, outcome: Outcome) -> None:
        asked = self._state.asked.pop(key)
        image = asked.image
        if asked.future is not None:
            asked.future.release()
        if outcome.error:
            self._end(image, outcome.error, outcome.is_spoilt)
            return
        self._count(asked, outcome.done, outcome.verified)
        if asked.step == "begin":
            if outcome.plan is not None:
                self._planned(image, outcome.plan)
            else:
                self._end(image)
            return
        if asked.step == "share" and asked.share is not None and image.record is not None:
            image.record.share(asked.share.start, asked.share.end)
        image.left -= 1
        if not image.left:
            self._after(image, asked.step)

    def _planned(self, image: _Image, plan: Plan) -> None:
        image.plan = plan
        known = set(image.shares) if plan.is_known else set()
        there = [share for share in plan.shares if (share.start, share.end) in known]
        resumed = sum(share.data for share in there)
        self._show(image, plan.facts.size, sum(share.data for share in plan.shares), resumed)
        if image.record is not None:
            image.record.begin(plan.facts, 0)
            for share in there:
                image.record.share(share.start, share.end)
        todo = [share for share in plan.shares if share not in there]
        image.left = len(todo)
        for share in todo:
            self._ask(image, "share", share)
        if not todo:
            self._after(image, "share")

    def _after(self, image: _Image, step: Step) -> None:
        assert image.plan is not None
        if step == "finish":
            self._end(image)
        elif step == "share" and self._how.verify:
            image.left = len(image.plan.shares)
            for share in image.plan.shares:
                self._ask(image, "compare", share)
        else:
            image.left = 1
            self._ask(image, "finish")

    def _end(self, image: _Image, error: str = "", is_spoilt: bool = False) -> None:
        left = [key for key, asked in self._state.asked.items() if asked.image is image]
        self._cancel(left)
        self._state.images.discard(image)
        if image.record is not None:
            if not error or is_spoilt or not image.record.known()[0]:
                image.record.remove()
            image.record.close()
        if error:
            self._failures[image.index] = error
        self._reporter.end(image.copy or self._copy_of(image), error)

    def _cancel(self, keys: Sequence[str]) -> None:
        asked = [self._state.asked.pop(key) for key in keys]
        futures = [each.future for each in asked if each.future is not None]
        if futures and self._client.status == "running":
            self._client.cancel(futures)

    def _leave(self) -> None:
        """Nothing is under way any more when it has returned, so far as workers can be reached."""
        self._cancel(list(self._state.asked))
        for image in self._state.images:
            if image.record is not None:
                image.record.close()
        deadline = time.monotonic() + LEAVE_S
        while self._client.status == "running" and time.monotonic() < deadline:
            alive = self._workers()
            if not any(worker in alive for _, worker in self._state.inside):
                self._forget_leases()
                return
            with contextlib.suppress(queue.Empty):
                kind, found = self._heard.get(timeout=0.5)
                if kind == "said":
                    self._said(found)

    def _forget_leases(self) -> None:
        assert self._client.scheduler is not None
        for lease in self._state.leases:
            self._client.sync(self._client.scheduler.semaphore_close, name=lease)

    def _workers(self) -> dict[str, int]:
        found: dict[str, int] = self._client.nthreads()
        return found

    def _note(self, text: str) -> None:
        """Once: each share would say it."""
        if text not in self._notes:
            self._notes.add(text)
            self._reporter.note(text)


def _why(exc: BaseException | None) -> str:
    if isinstance(exc, distributed.KilledWorker):
        return f"the workers ended that copied it, the last of them {exc.last_worker.address}"
    if isinstance(exc, ImportError):
        return "a worker has no imgfs"
    return f"dask could not do it: {exc!r}".replace("\n", " ")
