"""One image, copied by several processes: what each does, without knowing of the others.

    begin ----> the whole image is copied, where it is small or one alone can write there
          ----> a plan: its shares, which are copied in any order, and perhaps compared,
                and then finished

Each opens source and destination for itself, and proves that they are those of the plan.  What
runs them, and runs again what was lost, is in cluster.py; how it is done on a machine in worker.py.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import trio

from imgfs.copying.batch import Batch, How, data_bytes, refuse_itself, refuse_own_name
from imgfs.copying.budget import MIB, Budget
from imgfs.copying.destination import Destination, Guard
from imgfs.copying.engine import PIECE, Move, compare
from imgfs.copying.jobs import Job
from imgfs.copying.place import Place
from imgfs.copying.progress import Copy, Reporter
from imgfs.copying.record import Facts, Notes
from imgfs.copying.shown import Shown, showing
from imgfs.errors import NeverDurable, SourceChanged, SourceNotFound
from imgfs.extents import ExtentList
from imgfs.opener.disks import Opened, opening
from imgfs.url.shown import shown_source

SHARE = 256 * MIB  # of data, at least
MOST_SHARES = 256

Step = Literal["begin", "share", "compare", "finish"]


class Share(NamedTuple):
    """A range of what is written, and how much of it is data."""

    start: int
    end: int
    data: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What the shares of one image have in common.

    `is_known`: what an earlier copy wrote is there yet.
    """

    facts: Facts  #: with the token of what is written
    digest: str
    file_token: str
    shares: tuple[Share, ...]
    is_known: bool


@dataclass(frozen=True, slots=True)
class Task:
    """A step of a job.  The first has no plan, and only some have a share."""

    step: Step
    job: Job
    how: How
    plan: Plan | None = None
    share: Share | None = None


class Work:
    """One task, as it is done in this process; `reporter` hears of it."""

    def __init__(self, task: Task, reporter: Reporter, notes: Notes, guard: Guard) -> None:
        """`notes` are of the whole image; `guard` is asked before each change."""
        self._task = task
        self._reporter = reporter
        self._notes = notes
        self._guard = guard
        self.copy = Copy(
            task.job.name, shown_source(task.job.wish.source), shown_source(task.job.destination)
        )

    async def begin(self) -> Plan | None:
        """A plan of how to copy it; None: it has been copied.  Raises as copying does."""
        how = self._task.how
        async with self._opened() as (opened, place, shown):
            batch = Batch(opened, how, self._reporter)
            refuse_own_name(shown.chain, place.shown)
            shares = divide(shown.extents, max(SHARE, data_bytes(shown.extents) // MOST_SHARES))
            if len(shares) > 1:
                resumed = batch.resumed(self._notes, shown.facts) if how.resume else None
                token = secrets.token_hex(16)
                shared = await place.begin_shared(
                    shown.facts.size, token, resumed[0] if resumed else None
                )
                if shared is not None:
                    try:
                        refuse_itself(shown.chain, shared.destination)
                    finally:
                        with trio.CancelScope(shield=True):
                            await shared.destination.aclose()
                    if resumed and not shared.is_known:
                        why = "what was written before is not there any more"
                        self._reporter.note(f"{place.shown}: starts at its beginning: {why}")
                    return Plan(
                        shown.facts.of(shared.token),
                        await shown.digest(),
                        shared.file_token,
                        tuple(shares),
                        bool(resumed) and shared.is_known,
                    )
            await batch.copy(shown, place, self._notes, self.copy)
            return None

    async def share(self) -> None:
        """Copy it, and make it durable.  Raises as copying does."""
        async with self._joined() as (shown, destination, extents):
            move = Move(shown.view, extents, destination, Budget(), self._advanced)
            try:
                await move.run(extents.start, lambda mark: None)
            except NeverDurable as exc:
                self._reporter.note(str(exc))

    async def compare(self) -> None:
        """Nobody writes any more.  Raises CopyDiffers, and what reading raises."""
        async with self._joined() as (shown, destination, extents):
            written = await destination.written()
            await compare(shown.view, extents, written, Budget(), self._verified)

    async def finish(self) -> None:
        """All has been copied; it gets its name, if it has not got it from who did this before.

        Raises as copying does.
        """
        plan = self._plan
        async with self._opened() as (_, place, shown):
            await _check_same(shown, plan)
            try:
                destination = await place.join(plan.facts.size, plan.facts.token, plan.file_token)
            except SourceNotFound:
                if await place.is_finished(plan.facts.size, plan.file_token):
                    return
                raise
            try:
                await shown.view.check()
                await destination.finish()
            finally:
                with trio.CancelScope(shield=True):
                    await destination.aclose()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[tuple[Opened, Place, Shown]]:
        job = self._task.job
        options = job.wish.all_options()
        async with opening(options) as opened:
            others = self._task.plan is not None
            place = Place(
                job.destination, opened.sources, options, self._guard, among_others=others
            )
            sparse = self._task.how.sparse
            async with showing(opened, job, options, sparse, anywhere=True) as shown:
                yield opened, place, shown

    @asynccontextmanager
    async def _joined(self) -> AsyncIterator[tuple[Shown, Destination, ExtentList]]:
        plan, share = self._plan, self._task.share
        assert share is not None
        async with self._opened() as (_, place, shown):
            await _check_same(shown, plan)
            destination = await place.join(plan.facts.size, plan.facts.token)
            try:
                self.copy.size, self.copy.data = share.end - share.start, share.data
                self._reporter.begin(self.copy)
                yield shown, destination, shown.extents.clip(share.start, share.end)
            finally:
                with trio.CancelScope(shield=True):
                    await destination.aclose()

    @property
    def _plan(self) -> Plan:
        assert self._task.plan is not None
        return self._task.plan

    def _advanced(self, count: int) -> None:
        self.copy.done += count
        self._reporter.advance(self.copy)

    def _verified(self, count: int) -> None:
        self.copy.verified += count
        self._reporter.advance(self.copy)


def divide(extents: ExtentList, step: int) -> list[Share]:
    """All of it in shares of about `step` bytes of data, in order and without gaps."""
    shares: list[Share] = []
    start = data = 0
    for first, end in extents.data_ranges():
        at = first
        while data + end - at > step:
            cut = max(at, at + step - data)
            cut += -cut % PIECE
            if cut >= end:
                break
            shares.append(Share(start, cut, data + cut - at))
            start, at, data = cut, cut, 0
        data += end - at
    shares.append(Share(start, extents.end, data))
    return shares


async def _check_same(shown: Shown, plan: Plan) -> None:
    """Raises SourceChanged when it is not what the plan is of."""
    source = shown.facts.source
    if shown.facts != replace(plan.facts, token=""):
        raise SourceChanged(
            f"{source}: is not what the copy was begun of; it has changed, or is another one here"
        )
    if await shown.digest() != plan.digest:
        raise SourceChanged(
            f"{source}: its holes are not told as where the copy was begun; is a helper missing?"
        )
