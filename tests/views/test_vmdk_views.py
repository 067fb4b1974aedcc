"""VMDKs over sources: read with their extents and parents, and shown as streams."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from imgfs.errors import CorruptImage
from imgfs.formats import vmdk_stream_layout
from imgfs.sources.local.file import open_file
from imgfs.views.encoded import EncodedView
from imgfs.views.opening import open_chain
from imgfs.views.raw import RawView
from imgfs.views.view import View
from tests.formats import qemu
from tests.formats.shown import ABOUT, make_disk

MiB = 1 << 20


async def read_disk(path: Path) -> bytes:
    views: list[RawView] = []

    async def opened(name: str) -> RawView:
        views.append(RawView(await open_file(str(path.parent / name))))
        return views[-1]

    async def beside(view: View, name: str) -> View:
        return await opened(name)

    try:
        chain = await open_chain("disk.raw", await opened(path.name), beside)
        assert set(chain.formats) == {"vmdk"}
        await chain.disk.prepare()
        return bytes(await chain.disk.read(0, chain.disk.size))
    finally:
        for view in views:
            await view.source.aclose()


@pytest.mark.parametrize("subformat", ["streamOptimized", "twoGbMaxExtentSparse"])
def test_read_as_qemu_reads_it(subformat: str, tmp_path: Path) -> None:
    raw, path, size = tmp_path / "raw", tmp_path / "disk.vmdk", 9 * MiB + 3 * 512
    qemu.img("create", "-f", "raw", raw, str(size))
    qemu.io(raw, "raw", *qemu.scribble(random.Random(1), size, 9))
    qemu.img("convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", raw, path)
    assert trio.run(read_disk, path) == raw.read_bytes()


def test_a_chain_and_one_whose_parent_was_written_to(tmp_path: Path) -> None:
    base, delta = tmp_path / "base.vmdk", tmp_path / "delta.vmdk"
    qemu.img("create", "-f", "vmdk", base, "5M")
    qemu.io(base, "vmdk", "write -P 1 0 3M")
    qemu.img("create", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", delta)
    qemu.io(delta, "vmdk", "write -P 3 1M 1M")
    assert trio.run(read_disk, delta) == qemu.raw(delta, "vmdk")
    qemu.io(base, "vmdk", "write -P 2 0 512")
    with pytest.raises(CorruptImage, match=r"is not what delta\.vmdk was made on"):
        trio.run(read_disk, delta)


def test_a_stream_is_generated_as_it_is_read(tmp_path: Path) -> None:
    disk, out = tmp_path / "raw", tmp_path / "disk.vmdk"
    size = 40 * MiB + 777
    extents = make_disk(disk, size, [(0, 70_000), (5 * MiB, 9 * MiB), (33 * MiB, size)])
    layout = vmdk_stream_layout.layout(extents, ABOUT)

    async def main() -> None:
        below = RawView(await open_file(str(disk)))
        view = EncodedView("disk.vmdk", below, layout)
        rng = random.Random(1)
        with out.open("wb") as file:
            for offset in range(0, view.size, MiB):
                file.write(await view.read(offset, min(MiB, view.size - offset)))
        whole = out.read_bytes()
        for _ in range(50):
            offset = rng.randrange(view.size)
            length = min(rng.choice([1, 600, 70_000]), view.size - offset)
            assert await view.read(offset, length) == whole[offset : offset + length]
        await below.source.aclose()

    trio.run(main)
    assert "identical" in qemu.img("compare", "-f", "raw", "-F", "vmdk", disk, out)
    assert trio.run(read_disk, out)[:size] == disk.read_bytes()
