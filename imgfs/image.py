"""The one interface for bytes: an image, whatever it is over.

A layer is an image over an image.  Every call from one layer to the next goes through
`Image.read` and `Image.extents`, the checked crossing: the range lies inside the image,
the answer is as long as was asked for, calls and bytes are counted, and one debug line
says "layer: op offset length".  A layer implements `_read` and `_extents` and may take all
of that for granted.  Offsets are positional: there is no cursor.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

from imgfs.errors import OutOfRange, ShortRead
from imgfs.extents import ExtentList, all_data

log = logging.getLogger(__name__)

Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(slots=True)
class Counters:
    """What has crossed into a layer since it was made."""

    reads: int = 0
    misses: int = 0  #: those reads that waited for the source; a layer that keeps bytes counts them
    bytes_read: int = 0
    errors: int = 0
    in_flight: int = 0
    last_error: str = ""
    failure: Exception | None = None  #: of the read that ended last; None when that went well

    @contextlib.contextmanager
    def counted(self, length: int) -> Iterator[None]:
        """Around a read of so many bytes."""
        self.in_flight += 1
        try:
            yield
        except Exception as exc:
            self.errors += 1
            self.last_error = str(exc)
            self.failure = exc
            raise
        finally:
            self.in_flight -= 1
        self.failure = None
        self.reads += 1
        self.bytes_read += length


@dataclass(slots=True)
class Program:
    """A program's read; all tasks that it leads to have it in their context."""

    missed: bool = False


_program: ContextVar[Program | None] = ContextVar("program", default=None)


class Image(ABC):
    """`size` bytes that can be read at any offset.

    `name` is for messages.  `read` and `extents` may be called concurrently; both are
    cancellable at any await, after which nothing of the call remains but what a cache kept.
    """

    name: str
    size: int

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.counters = Counters()

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly `length` bytes from `offset`.

        Raises OutOfRange when the range is not inside the image, ShortRead when the layer
        gave another number of bytes, and whatever ImgfsError the layer has to say.
        """
        self._check_range("read", offset, length)
        if length == 0:
            return b""
        with self.counters.counted(length):
            data = await self._read(offset, length)
            if len(data) != length:
                raise ShortRead(
                    f"{self.name}: {len(data)} bytes instead of {length} at offset {offset}"
                )
        return data

    async def extents(self, offset: int, length: int) -> ExtentList:
        """What is data, zero or hole in the range; covers exactly `[offset, offset+length)`.

        Raises as `read` does.
        """
        self._check_range("extents", offset, length)
        if length == 0:
            return all_data(offset, offset)
        found = await self._extents(offset, length)
        if found.start != offset or found.end != offset + length:
            raise ShortRead(
                f"{self.name}: extents of [{found.start}, {found.end}) instead of "
                f"[{offset}, {offset + length})"
            )
        return found

    def missed(self) -> None:
        """Note that the read under way had to wait for its source."""
        self.counters.misses += 1
        program = _program.get()
        if program is not None:
            program.missed = True

    async def answer(self, counters: Counters, offset: int, length: int) -> Buffer:
        """As `read`, for a program: counted in `counters` too, whatever it leads to below."""
        program = Program()
        token = _program.set(program)
        try:
            with counters.counted(length):
                data = await self.read(offset, length)
        finally:
            _program.reset(token)
        counters.misses += program.missed
        return data

    async def aclose(self) -> None:  # noqa: B027 - most layers hold nothing
        """Release what the layer holds; the layer below is its owner's to close."""

    @abstractmethod
    async def _read(self, offset: int, length: int) -> Buffer: ...

    async def _extents(self, offset: int, length: int) -> ExtentList:
        return all_data(offset, offset + length)

    def _check_range(self, op: str, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OutOfRange(
                f"{self.name}: {op} of {length} bytes at {offset}, outside of {self.size}"
            )
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s: %s %d %d", self.name, op, offset, length)
