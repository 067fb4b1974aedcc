"""Free ranges read as zeroes and are holes; all else is the disk's."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from imgfs.views import sparse
from imgfs.views.sparse import SparseView

from .test_decoded import opened

SIZE = 300
CONTENT = bytes(i % 255 + 1 for i in range(SIZE))


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=SIZE, max_size=SIZE), st.integers(1, 9), st.data())
def test_sparse(
    tmp_path_factory: pytest.TempPathFactory, cells: list[bool], step: int, data: st.DataObject
) -> None:
    free: list[int] = []
    for at, is_free in enumerate(cells):
        if is_free and free and free[-1] == at:
            free[-1] = at + 1
        elif is_free:
            free += [at, at + 1]
    wanted = bytes(0 if is_free else c for is_free, c in zip(cells, CONTENT, strict=True))
    path = tmp_path_factory.mktemp("sparse") / "disk"
    before, sparse.STEP = sparse.STEP, step

    async def main() -> None:
        disk = await opened(path, CONTENT)
        view = SparseView("disk.raw", disk, free)
        start = data.draw(st.integers(0, SIZE))
        end = data.draw(st.integers(start, SIZE))
        assert await view.read(start, end - start) == wanted[start:end]
        await view.prepare()
        assert view.map.read(0, SIZE) == wanted
        assert view.stored_bytes == SIZE - sum(cells)
        await disk.source.aclose()

    try:
        trio.run(main)
    finally:
        sparse.STEP = before


@pytest.mark.parametrize("free", [(5, 5), (0, SIZE + 1), (10, 20, 15, 30), (10, 20, 20, 30)])
def test_ranges_that_cannot_be(tmp_path: Path, free: tuple[int, ...]) -> None:
    async def main() -> None:
        disk = await opened(tmp_path / "disk", CONTENT)
        with pytest.raises(ValueError, match="not a free range"):
            SparseView("disk.raw", disk, free)

    trio.run(main)
