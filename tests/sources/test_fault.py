"""Faults by plan: on their own, and what the cache makes of them."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from imgfs.cache.cached import open_cached
from imgfs.cache.fills import FAILED_S
from imgfs.cache.space import CacheSpace
from imgfs.errors import ShortRead, SourceChanged, SourceUnreachable
from imgfs.sources.fault import Fault, FaultSource
from imgfs.sources.local.file import open_file

from .conftest import MIB, run


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    data = os.urandom(MIB)
    (tmp_path / "full.img").write_bytes(data)
    return data


@asynccontextmanager
async def faulty(
    tmp_path: Path, plan: dict[int, Fault], otherwise: Fault | None = None
) -> AsyncIterator[FaultSource]:
    below = await open_file(str(tmp_path / "full.img"), extents=True)
    source = FaultSource(below, plan, otherwise)
    yield source
    await source.aclose()


def test_each_fault_meets_its_read(content: bytes, tmp_path: Path) -> None:
    async def main() -> None:
        plan = {2: Fault(error=SourceUnreachable), 3: Fault(missing=1), 5: Fault(changed=True)}
        async with faulty(tmp_path, plan) as source:
            assert await source.read(10, 20) == content[10:30]
            with pytest.raises(SourceUnreachable, match="at read 2"):
                await source.read(0, 10)
            with pytest.raises(ShortRead, match="9 bytes instead of 10"):
                await source.read(0, 10)
            assert await source.read(0, MIB) == content
            await source.check_identity()
            for _ in range(2):
                with pytest.raises(SourceChanged):
                    await source.read(0, 10)
            with pytest.raises(SourceChanged):
                await source.check_identity()
            with pytest.raises(SourceChanged):
                await source.extents(0, MIB)
            assert source.began == 6

    run(main)


def test_no_answer_until_cancelled(content: bytes, tmp_path: Path) -> None:
    async def main() -> None:
        async with faulty(tmp_path, {1: Fault(delay_s=math.inf)}) as source:
            with trio.move_on_after(0.05) as scope:
                await source.read(0, 10)
            assert scope.cancelled_caught
            assert await source.read(0, 10) == content[:10]

    run(main)


@pytest.mark.parametrize(
    ("fault", "error"),
    [(Fault(error=SourceUnreachable), SourceUnreachable), (Fault(missing=5), ShortRead)],
)
def test_cache_keeps_nothing_of_a_failed_fetch(
    content: bytes, tmp_path: Path, fault: Fault, error: type[Exception]
) -> None:
    root = tmp_path / "cache"
    root.mkdir()

    async def main() -> None:
        async with (
            faulty(tmp_path, {1: fault}) as source,
            open_cached(source, CacheSpace(4 * MIB), root) as cached,
        ):
            await cached.prepare()
            with pytest.raises(error):
                await cached.read(0, 4096)
            assert cached.map.read(0, 4096) is None
            assert cached.store.present == 0
            await trio.sleep(FAILED_S)  # so long it is remembered
            assert await cached.read(0, MIB) == content

    run(main)
