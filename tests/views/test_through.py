"""What is on its way to a source, and what is asked of it meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import trio

from imgfs.sources.local.file import open_file
from imgfs.views.through import ThroughView

MIB = 1 << 20


def test_zeroes_over_an_end_that_is_on_its_way(tmp_path: Path) -> None:
    """They begin inside of the source, and end in what makes it longer when it arrives."""
    path = tmp_path / "disk"
    size = 2 * MIB
    start, data, more = os.urandom(size), os.urandom(MIB), os.urandom(5000)

    async def main() -> None:
        path.write_bytes(start)
        source = await open_file(str(path), write=True)
        async with trio.open_nursery() as nursery:
            view = ThroughView(source, None, None, nursery, hard=False)
            await view.prepare()
            for number in range(20):
                at = size - 100 - number
                await view.write(0, data)
                await view.write(size, more)
                await view.zero(at, 3000, punch=True)
                await view.sync()
                assert view.failure is None
                wanted = data + start[MIB:at] + bytes(3000) + more[2900 - number :]
                assert path.read_bytes() == wanted
                assert bytes(await view.read(0, view.size)) == wanted
                await view.resize(size)
                await view.write(at, start[at:])
            await view.sync()
        await source.aclose()

    trio.run(main)
