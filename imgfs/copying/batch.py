"""Many copies, some of them at once; one that fails does not stop the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import trio

from imgfs.copying.budget import Budget
from imgfs.copying.destination import Destination
from imgfs.copying.engine import Move, compare
from imgfs.copying.jobs import Job
from imgfs.copying.place import Place
from imgfs.copying.progress import Copy, Reporter
from imgfs.copying.record import Facts, Notes, Record
from imgfs.copying.shown import Shown, showing
from imgfs.errors import ImgfsError, NeverDurable, NoSpace, SourceChanged, UsageError
from imgfs.extents import ExtentList
from imgfs.opener.disks import Opened
from imgfs.sources.local.file import FileSource
from imgfs.units import format_size
from imgfs.url.shown import shown_source
from imgfs.views.opening import Chain
from imgfs.views.view import View


@dataclass(frozen=True, slots=True)
class How:
    """What was said of all copies."""

    sparse: bool = False
    resume: bool = False
    verify: bool = False
    at_once: int = 1


class Batch:
    """Makes copies of what `opened` opens; `reporter` hears of them."""

    def __init__(self, opened: Opened, how: How, reporter: Reporter) -> None:
        self._opened = opened
        self._how = how
        self._reporter = reporter
        self._budget = Budget()

    async def run(self, jobs: Sequence[Job]) -> list[str]:
        """Make them, in order; what failed, a line each."""
        failures: dict[int, str] = {}
        waiting = iter(enumerate(jobs))

        async def work() -> None:
            for index, job in waiting:
                error = await self._one(job)
                if error:
                    failures[index] = error

        async with trio.open_nursery() as nursery:
            for _ in range(min(self._how.at_once, len(jobs))):
                nursery.start_soon(work)
        return [failures[index] for index in sorted(failures)]

    async def _one(self, job: Job) -> str:
        """Why it failed; empty: it did not."""
        source, shown = shown_source(job.wish.source), shown_source(job.destination)
        copy = Copy(job.name, source, shown)
        error = ""
        try:
            options = job.wish.all_options()
            place = Place(job.destination, self._opened.sources, options)
            async with showing(self._opened, job, options, self._how.sparse) as shown_:
                record = await trio.to_thread.run_sync(Record, place.shown)
                try:
                    await self.copy(shown_, place, record, copy)
                finally:
                    record.close()
        except (ImgfsError, OSError) as exc:
            error = str(exc) or repr(exc)
        self._reporter.end(copy, error)
        return error

    async def copy(self, shown: Shown, place: Place, record: Notes, copy: Copy) -> None:
        """One of them.  Raises what reading and writing raise."""
        resumed = self.resumed(record, shown.facts) if self._how.resume else None
        refuse_own_name(shown.chain, place.shown)
        destination, start = await self._open(place, record, shown.facts, resumed)
        try:
            refuse_itself(shown.chain, destination)
            await self._move(shown.view, shown.extents, destination, record, start, copy)
        finally:
            with trio.CancelScope(shield=True):
                await destination.aclose()
        record.remove()

    def resumed(self, record: Notes, facts: Facts) -> tuple[str, int] | None:
        """The token and the mark of what an earlier copy left, if it can go on."""
        known, mark = record.known()
        why = facts.differs(known) if known else "nothing is left of an earlier copy"
        if not facts.identity:
            why = "nothing tells whether the source is still the same; -o identity= would"
        if why:
            self._reporter.note(f"{facts.destination}: starts at its beginning: {why}")
            return None
        return str(known["token"]), mark

    async def _open(
        self, place: Place, record: Notes, facts: Facts, resumed: tuple[str, int] | None
    ) -> tuple[Destination, int]:
        token, mark = resumed or (None, 0)
        destination, is_known = await place.open(facts.size, token)
        if resumed is not None and not is_known:
            why = "what was written before is not there any more"
            if not destination.can_resume:
                why = "an object in S3 is written at one go"
            self._reporter.note(f"{place.shown}: starts at its beginning: {why}")
        mark = mark if is_known else 0
        if mark:
            self._reporter.tell(f"{place.shown}: goes on at {format_size(mark)}")
        elif is_known:
            why = "nothing was recorded as durable yet"
            self._reporter.note(f"{place.shown}: starts at its beginning: {why}")
        if destination.can_resume:
            record.begin(facts.of(destination.token), mark)
        return destination, mark

    async def _move(
        self,
        view: View,
        extents: ExtentList,
        destination: Destination,
        record: Notes,
        start: int,
        copy: Copy,
    ) -> None:
        copy.size = view.size
        copy.data = data_bytes(extents)
        copy.done = copy.resumed = copy.data - data_bytes(extents.clip(start, extents.end))
        self._reporter.begin(copy)

        def advanced(count: int) -> None:
            copy.done += count
            self._reporter.advance(copy)

        def verified(count: int) -> None:
            copy.verified += count
            self._reporter.advance(copy)

        with _spoilt_by_change(record):
            move = Move(view, extents, destination, self._budget, advanced)
            try:
                await move.run(start, record.mark)
            except NeverDurable as exc:
                self._reporter.note(str(exc))
            except NoSpace as exc:
                if not destination.part_name:
                    raise
                left = f"{destination.part_name} stays, for --resume"
                raise NoSpace(f"{exc}; {left}") from exc
            if destination.is_seen_at_end:
                await destination.finish()
            if self._how.verify:
                await compare(view, extents, await destination.written(), self._budget, verified)
            if not destination.is_seen_at_end:
                await destination.finish()


@contextlib.contextmanager
def _spoilt_by_change(record: Notes) -> Iterator[None]:
    """What was copied of a source that has changed is of no use to anybody."""
    try:
        yield
    except SourceChanged:
        record.remove()
        raise


def data_bytes(extents: ExtentList) -> int:
    return sum(end - start for start, end in extents.data_ranges())


def refuse_own_name(chain: Chain, destination: str) -> None:
    """As `refuse_itself`, by what it is called, before anything is made beside it."""
    if any(file.source.url == destination for file in chain.files):
        raise UsageError(f"{destination}: is what would be copied, or below it")


def refuse_itself(chain: Chain, destination: Destination) -> None:
    """Raises UsageError where the copy would go into what it is made of."""
    written = getattr(destination, "source", None)
    for file in chain.files:
        source = file.source
        is_same = source.url == destination.name
        if isinstance(source, FileSource) and isinstance(written, FileSource):
            is_same = is_same or source.is_same_file(written)
        if is_same:
            raise UsageError(f"{destination.name}: is what would be copied, or below it")
