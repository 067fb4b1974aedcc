"""Code that needs bytes but does no input: it says which, and is given them.

A `Steps[T]` is a generator that ends with a T.  In between it yields what it needs, a batch of
reads that may be done at once or a file to open, and is sent the answers; an answer that cannot be
had is raised inside of it.  Only the functions here yield; all others use `yield from`:

    def open_disk(size: int) -> Steps[Disk]:
        header = yield from read(0, 104)

File 0 is what it is about; `open_file` gives the numbers of others.  One driver does all
the reading (`imgfs.views.drive`); tests drive the same code over bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

from imgfs.image import Buffer

T = TypeVar("T")

MOST_BYTES = 64 << 20  # of all reads of one batch


class Read(NamedTuple):
    """A range of a file, in bytes."""

    offset: int
    length: int
    file: int = 0


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file that another one names.  Whether the name may be followed is the driver's to say."""

    name: str


class Opened(NamedTuple):
    file: int
    size: int  #: bytes


Steps: TypeAlias = Generator[Sequence[Read] | OpenFile, Any, T]


def read(offset: int, length: int, file: int = 0) -> Steps[bytes]:
    """The bytes of the range; fewer where the file ends before it does."""
    (found,) = yield from read_all([Read(offset, length, file)])
    return found


def read_all(reads: Sequence[Read]) -> Steps[list[bytes]]:
    """As `read`, several at once; together they may ask for `MOST_BYTES`."""
    if not reads:
        return []
    found: list[Buffer] = yield reads
    return [bytes(part) for part in found]


def open_file(name: str) -> Steps[Opened]:
    """Raises what opening it raises, and UsageError where the name may not be followed."""
    opened: Opened = yield OpenFile(name)
    return opened


def together(jobs: Sequence[Steps[T]], at_once: int = 8) -> Steps[list[T]]:
    """Run several to their ends, `at_once` at a time; what they need next is one batch, so that all
    of them take as many round trips as the longest one.

    The answers are in the jobs' order.  A batch that fails is raised in every job that had a part
    in it; what a job raises ends the others, and is raised.
    """
    results: dict[int, T] = {}
    waiting = deque(range(len(jobs)))
    needs: dict[int, Sequence[Read] | OpenFile] = {}

    def resume(index: int, step: Callable[[], Sequence[Read] | OpenFile]) -> None:
        try:
            needs[index] = step()
        except StopIteration as end:
            results[index] = end.value

    try:
        while waiting or needs:
            while waiting and len(needs) < at_once:
                index = waiting.popleft()
                resume(index, jobs[index].__next__)
            yield from _one_batch(jobs, needs, resume)
    finally:
        for job in jobs:
            job.close()
    return [results[index] for index in range(len(jobs))]


def _one_batch(
    jobs: Sequence[Steps[T]],
    needs: dict[int, Sequence[Read] | OpenFile],
    resume: Callable[[int, Callable[[], Sequence[Read] | OpenFile]], None],
) -> Steps[None]:
    """As much of what is needed as one batch may hold; the jobs that wait longest come first."""
    taken: dict[int, int] = {}
    batch: list[Read] = []
    room = MOST_BYTES
    for index, need in needs.items():
        if isinstance(need, OpenFile):
            if taken:
                continue
            taken[index] = 0
            break
        length = sum(each.length for each in need)
        if length <= room or not taken:
            taken[index] = len(need)
            batch.extend(need)
            room -= length
    if not taken:
        return
    first = needs[next(iter(taken))]
    for index in taken:
        del needs[index]
    try:
        answers = yield first if isinstance(first, OpenFile) else batch
    except Exception as failure:
        for index in taken:
            resume(index, partial(jobs[index].throw, failure))
        return
    if isinstance(first, OpenFile):
        index = next(iter(taken))
        resume(index, partial(jobs[index].send, answers))
        return
    start = 0
    for index, count in taken.items():
        part = answers[start : start + count]
        start += count
        resume(index, partial(jobs[index].send, part))
