"""Copies between views against plain bytes, and what they cost."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import trio

from imgfs._native import _map
from imgfs.errors import SourceChanged
from imgfs.overlays.layer import Layer, open_layer
from imgfs.overlays.log import BLOCK
from imgfs.overlays.merge import begin_merge
from imgfs.overlays.records import SnapshotPath
from imgfs.overlays.store import Base, SnapshotStore
from imgfs.overlays.trim import begin_trim
from imgfs.sources.local.file import open_file
from imgfs.views.copying import Progress, copy_range
from imgfs.views.overlay import layers_in_use
from imgfs.views.raw import RawView
from imgfs.views.slice import SliceView
from imgfs.views.snapshot import SnapshotView
from imgfs.views.sparse import SparseView
from imgfs.views.view import View
from imgfs.views.writable import Writable

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
BASE = Base("/disk", 0, "raw", "stat", "1")


class World:
    """A base with snapshots, the views of both, and what each of them holds."""

    def __init__(self, directory: Path, content: bytes) -> None:
        self.path = directory / "base"
        self.content = content
        with self.path.open("wb") as file:
            for at in range(0, len(content), BLOCK):
                block = content[at : at + BLOCK]
                if any(block):
                    file.seek(at)
                    file.write(block)
            file.truncate(len(content))
        self.store = SnapshotStore("/disk", directory / "state")
        self.open: dict[SnapshotPath, SnapshotView] = {}
        self.models: dict[SnapshotPath, bytearray] = {}
        self.trimmed = 0  # bytes

    async def start(self) -> None:
        self.below = RawView(await open_file(str(self.path)))

    async def create(self, path: SnapshotPath) -> None:
        model = bytearray(self.models[path[:-1]] if path[:-1] else self.content)
        if path[:-1]:
            parent = self.view(path[:-1])
            await parent.freeze(lambda top, size: self.store.create(path, BASE, size, top))
        else:
            self.store.create(path, BASE, len(model))
        self.models[path] = model

    def view(self, path: SnapshotPath) -> SnapshotView:
        if path not in self.open:
            layers = self.store.open_layers(path, writable=True)
            self.open[path] = SnapshotView("/".join(path), layers, self.below)
        return self.open[path]

    async def freeze(self, path: SnapshotPath) -> None:
        def freeze(top: Layer, size: int) -> Layer | None:
            return None if top.is_empty else self.store.freeze(path, size, top)

        frozen = await self.view(path).frozen(freeze)
        assert bytes(await frozen.read(0, frozen.size)) == self.models[path]

    async def merge(self) -> None:
        merge, _ = begin_merge(self.store, layers_in_use())
        if merge is not None:
            while not merge.step():
                pass
            assert merge.finish()
            kept = self.store.layer_path(merge.pair.kept)
            for view in self.open.values():
                await view.join(merge.pair.upper, merge.pair.lower, lambda: open_layer(kept))
            merge.close()

    async def trim(self, path: SnapshotPath) -> None:
        """What the top hides of the layer below is given back, if nobody else needs that."""
        view = self.view(path)
        await view.prepare()
        names = view.written_layers
        if names is None:
            return
        top, lower, _ = names
        trim = begin_trim(self.store, top, lower, layers_in_use())
        if trim is None:
            return
        ranges = await view.hidden(lower)
        assert ranges is not None
        trim.start(ranges)
        while not trim.step():
            pass
        await view.join(lower, lower, lambda: open_layer(self.store.layer_path(lower)))
        trim.close()
        self.trimmed += sum(ranges[1]) - sum(ranges[0])

    async def close(self) -> None:
        while self.open:
            await self.open.popitem()[1].aclose()

    def stored(self) -> int:
        return sum(each.stat().st_blocks * 512 for each in self.store.directory.rglob("data"))


async def copy(source: View, at: int, target: Writable, to: int, length: int) -> int:
    """All of it, as a program does it that goes on after short copies."""
    done = 0
    while True:
        progress = Progress()
        await copy_range(source, at + done, target, to + done, length - done, progress)
        done += progress.done
        if not progress.done or done == length:
            return done


def some_content(rng: random.Random, length: int) -> bytes:
    found = b""
    while len(found) < length:
        run = rng.choice([BLOCK, BLOCK * 3, BLOCK * 5, 700])
        found += bytes(run) if rng.random() < 0.4 else rng.randbytes(run)
    return found[:length]


async def change(world: World, path: SnapshotPath, rng: random.Random) -> None:
    view, model = world.view(path), world.models[path]
    size = len(model)
    what, at = rng.random(), rng.randrange(size)
    length = min(rng.choice([1, 512, BLOCK, 10_000, 40_000]), size - at)
    if rng.random() < 0.5:
        at -= at % BLOCK
    if what < 0.4:
        data = rng.randbytes(length)
        await view.write(at, data)
        model[at : at + length] = data
    elif what < 0.6:
        await view.zero(at, length, punch=True)
        model[at : at + length] = bytes(length)
    elif what < 0.75:
        wanted = max(1, size + rng.choice([-BLOCK * 4, -777, 777, BLOCK * 4]))
        await view.resize(wanted)
        model[:] = model[:wanted].ljust(wanted, b"\0")
    elif what < 0.85:
        await view.sync()
    elif what < 0.9:
        await world.freeze(path)
    elif what < 0.97:
        if rng.random() < 0.7:
            await world.freeze(path)
            data = rng.randbytes(length)
            await view.write(at, data)
            model[at : at + length] = data
            await view.sync()
        await world.trim(path)
    else:
        await world.merge()


async def copy_some(world: World, rng: random.Random) -> None:
    """From any view to any snapshot: mostly to the same place."""
    paths = sorted(world.models)
    into = rng.choice(paths)
    target, model = world.view(into), world.models[into]
    source: View
    kind = rng.random()
    if kind < 0.3:
        source, content = world.below, world.content
    elif kind < 0.4:
        start, end = sorted(rng.sample(range(0, len(world.content), 512), 2))
        source = SparseView("sparse", world.below, [start, end])
        content = world.content[:start] + bytes(end - start) + world.content[end:]
    elif kind < 0.5:
        start, end = sorted(rng.sample(range(0, len(world.content), 512), 2))
        source, content = SliceView("1", world.below, [(start, end)]), world.content[start:end]
    else:
        other = rng.choice(paths)
        source, content = world.view(other), bytes(world.models[other])
    at = rng.randrange(len(content))
    length = rng.choice([1, 512, BLOCK, 3 * BLOCK, 50_000, 1 << 30])
    if rng.random() < 0.7:
        at -= at % BLOCK
    to = at if rng.random() < 0.7 else rng.randrange(len(model) + 3000)
    if isinstance(source, SliceView) and rng.random() < 0.7:
        to = at + start
    length = min(length, len(content) - at)
    if source is target:
        if to == at:
            return
        length = min(length, abs(to - at))
    assert await copy(source, at, target, to, length) == length
    model.extend(bytes(max(0, to - len(model))))
    model[to : to + length] = content[at : at + length]


@pytest.mark.parametrize("seed", range(300 if LONG else 12))
def test_anything_in_any_order(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    content = some_content(rng, rng.choice([BLOCK * 40, BLOCK * 40 + 77, 5000]))
    world = World(tmp_path, content)

    async def main() -> None:
        await world.start()
        await world.create(("x",))
        await world.create(("z",))
        for _ in range(3):
            for turn in range(50):
                if rng.random() < 0.5:
                    await copy_some(world, rng)
                else:
                    await change(world, rng.choice(sorted(world.models)), rng)
                if turn == 20 and len(world.models) < 5:
                    parent = rng.choice(sorted(world.models))
                    await world.create((*parent, f"c{len(world.models)}"))
            for path, model in world.models.items():
                view = world.view(path)
                assert view.size == len(model)
                assert bytes(await view.read(0, view.size)) == model, path
                for extent in await view.extents(0, view.size):
                    assert not (extent.is_zero and any(model[extent.start : extent.end]))
            await world.close()
            for path, model in world.models.items():
                view = world.view(path)
                assert bytes(await view.read(0, view.size)) == model, path
        await world.close()
        await world.below.source.aclose()
        assert world.path.read_bytes() == content

    trio.run(main)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, os.urandom(BLOCK * 16) + bytes(BLOCK * 16) + os.urandom(BLOCK * 8 + 99))


def test_the_base_onto_its_snapshot_is_not_stored(world: World) -> None:
    async def main() -> None:
        await world.start()
        await world.create(("x",))
        view, size = world.view(("x",)), len(world.content)
        await view.write(0, os.urandom(size))
        await view.sync()
        assert world.stored() > size - BLOCK
        await view.resize(0)
        assert await copy(world.below, 0, view, 0, size) == size
        await view.sync()
        assert world.stored() == 0 and view.top.is_empty
        assert bytes(await view.read(0, size)) == world.content
        await world.close()
        assert bytes(await world.view(("x",)).read(0, size)) == world.content
        await world.close()

    trio.run(main)


def test_bytes_that_are_below_stay_until_that_is_durable(world: World) -> None:
    """And what is written there since stays in any case."""

    async def main() -> None:
        await world.start()
        await world.create(("x",))
        view, data = world.view(("x",)), os.urandom(BLOCK * 4)
        await view.write(0, data)
        await view.sync()
        await copy(world.below, 0, view, 0, BLOCK * 4)
        assert os.pread(view.top.data, BLOCK * 4, 0) == data
        await view.write(BLOCK, data[:BLOCK])
        await view.sync()
        found = os.pread(view.top.data, BLOCK * 4, 0)
        assert found == bytes(BLOCK) + data[:BLOCK] + bytes(BLOCK * 2)
        seen = world.content[:BLOCK] + data[:BLOCK] + world.content[2 * BLOCK : 4 * BLOCK]
        assert bytes(await view.read(0, BLOCK * 4)) == seen
        await world.close()

    trio.run(main)


def test_a_parent_onto_its_child_stores_what_only_the_parent_has(world: World) -> None:
    async def main() -> None:
        await world.start()
        await world.create(("x",))
        parent, size = world.view(("x",)), len(world.content)
        await parent.write(0, os.urandom(BLOCK * 8))
        await world.create(("x", "y"))
        await parent.write(BLOCK * 4, os.urandom(BLOCK))
        await parent.zero(BLOCK * 5, BLOCK, punch=True)
        child = world.view(("x", "y"))
        await child.write(0, os.urandom(size))
        assert await copy(parent, 0, child, 0, size) == size
        await child.sync()
        assert bytes(await child.read(0, size)) == bytes(await parent.read(0, size))
        kinds = [kind for _, _, kind, _ in child.top.state.segments(0, size)]
        assert kinds == [_map.ASK, _map.STORE, _map.ZERO, _map.ASK]
        await world.close()

    trio.run(main)


def test_a_fragmented_file_is_copied_from_file_to_file(tmp_path: Path) -> None:
    """Several hundred pieces, some of them in no file."""
    rng = random.Random(1)
    content = some_content(rng, 8 << 20)
    world = World(tmp_path, content)

    async def main() -> None:
        await world.start()
        await world.create(("x",))
        await world.create(("z",))
        one, two = world.view(("x",)), world.view(("z",))
        for _ in range(300):
            at = rng.randrange(2000) * BLOCK
            await one.write(at, rng.randbytes(BLOCK))
        await two.resize(0)
        assert await copy(one, 0, two, 0, one.size) == one.size
        assert bytes(await two.read(0, two.size)) == bytes(await one.read(0, one.size))
        own = sum(b - a for a, b, k, _ in one.top.state.segments(0, one.size) if k == _map.STORE)
        await two.sync()
        await one.sync()
        own = sum(b - a for a, b, k, _ in one.top.state.segments(0, one.size) if k == _map.STORE)
        assert own == sum(
            b - a for a, b, k, _ in two.top.state.segments(0, two.size) if k == _map.STORE
        )
        await world.close()

    trio.run(main)


def test_a_stale_base_is_refused(world: World) -> None:
    async def main() -> None:
        await world.start()
        await world.create(("x",))
        view = world.view(("x",))
        await view.prepare()
        world.below.mark_stale(SourceChanged("is another"))
        for source in (world.below, view):
            progress = Progress()
            with pytest.raises(SourceChanged):
                await copy_range(source, 0, view, BLOCK * 10, BLOCK * 4, progress)
            assert not progress.done
        await world.close()

    trio.run(main)
