"""Chains of qcow2 files that qemu has written, read through views as qemu reads them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from imgfs.formats.layout import About
from imgfs.formats.qcow2_layout import layout
from imgfs.sources.local.file import open_file
from imgfs.views.encoded import EncodedView
from imgfs.views.opening import open_chain
from imgfs.views.raw import RawView
from imgfs.views.view import View
from tests.formats import qemu


def make_chain(directory: Path, rng: random.Random) -> Path:
    """Each disk longer or shorter than the one below it; only the bottom one is raw."""
    below, kind = directory / "base.raw", "raw"
    below.write_bytes(rng.randbytes(1 << 20))
    for number, size in enumerate(rng.choices([512 << 10, 1 << 20, (3 << 20) + 512], k=3)):
        path = directory / f"{number}.qcow2"
        options = f"cluster_size={1 << rng.randint(14, 17)},extended_l2={rng.choice(['on', 'off'])}"
        command = ["create", "-q", "-f", "qcow2", "-o", options, "-b", below.name, "-F", kind]
        qemu.img(*command, path, str(size))
        qemu.io(path, "qcow2", "write -c -P 9 128k 128k", *qemu.scribble(rng, size, 6))
        below, kind = path, "qcow2"
    return below


@pytest.mark.parametrize("seed", range(6))
def test_chains(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    top = make_chain(tmp_path, rng)
    wanted = qemu.raw(top, "qcow2")

    async def main() -> None:
        views: list[RawView] = []

        async def opened(path: Path) -> RawView:
            views.append(RawView(await open_file(str(path))))
            return views[-1]

        async def beside(view: View, name: str) -> RawView:
            return await opened(tmp_path / name)

        chain = await open_chain("disk.raw", await opened(top), beside)
        assert chain.formats == ("qcow2", "qcow2", "qcow2", "raw")
        disk = chain.disk
        assert await disk.read(0, disk.size) == wanted
        for _ in range(10):
            start = rng.randrange(disk.size)
            length = rng.randint(1, disk.size - start)
            assert await disk.read(start, length) == wanted[start : start + length]
        await disk.prepare()
        extents = await disk.extents(0, disk.size)
        for extent in extents:
            assert not extent.is_zero or not any(wanted[extent.start : extent.end])
        shown = EncodedView("disk.qcow2", disk, layout(extents, About("disk.qcow2", "id", 0)))
        again = tmp_path / "shown.qcow2"
        again.write_bytes(await shown.read(0, shown.size))
        for view in views:
            await view.source.aclose()
        assert "No errors" in qemu.img("check", again)
        assert qemu.raw(again, "qcow2") == wanted

    trio.run(main)
