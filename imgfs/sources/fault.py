"""A source over a source that goes wrong by plan, so that tests reach what servers do rarely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import trio

from imgfs.errors import ImgfsError, SourceChanged
from imgfs.extents import ExtentList
from imgfs.image import Buffer
from imgfs.sources.base import Source


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one read.  The parts happen in the order in which they stand here."""

    delay_s: float = 0  #: seconds before anything else; math.inf: no answer ever
    changed: bool = False  #: from now on the source is another one than was opened
    error: type[ImgfsError] | None = None  #: raised instead of reading
    missing: int = 0  #: so many of the last bytes do not come


class FaultSource(Source):
    """`below`, except that its nth read, counted from 1, meets `plan[n]`.

    Reads without an entry meet `otherwise`.  Reads are numbered as they begin, so that
    concurrent ones have numbers of their own.  `began` is how many there were.  Extents are
    never wrong, but SourceChanged once it changed.
    """

    def __init__(
        self,
        below: Source,
        plan: Mapping[int, Fault],
        otherwise: Fault | None = None,
    ) -> None:
        super().__init__(below.name, below.url, below.stat)
        self.began = 0
        self._below = below
        self._plan = dict(plan)
        self._otherwise = otherwise or Fault()
        self._is_changed = False

    async def check_identity(self) -> None:
        """As the source below; SourceChanged once a read was planned to change it."""
        self._same()
        await self._below.check_identity()

    async def aclose(self) -> None:
        await self._below.aclose()

    async def _read(self, offset: int, length: int) -> Buffer:
        self.began += 1
        number = self.began
        fault = self._plan.get(number, self._otherwise)
        if fault.delay_s:
            await trio.sleep(fault.delay_s)
        if fault.changed:
            self._is_changed = True
        self._same()
        if fault.error is not None:
            raise fault.error(f"{self.name}: planned to fail at read {number}")
        data = await self._below.read(offset, length)
        return data[: max(0, length - fault.missing)] if fault.missing else data

    async def _extents(self, offset: int, length: int) -> ExtentList:
        self._same()
        return await self._below.extents(offset, length)

    def _same(self) -> None:
        if self._is_changed:
            raise SourceChanged(f"{self.name}: changed since it was opened, as planned")
