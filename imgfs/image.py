"""The one interface for bytes: an image, whatever it is over.

A layer is an image over an image.  Every call from one layer to the next goes through
`Image.read` and `Image.extents`, the checked crossing: the range lies inside the image,
the answer is as long as was asked for, calls and bytes are counted, and one debug line
says "layer: op offset length".  A layer implements `_read` and `_extents` and may take all
of that for granted.  Offsets are positional: there is no cursor.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
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
        counters = self.counters
        counters.in_flight += 1
        try:
            data = await self._read(offset, length)
            if len(data) != length:
                raise ShortRead(
                    f"{self.name}: {len(data)} bytes instead of {length} at offset {offset}"
                )
        except Exception as exc:
            counters.errors += 1
            counters.last_error = str(exc)
            counters.failure = exc
            raise
        finally:
            counters.in_flight -= 1
        counters.failure = None
        counters.reads += 1
        counters.bytes_read += length
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
