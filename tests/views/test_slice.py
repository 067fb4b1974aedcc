"""Parts of a disk as files of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from imgfs.sources.local.file import open_file
from imgfs.views.raw import RawView
from imgfs.views.slice import SliceView

from .test_decoded import opened

CONTENT = bytes(range(200))


def test_parts_one_behind_the_other(tmp_path: Path) -> None:
    async def main() -> None:
        view = SliceView("1.raw", await opened(tmp_path / "f", CONTENT), [(50, 60), (10, 12)])
        assert view.size == 12
        assert await view.read(0, 12) == CONTENT[50:60] + CONTENT[10:12]
        assert await view.read(9, 2) == CONTENT[59:60] + CONTENT[10:11]
        assert view.map.read(8, 4) == CONTENT[58:60] + CONTENT[10:12]

    trio.run(main)


def test_holes_are_the_disks(tmp_path: Path) -> None:
    async def main() -> None:
        with (tmp_path / "f").open("wb") as file:
            file.truncate(1 << 20)
            file.seek(512 << 10)
            file.write(b"x" * 4096)
        disk = RawView(await open_file(str(tmp_path / "f")))
        view = SliceView("1.raw", disk, [(256 << 10, 768 << 10)])
        await view.prepare()
        assert view.stored_bytes == 4096
        assert view.map.seek(0, os.SEEK_DATA) == 256 << 10

    trio.run(main)


@pytest.mark.parametrize("part", [(0, 201), (10, 10), (-1, 5), (20, 10)])
def test_parts_outside_of_the_disk(tmp_path: Path, part: tuple[int, int]) -> None:
    async def main() -> None:
        disk = await opened(tmp_path / "f", CONTENT)
        with pytest.raises(ValueError, match="not a part"):
            SliceView("1.raw", disk, [part])

    trio.run(main)
