"""Snapshots' disks against plain bytes: writes, zeroes, sizes, freezes, and being opened again."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from imgfs.fuse.operations import answer
from imgfs.image import Buffer
from imgfs.overlays.layer import Layer, open_layer
from imgfs.overlays.log import BLOCK
from imgfs.overlays.merge import begin_merge
from imgfs.overlays.store import Base, SnapshotStore
from imgfs.views.overlay import layers_in_use
from imgfs.views.snapshot import SnapshotView

from .test_decoded import opened

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
BASE = Base("/disk", 0, "raw", "stat", "1")


@asynccontextmanager
async def snapshot(store: SnapshotStore, name: str, base: Path) -> AsyncIterator[SnapshotView]:
    from imgfs.sources.local.file import open_file
    from imgfs.views.raw import RawView

    below = RawView(await open_file(str(base)))
    layers = store.open_layers((name,), writable=True)
    view = SnapshotView(name, layers, below)
    try:
        yield view
    finally:
        await view.aclose()
        await below.source.aclose()


async def merged(store: SnapshotStore, view: SnapshotView) -> None:
    merge, _ = begin_merge(store, layers_in_use())
    if merge is not None:
        while not merge.step():
            pass
        assert merge.finish()
        merged = store.layer_path(merge.pair.kept)
        await view.join(merge.pair.upper, merge.pair.lower, lambda: open_layer(merged))
        merge.close()


async def change(view: SnapshotView, model: bytearray, rng: random.Random) -> None:
    """Do one thing to both."""
    size = len(model)
    what = rng.random()
    offset = rng.randrange(size + 1)
    length = min(rng.choice([1, 100, 512, 4096, 10_000, 40_000]), size - offset)
    if rng.random() < 0.3:
        offset -= offset % BLOCK
    if what < 0.55 and length:
        data = rng.randbytes(length)
        await view.write(offset, data)
        model[offset : offset + length] = data
    elif what < 0.7 and length:
        await view.zero(offset, length, punch=rng.random() < 0.5)
        model[offset : offset + length] = bytes(length)
    elif what < 0.78:
        wanted = max(1, size + rng.randrange(-20_000, 20_000))
        await view.resize(wanted)
        model[:] = model[:wanted].ljust(wanted, b"\0")
    elif what < 0.82:
        data = rng.randbytes(500)
        await view.write(size, data)
        model += data
    elif what < 0.92:
        await view.sync()
    else:
        assert bytes(await view.read(offset, length)) == model[offset : offset + length]


@pytest.mark.parametrize("seed", range(200 if LONG else 8))
def test_anything_in_any_order(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    base = tmp_path / "base"
    content = rng.randbytes(rng.choice([BLOCK * 40, BLOCK * 40 + 77, 5000]))
    base.write_bytes(content)
    store = SnapshotStore("/disk", tmp_path / "state")
    store.create(("x",), BASE, len(content))
    model = bytearray(content)

    async def main() -> None:
        nonlocal model
        for _ in range(4):
            async with snapshot(store, "x", base) as view:
                assert view.size == len(model)
                frozen = None
                for _ in range(60):
                    await change(view, model, rng)
                    if rng.random() < 0.05:

                        def freeze(top: Layer, size: int) -> Layer | None:
                            return None if top.is_empty else store.freeze(("x",), size, top)

                        frozen = await view.frozen(freeze), bytes(model)
                    if rng.random() < 0.08:
                        await merged(store, view)
                if frozen is not None:
                    assert bytes(await frozen[0].read(0, frozen[0].size)) == frozen[1]
                assert bytes(await view.read(0, view.size)) == model
                for extent in await view.extents(0, view.size):
                    if extent.is_zero:
                        assert not any(model[extent.start : extent.end])
        assert base.read_bytes() == content

    trio.run(main)


def test_a_child_is_as_its_parent_was(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"b" * BLOCK * 4)
    store = SnapshotStore("/disk", tmp_path / "state")
    store.create(("x",), BASE, BLOCK * 4)

    async def main() -> None:
        async with snapshot(store, "x", base) as view:
            await view.write(0, b"1" * BLOCK)
            await view.freeze(lambda top, size: store.create(("x", "y"), BASE, size, top))
            await view.write(BLOCK, b"2" * BLOCK)
        layers = store.open_layers(("x", "y"), writable=True)
        below = await opened(tmp_path / "base", b"b" * BLOCK * 4)
        child = SnapshotView("y", layers, below)
        assert bytes(await child.read(0, BLOCK * 4)) == b"1" * BLOCK + b"b" * BLOCK * 3
        await child.aclose()
        await below.source.aclose()

    trio.run(main)


def test_the_frozen_disk_is_no_older_than_a_child(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"b" * BLOCK * 2)
    store = SnapshotStore("/disk", tmp_path / "state")
    store.create(("x",), BASE, BLOCK * 2)

    def freeze(top: Layer, size: int) -> Layer | None:
        return None if top.is_empty else store.freeze(("x",), size, top)

    async def main() -> None:
        async with snapshot(store, "x", base) as view:
            await view.write(0, b"1" * BLOCK)
            first = await view.frozen(freeze)
            assert await view.frozen(freeze) is first
            await view.write(BLOCK, b"2" * BLOCK)
            await view.freeze(lambda top, size: store.create(("x", "y"), BASE, size, top))
            second = await view.frozen(freeze)
            assert bytes(await second.read(0, BLOCK * 2)) == b"1" * BLOCK + b"2" * BLOCK
            assert bytes(await first.read(0, BLOCK * 2)) == b"1" * BLOCK + b"b" * BLOCK

    trio.run(main)


def test_growing_from_inside_of_a_block(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"b" * 5000)
    store = SnapshotStore("/disk", tmp_path / "state")
    store.create(("x",), BASE, 5000)

    async def main() -> None:
        async with snapshot(store, "x", base) as view:
            await view.resize(3 * BLOCK)
            await view.sync()
        async with snapshot(store, "x", base) as view:
            assert bytes(await view.read(0, 3 * BLOCK)) == b"b" * 5000 + bytes(3 * BLOCK - 5000)

    trio.run(main)


def test_writers_go_on_while_the_layers_change(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(bytes(BLOCK * 64))
    store = SnapshotStore("/disk", tmp_path / "state")
    store.create(("x",), BASE, BLOCK * 64)
    written = bytearray(BLOCK * 64)

    async def writer(view: SnapshotView, number: int) -> None:
        rng = random.Random(number)
        for _ in range(150):
            at = (rng.randrange(16) * 4 + number) * BLOCK + rng.randrange(8) * 512
            data = rng.randbytes(512)
            await view.write(at, data)
            written[at : at + 512] = data

    async def main() -> None:
        async with snapshot(store, "x", base) as view:
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(writer, view, number)
                for _ in range(20):
                    await view.freeze(lambda top, size: store.freeze(("x",), size, top))
            assert bytes(await view.read(0, view.size)) == written
        async with snapshot(store, "x", base) as view:
            assert bytes(await view.read(0, view.size)) == written

    trio.run(main)


def test_frozen_states_that_nobody_has_become_one(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(bytes(BLOCK * 64))
    store = SnapshotStore("/disk", tmp_path / "state")
    store.create(("x",), BASE, BLOCK * 64)

    async def main() -> None:
        async with snapshot(store, "x", base) as view:
            kept = None
            for number in range(20):
                await view.write(number * BLOCK, bytes([number + 1]) * BLOCK)
                await view.write(40 * BLOCK, bytes([number + 1]) * BLOCK)
                found = await view.frozen(lambda top, size: store.freeze(("x",), size, top))
                if number == 9:
                    kept = found
                del found
                for _ in range(3):
                    await merged(store, view)
            assert kept is not None
            assert bytes(await kept.read(0, 64 * BLOCK)) == b"".join(
                bytes([n]) * BLOCK for n in [*range(1, 11), *[0] * 30, 10, *[0] * 23]
            )
            assert len(view.layers) <= 4
            kept = None
            for _ in range(3):
                await merged(store, view)
            assert len(view.layers) == 2
            found = await view.read(0, 64 * BLOCK)
            assert bytes(found[40 * BLOCK : 41 * BLOCK]) == bytes([20]) * BLOCK
            assert [found[n * BLOCK] for n in range(20)] == list(range(1, 21))

    trio.run(main)


class CutAtOnce(SnapshotView):
    """Is cut as soon as somebody has begun to read it."""

    to_cut = True

    async def _read(self, offset: int, length: int) -> Buffer:
        if self.to_cut:
            self.to_cut = False
            await self.resize(1000)
        return await super()._read(offset, length)


@pytest.mark.parametrize(("offset", "left"), [(0, 1000), (900, 100), (5 * BLOCK, 0)])
def test_who_reads_while_it_is_cut_gets_what_is_left(
    tmp_path: Path, offset: int, left: int
) -> None:
    base = tmp_path / "disk.img"
    base.write_bytes(os.urandom(10 * BLOCK))

    async def main() -> None:
        store = SnapshotStore("/disk", tmp_path / "state")
        store.create(("x",), BASE, base.stat().st_size)
        async with snapshot(store, "x", base) as plain:
            view = CutAtOnce("x", plain.layers, plain.below)
            found = bytes(await answer(view, offset, 2 * BLOCK))
            assert found == base.read_bytes()[offset : offset + left]

    trio.run(main)
