"""The same images for a program that does not run under trio: everything waits for its answer.

    with imgfs.plain.open_image("ssh://kool/disk.qcow2") as image:
        for extent in image.extents():
            ...

Each `open_image` has a thread of its own, in which trio runs.  Its images can be used from any
thread, also from several at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

import trio

from imgfs import library
from imgfs.config.options import Options
from imgfs.extents import ExtentList

T = TypeVar("T")


class _Loop:
    """trio in a thread."""

    def __init__(self, token: trio.lowlevel.TrioToken, nursery: trio.Nursery) -> None:
        self._token = token
        self._nursery = nursery

    def call(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        return trio.from_thread.run(function, *args, trio_token=self._token)

    @contextmanager
    def held(self, block: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """The asynchronous block, entered and left in a task of its own."""
        given: Future[T] = Future()
        left: Future[None] = Future()
        leave = trio.Event()

        async def hold() -> None:
            try:
                async with block as value:
                    given.set_result(value)
                    await leave.wait()
                left.set_result(None)
            except BaseException as exc:
                (left if given.done() else given).set_exception(exc)
                if not isinstance(exc, Exception):
                    raise

        self._token.run_sync_soon(self._nursery.start_soon, hold)
        value = given.result()
        try:
            yield value
        finally:
            self._token.run_sync_soon(leave.set)
            left.result()


@contextmanager
def _running() -> Iterator[_Loop]:
    started: Future[_Loop] = Future()
    end = trio.Event()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            started.set_result(_Loop(trio.lowlevel.current_trio_token(), nursery))
            await end.wait()

    thread = threading.Thread(target=trio.run, args=(main,), name="imgfs", daemon=True)
    thread.start()
    loop = started.result()
    try:
        yield loop
    finally:
        loop._token.run_sync_soon(end.set)
        thread.join()


class DiskImage:
    """As `imgfs.library.DiskImage`, word for word, and waiting."""

    def __init__(self, loop: _Loop, image: library.DiskImage) -> None:
        """For `open_image` only."""
        self._loop = loop
        self._image = image

    @property
    def name(self) -> str:
        return self._image.name

    @property
    def size(self) -> int:
        return self._image.size

    def read(self, offset: int, length: int) -> bytes:
        return self._loop.call(self._image.read, offset, length)

    def extents(self, offset: int = 0, length: int | None = None) -> ExtentList:
        return self._loop.call(self._image.extents, offset, length)

    def shown_as(self, format: str) -> DiskImage:
        return DiskImage(self._loop, self._loop.call(self._image.shown_as, format))

    def sparse(self) -> DiskImage:
        return DiskImage(self._loop, self._loop.call(self._image.sparse))

    def partitions(self) -> dict[str, DiskImage]:
        found = self._loop.call(self._image.partitions)
        return {name: DiskImage(self._loop, image) for name, image in found.items()}


class OpenImage(DiskImage):
    """As `imgfs.library.OpenImage`, and waiting."""

    def __init__(self, loop: _Loop, image: library.OpenImage) -> None:
        super().__init__(loop, image)
        self._opened = image
        self.url = image.url
        self.formats = image.formats

    @property
    def stored(self) -> DiskImage:
        return DiskImage(self._loop, self._opened.stored)

    def snapshots(self) -> list[str]:
        return self._loop.call(self._opened.snapshots)

    @contextmanager
    def snapshot(self, name: str) -> Iterator[DiskImage]:
        with self._loop.held(self._opened.snapshot(name)) as image:
            yield DiskImage(self._loop, image)


@contextmanager
def open_image(
    source: str | os.PathLike[str], options: Options | None = None
) -> Iterator[OpenImage]:
    """As `imgfs.open_image`, and waiting."""
    with _running() as loop, loop.held(library.open_image(source, options)) as image:
        yield OpenImage(loop, image)
