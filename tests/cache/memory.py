"""A source in memory whose every fetch a test can hold up, count, or make fail."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable

import trio

from imgfs.extents import ExtentList, all_data
from imgfs.sources.base import Identity, Source, SourceStat


class MemorySource(Source):
    """`gate` is passed by every fetch; `fail(offset, length)` may raise."""

    def __init__(self, content: bytes, extents: ExtentList | None = None, name: str = "disk.img"):
        token = hashlib.sha256(content).hexdigest()
        stat = SourceStat(len(content), 0, 0o600, Identity("stat", token))
        super().__init__(name, f"memory:{name}", stat)
        self.content = content
        self.known = extents or all_data(0, len(content))
        self.fetched: list[tuple[int, int]] = []
        self.asked_for_extents = 0
        self.gate = trio.Event()
        self.gate.set()
        self.running = 0
        self.most_running = 0
        self.fail: Callable[[int, int], None] = lambda offset, length: None

    async def check_identity(self) -> None:
        pass

    async def _extents(self, offset: int, length: int) -> ExtentList:
        self.asked_for_extents += 1
        return self.known.clip(offset, offset + length)

    async def _read(self, offset: int, length: int) -> bytes:
        self.fetched.append((offset, length))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.gate.wait()
            await trio.lowlevel.checkpoint()
            self.fail(offset, length)
            return self.content[offset : offset + length]
        finally:
            self.running -= 1

    @property
    def bytes_fetched(self) -> int:
        return sum(length for _, length in self.fetched)


def extents(*parts: tuple[int, int]) -> ExtentList:
    """From (end, flags) pairs."""
    return ExtentList(0, array("Q", [end for end, _ in parts]), bytes(f for _, f in parts))
