"""Runs sans-IO code (imgfs.steps) over images: the one driver that does all the reading."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

import trio

from imgfs.image import Image
from imgfs.steps import MOST_BYTES, Opened, OpenFile, Read, Steps
from imgfs.views.view import View

T = TypeVar("T")
I = TypeVar("I", bound=Image)  # noqa: E741

MOST_PEEK = 1 << 20  # bytes of which some may be zeroes

OpenBeside = Callable[[str], Awaitable[I]]


async def drive(steps: Steps[T], files: list[I], open_beside: OpenBeside[I] | None = None) -> T:
    """Run it to its end over `files`, of which the first is what it is about.

    A file that it names is opened by `open_beside` and appended.  What cannot be read or opened is
    raised inside of it.  Raises what it raises.
    """
    answer: object = None
    failure: Exception | None = None
    while True:
        try:
            need = steps.send(answer) if failure is None else steps.throw(failure)
        except StopIteration as end:
            result: T = end.value
            return result
        answer = failure = None
        try:
            if isinstance(need, OpenFile):
                assert open_beside is not None, f"{need.name}: nothing can be opened here"
                files.append(await open_beside(need.name))
                answer = Opened(len(files) - 1, files[-1].size)
            else:
                answer = await _read_all(need, files)
        except Exception as exc:
            failure = exc


def run_on(steps: Steps[T], known: Callable[[int, int], bytes | None]) -> T | None:
    """Its result, if `known(offset, length)` gives all the bytes of its one file that it needs.

    Raises what it raises.
    """
    answer: object = None
    while True:
        try:
            need = steps.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result
        parts = [] if isinstance(need, OpenFile) else [known(r.offset, r.length) for r in need]
        if not parts or None in parts:
            steps.close()
            return None
        answer = parts


async def _read_all(reads: Sequence[Read], files: Sequence[Image]) -> list[bytes]:
    assert reads, "an empty batch is no progress"
    assert sum(read.length for read in reads) <= MOST_BYTES
    length = sum(read.length for read in reads)
    if length <= MOST_PEEK and all(
        isinstance(file, View) and file.is_only_looked_at for file in files
    ):
        # There is no disk to wait for.
        found = _local(reads, files)
        await _peek_all(reads, files, found)
    elif None in (found := await _now(reads, files)):
        # A thread for each of a thousand tables would take longer than reading them.
        found = await trio.to_thread.run_sync(_local, reads, files, abandon_on_cancel=True)
    for read, part in zip(reads, found, strict=True):
        if part is not None:
            files[read.file].counters.reads += 1
            files[read.file].counters.bytes_read += len(part)

    async def one(index: int, read: Read) -> None:
        file = files[read.file]
        offset, length = _inside(read, file)
        # A cache gives views of its buffers; parsers compare and search.
        found[index] = bytes(await file.read(offset, length))

    await all_of(
        [partial(one, index, read) for index, read in enumerate(reads) if found[index] is None]
    )
    return [part for part in found if part is not None]


async def _peek_all(
    reads: Sequence[Read], files: Sequence[Image], found: list[bytes | None]
) -> None:
    """Fill in what can be had without keeping it."""
    for number, file in enumerate(files):
        wanted = [i for i, each in enumerate(reads) if found[i] is None and each.file == number]
        ranges = [_inside(reads[index], file) for index in wanted]
        if not ranges:
            continue
        assert isinstance(file, View)
        parts = await file.peek(ranges)
        for index, part in zip(wanted, parts or (), strict=parts is not None):
            found[index] = bytes(part)


async def _now(reads: Sequence[Read], files: Sequence[Image]) -> list[bytes | None]:
    """What no disk need be waited for; None is the rest."""
    found: list[bytes | None] = []
    for read in reads:
        file = files[read.file]
        if not isinstance(file, View):
            return [None] * len(reads)
        await file.make_local()
        found.append(file.read_now(*_inside(read, file)))
        if found[-1] is None:
            break
    return found + [None] * (len(reads) - len(found))


def _inside(read: Read, file: Image) -> tuple[int, int]:
    offset = min(read.offset, file.size)
    return offset, min(read.length, file.size - offset)


def _local(reads: Sequence[Read], files: Sequence[Image]) -> list[bytes | None]:
    """In a thread: what need not be fetched; None is the rest."""
    found: list[bytes | None] = []
    for read in reads:
        file = files[read.file]
        found.append(file.read_local(*_inside(read, file)) if isinstance(file, View) else None)
    return found


async def all_of(jobs: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run them at once.  Raises the first failure; the others are cancelled by that."""
    if len(jobs) == 1:
        return await jobs[0]()
    failures: list[Exception] = []

    async def one(job: Callable[[], Awaitable[None]]) -> None:
        try:
            await job()
        except Exception as exc:
            failures.append(exc)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for job in jobs:
            nursery.start_soon(one, job)
    if failures:
        raise failures[0]
