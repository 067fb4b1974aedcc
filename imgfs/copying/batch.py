"""Many copies, some of them at once; one that fails does not stop the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import trio

from imgfs.copying.budget import Budget
from imgfs.copying.destination import Destination, Place
from imgfs.copying.engine import Move, compare
from imgfs.copying.jobs import Job
from imgfs.copying.progress import Copy, Reporter
from imgfs.copying.record import Facts, Record
from imgfs.errors import ImgfsError, NeverDurable, SourceChanged, UsageError
from imgfs.extents import ExtentList
from imgfs.library import shown_as
from imgfs.opener import Opened, shown_source
from imgfs.sources.file import FileSource
from imgfs.views.opening import Chain
from imgfs.views.sparse import SparseView, look
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
            options = replace(job.wish.options, write=False)
            disk = self._opened.disk(job.wish.source, options, job.wish.directory)
            async with disk as (url, chain):
                await self._copy(job, url, chain, copy)
        except (ImgfsError, OSError) as exc:
            error = str(exc) or repr(exc)
        self._reporter.end(copy, error)
        return error

    async def _copy(self, job: Job, url: str, chain: Chain, copy: Copy) -> None:
        place = Place(job.destination, self._opened.sources, job.wish.options)
        disk, token = chain.disk, chain.token(url)
        if self._how.sparse:
            disk = SparseView(disk.name, disk, (await look(disk)).free)
            token = "sparse " + token
        file_name = place.shown.rpartition("/")[2]
        view = await shown_as(disk, job.format, file_name, token)
        extents = await view.extents(0, view.size)
        record = await trio.to_thread.run_sync(Record, place.shown)
        try:
            facts = Facts(
                source=url,
                identity=chain.token(url) if chain.identity is not None else "",
                shown=" ".join((job.format, file_name, *chain.formats)),
                sparse=self._how.sparse,
                size=view.size,
                destination=place.shown,
                token="",
            )
            resumed = self._resumed(record, facts) if self._how.resume else None
            destination, start = await self._open(place, record, facts, resumed)
            try:
                _refuse_itself(chain, destination)
                await self._move(view, extents, destination, record, start, copy)
            finally:
                with trio.CancelScope(shield=True):
                    await destination.aclose()
            record.remove()
        finally:
            record.close()

    def _resumed(self, record: Record, facts: Facts) -> tuple[str, int] | None:
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
        self, place: Place, record: Record, facts: Facts, resumed: tuple[str, int] | None
    ) -> tuple[Destination, int]:
        token, mark = resumed or (None, 0)
        destination, is_known = await place.open(facts.size, token)
        if resumed is not None and not is_known:
            why = "what was written before is not there any more"
            if not destination.can_resume:
                why = "an object in S3 is written at one go"
            self._reporter.note(f"{place.shown}: starts at its beginning: {why}")
        mark = mark if is_known else 0
        if destination.can_resume:
            record.begin(facts.of(destination.token), mark)
        return destination, mark

    async def _move(
        self,
        view: View,
        extents: ExtentList,
        destination: Destination,
        record: Record,
        start: int,
        copy: Copy,
    ) -> None:
        copy.size = view.size
        copy.data = _data_bytes(extents)
        copy.done = copy.resumed = copy.data - _data_bytes(extents.clip(start, extents.end))
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
            if destination.is_seen_at_end:
                await destination.finish()
            if self._how.verify:
                await compare(view, extents, await destination.written(), self._budget, verified)
            if not destination.is_seen_at_end:
                await destination.finish()


@contextlib.contextmanager
def _spoilt_by_change(record: Record) -> Iterator[None]:
    """What was copied of a source that has changed is of no use to anybody."""
    try:
        yield
    except SourceChanged:
        record.remove()
        raise


def _data_bytes(extents: ExtentList) -> int:
    return sum(end - start for start, end in extents.data_ranges())


def _refuse_itself(chain: Chain, destination: Destination) -> None:
    """Raises UsageError where the copy would go into what it is made of."""
    written = getattr(destination, "source", None)
    for file in chain.files:
        source = file.source
        is_same = source.url == destination.name
        if isinstance(source, FileSource) and isinstance(written, FileSource):
            is_same = is_same or source.is_same_file(written)
        if is_same:
            raise UsageError(f"{destination.name}: is what would be copied, or below it")
