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

from imgfs.errors import OutOfRange, ReadOnlyView, ShortRead
from imgfs.extents import ExtentList, all_data

log = logging.getLogger(__name__)

Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(slots=True)
class Counters:
    """What has crossed into a layer since it was made."""

    reads: int = 0
    misses: int = 0  #: those reads that waited for the source; a layer that keeps bytes counts them
    bytes_read: int = 0
    writes: int = 0  #: zeroes and sizes too
    bytes_written: int = 0  #: without zeroes
    errors: int = 0
    in_flight: int = 0
    last_error: str = ""
    failure: Exception | None = None  #: of the read that ended last; None when that went well

    @contextlib.contextmanager
    def counted(self, length: int) -> Iterator[None]:
        """Around a read of so many bytes."""
        with self._under_way():
            yield
        self.reads += 1
        self.bytes_read += length

    @contextlib.contextmanager
    def changed(self, length: int = 0) -> Iterator[None]:
        """Around a write of so many bytes."""
        with self._under_way():
            yield
        self.writes += 1
        self.bytes_written += length

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
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


class WritableImage(Image):
    """An image that can be written where `is_writable` says so; otherwise ReadOnlyView.

    What has returned is read from then on; calls that overlap in bytes and in time happen in any
    order.  A call that fails or is cancelled may have changed any part of its range.
    """

    is_writable = False
    is_resizable = True
    knows_size = True  #: False: something that was to change it failed half-way, perhaps
    can_punch = False  #: can it give back the space of a range in the middle?

    async def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`; beyond the end only where it `is_resizable`, and it is longer then.

        Raises NoSpace, TooLarge, AccessDenied, OutOfRange, and whatever ImgfsError the layer has.
        """
        end = offset + len(data)
        self._check_write("write", offset, end - offset, self.is_resizable)
        if offset == end:
            return
        with self.counters.changed(end - offset), self._sizing(end > self.size):
            await self._write(offset, data)
        self.size = max(self.size, end)

    async def zero(self, offset: int, length: int) -> None:
        """The range, inside the image, reads as zeroes; where it `can_punch`, space is given back.

        Raises as `write` does.
        """
        self._check_write("zero", offset, length, False)
        if length == 0:
            return
        with self.counters.changed():
            await self._zero(offset, length)

    async def resize(self, size: int) -> None:
        """Longer by zeroes, or cut.  Raises UnsupportedFeature where not `is_resizable`, and as
        `write` does.
        """
        self._check_write("resize", 0, size, True)
        with self.counters.changed(), self._sizing(True):
            await self._resize(size)
        self.size = size

    async def flush(self) -> None:
        """What was written before this was called is durable.

        Raises NotDurable when that cannot be promised, and whatever ImgfsError the layer has.
        """
        self._check_write("flush", 0, 0, False)
        with self.counters.changed():
            await self._flush()

    @abstractmethod
    async def _write(self, offset: int, data: Buffer) -> None: ...

    @abstractmethod
    async def _zero(self, offset: int, length: int) -> None: ...

    @abstractmethod
    async def _resize(self, size: int) -> None: ...

    @abstractmethod
    async def _flush(self) -> None: ...

    @contextlib.contextmanager
    def _sizing(self, changes: bool) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.knows_size = self.knows_size and not changes
            raise

    def _check_write(self, op: str, offset: int, length: int, may_grow: bool) -> None:
        if not self.is_writable:
            raise ReadOnlyView(f"{self.name}: is read-only")
        if may_grow and offset >= 0 and length >= 0:
            log.debug("%s: %s %d %d", self.name, op, offset, length)
        else:
            self._check_range(op, offset, length)
