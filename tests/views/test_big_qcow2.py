"""A disk of 16 TiB with clusters here and there: the round trips until its map is known."""

from __future__ import annotations

import os
from pathlib import Path

import trio
import trio.testing

from imgfs.cache.cached import Policy, open_cached
from imgfs.cache.space import CacheSpace
from imgfs.sources.base import Identity, Source, SourceStat
from imgfs.views.opening import open_chain
from imgfs.views.raw import RawView
from imgfs.views.through import StoredView
from tests.big_qcow2 import CLUSTER, scattered, write_qcow2

TIB = 1 << 40


class Far(Source):
    """A file whose answers come when `arrive` is called: that is one round trip."""

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        super().__init__(path.name, f"far:{path}", SourceStat(size, 0, 0o600, Identity("x", "1")))
        self._fd = os.open(path, os.O_RDONLY)
        self._waiting: list[trio.Event] = []
        self.bytes_read = 0

    async def check_identity(self) -> None:
        pass

    async def _read(self, offset: int, length: int) -> bytes:
        here = trio.Event()
        self._waiting.append(here)
        await here.wait()
        self.bytes_read += length
        return os.pread(self._fd, length, offset)

    def arrive(self) -> bool:
        """Whether there was anything on its way."""
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.set()
        return bool(waiting)

    async def aclose(self) -> None:
        os.close(self._fd)


async def nobody(view: StoredView, name: str) -> StoredView:
    raise AssertionError(name)


def test_all_tables_come_in_a_few_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    clusters = scattered(16 * TIB, 1000)
    data_at = write_qcow2(path, 16 * TIB, clusters)
    root = tmp_path / "cache"
    root.mkdir()

    async def main() -> None:
        source, trips = Far(path), 0
        async with (
            open_cached(source, CacheSpace(4 << 30), root, Policy()) as cache,
            trio.open_nursery() as nursery,
        ):

            async def look() -> None:
                chain = await open_chain("disk.raw", RawView(source, cache), nobody)
                await chain.disk.prepare()
                extents = await chain.disk.extents(0, chain.disk.size)
                found = {start // CLUSTER for start, _ in extents.data_ranges()}
                assert found <= clusters.keys()
                assert sum(e.length for e in extents if not e.is_zero) == 1000 * CLUSTER
                nursery.cancel_scope.cancel()

            nursery.start_soon(look)
            while True:
                await trio.testing.wait_all_tasks_blocked(0.25)
                trips += source.arrive()
                assert trips <= 5
        # Tables that were fetched twice, or data, would be more.
        assert source.bytes_read <= data_at + CLUSTER
        await source.aclose()

    trio.run(main)
