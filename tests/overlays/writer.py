"""Run by test_power_loss: random work on snapshots, in one thread, that says what it does.

`python -m tests.overlays.writer ROOT MARKS SEED STEPS` writes a line of JSON to MARKS before each
step ("will"), and after it ("did").
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

from imgfs._native import _map
from imgfs.overlays.layer import Layer, open_layer
from imgfs.overlays.merge import begin_merge
from imgfs.overlays.rawpins import pin_raw
from imgfs.overlays.records import SnapshotPath
from imgfs.overlays.store import Base, SnapshotStore
from imgfs.overlays.trim import begin_trim, hidden

SECTOR, BLOCK = 512, 4096
SIZE = 24 * BLOCK
MOST = 32 * BLOCK
BASES = -1  # the version of a sector of the base
BASE = Base("file:///d/disk.img", SIZE, "raw", "stat", "1")


def content(version: int) -> bytes:
    """A sector's bytes in this version of it; 0 is zeroes."""
    return version.to_bytes(4, "little") * (SECTOR // 4)


class Disk:
    """A snapshot's disk, open for writing, as a view has it; it never reads what is below."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self.size = layers[0].size
        self.map = _map.SegmentMap(self.size)
        for layer in layers:
            self.map.fill(*layer.ranges(), layer.store)
        self.dirty = _map.SegmentMap(self.size)
        self.map.set_target(layers[0].store, self.dirty, layers[0].log)

    def resize(self, size: int) -> None:
        if size > self.size:
            self.layers[0].resize(size)
            self.map.resize(size)
        else:
            self.map.resize(size)
            self.layers[0].resize(size)
        self.size = size

    def commit(self) -> None:
        """Natively where that can be, as an fsync is."""
        if self.map.sync():
            return
        top, taken = self.layers[0], self.dirty.take()
        top.commit(taken, self.size)
        self.dirty.settle()
        for start, end, kind in zip(*taken, strict=True):
            if kind == _map.BELOW:
                self.map.reclaim(start, end, top.store, self.dirty)

    def below(self) -> _map.SegmentMap:
        """What is below the top, up to where none of it has ended."""
        found = _map.SegmentMap(min([self.size, *(layer.size for layer in self.layers[1:])]))
        for layer in self.layers[1:]:
            found.fill(*layer.ranges(), layer.store)
        return found

    def put_over(self, fresh: Layer) -> None:
        self.layers.insert(0, fresh)
        self.dirty = _map.SegmentMap(self.size)
        self.map.set_target(fresh.store, self.dirty, fresh.log)

    def join(self, upper: str, lower: str, merged: Path) -> None:
        names = [layer.path.name for layer in self.layers]
        if upper in names and lower in names:
            layer = open_layer(merged)
            both = slice(names.index(upper), names.index(lower) + 1)
            for gone in self.layers[both]:
                self.map.replace_store(gone.store, layer.store)
                gone.close()
            self.layers[both] = [layer]

    def close(self) -> None:
        self.map.set_target(None)
        for layer in self.layers:
            layer.close()


class Writer:
    def __init__(self, root: Path, marks: int, seed: int) -> None:
        self.store = SnapshotStore(BASE.url, root)
        self.open: dict[SnapshotPath, Disk] = {}
        self.sizes: dict[SnapshotPath, int] = {}
        self.random = random.Random(seed)
        self.marks = marks
        self.version = 0

    def mark(self, *words: object) -> None:
        os.write(self.marks, json.dumps(words).encode() + b"\n")

    def step(self, what: str) -> None:
        some = sorted(self.sizes)
        path = self.random.choice(some) if some else None
        if what == "create":
            parent = path if path is not None and self.random.random() < 0.6 else ()
            self.create((*parent, f"s{self.version}"))
        elif what == "pin":
            self.pin()
        elif path is not None:
            getattr(self, what)(path)
        self.version += 1

    def pin(self) -> None:
        """Say of some source that it stays raw."""
        name = f"/some/{self.version}.img"
        self.mark("will", "pin", name)
        pin_raw(name)
        self.mark("did")

    def disk(self, path: SnapshotPath) -> Disk:
        if path not in self.open:
            self.open[path] = Disk(self.store.open_layers(path, writable=True))
        return self.open[path]

    def create(self, path: SnapshotPath) -> None:
        above = self.open.get(path[:-1])
        if above is not None:
            self.commit(path[:-1])
        size = self.sizes.get(path[:-1], SIZE)
        self.mark("will", "create", path, size)
        fresh = self.store.create(path, BASE, size, above and above.layers[0])
        self.mark("did")
        if above is not None and fresh is not None:
            above.put_over(fresh)
        self.sizes[path] = size

    def write(self, path: SnapshotPath, first: int | None = None) -> None:
        disk = self.disk(path)
        if first is None:
            first = self.random.randrange(disk.size // BLOCK)
        count = min(self.random.randint(1, 4), disk.size // BLOCK - first)
        self.mark("will", "write", path, first * 8, (first + count) * 8, self.version + 1)
        assert disk.map.write(first * BLOCK, content(self.version + 1) * (count * 8))
        self.mark("did")

    def zero(self, path: SnapshotPath) -> None:
        disk = self.disk(path)
        first = self.random.randrange(disk.size // BLOCK)
        count = min(self.random.randint(1, 6), disk.size // BLOCK - first)
        self.mark("will", "write", path, first * 8, (first + count) * 8, 0)
        assert disk.map.zero(first * BLOCK, (first + count) * BLOCK)
        self.mark("did")

    def share(self, path: SnapshotPath) -> None:
        """Let some blocks be again what is below the top: rather such as the top has."""
        disk = self.disk(path)
        below = disk.below()
        own = [start for start in disk.layers[0].ranges()[0] if start < below.size]
        first = self.random.choice([start // BLOCK for start in own] or [0])
        if self.random.random() < 0.3:
            first = self.random.randrange(disk.size // BLOCK)
        last = min(first + self.random.randint(1, 6), below.size // BLOCK)
        if first >= last:
            return
        versions = []
        for at in range(first * BLOCK, last * BLOCK, SECTOR):
            data = below.read(at, SECTOR)
            base = BASES if at < SIZE else 0
            versions.append(base if data is None else int.from_bytes(data[:4], "little"))
        self.mark("will", "share", path, first * 8, versions)
        assert disk.map.below(first * BLOCK, last * BLOCK, below)
        self.mark("did")

    def write_and_share(self, path: SnapshotPath) -> None:
        """Let be seen again what is below durable bytes."""
        self.write(path)
        self.commit(path)
        self.share(path)
        self.commit(path)

    def resize(self, path: SnapshotPath) -> None:
        size = self.random.randrange(4, MOST // BLOCK) * BLOCK
        disk = self.disk(path)
        self.mark("will", "resize", path, size)
        disk.resize(size)
        self.mark("did")
        self.sizes[path] = size

    def commit(self, path: SnapshotPath) -> None:
        disk = self.disk(path)
        self.mark("will", "commit", path)
        disk.commit()
        self.mark("did")

    def freeze(self, path: SnapshotPath) -> None:
        self.commit(path)
        disk = self.disk(path)
        if not disk.layers[0].is_empty:
            disk.put_over(self.store.freeze(path, disk.size, disk.layers[0]))

    def merge(self, _: SnapshotPath) -> None:
        views = [{layer.path.name for layer in disk.layers} for disk in self.open.values()]
        merge, _ = begin_merge(self.store, views)
        if merge is None:
            return
        try:
            for _ in range(self.random.choice((0, 1, 2, 99, 99, 99))):
                if merge.step():
                    assert merge.finish()
                    for disk in self.open.values():
                        kept = self.store.layer_path(merge.pair.kept)
                        disk.join(merge.pair.upper, merge.pair.lower, kept)
                    break
        finally:
            merge.close()

    def trim(self, path: SnapshotPath) -> None:
        """Write over what was frozen; nobody can see what becomes of that."""
        self.freeze(path)
        disk = self.disk(path)
        if len(disk.layers) < 2:
            return
        for start in list(disk.layers[1].ranges()[0])[:2]:
            if start < disk.size:
                self.write(path, start // BLOCK)
        for what in self.random.choices((self.write, self.zero, self.share), k=3):
            what(path)
        if self.random.random() < 0.8:
            self.commit(path)
        top, lower = disk.layers[:2]
        views = [{layer.path.name for layer in each.layers} for each in self.open.values()]
        trim = begin_trim(self.store, top.path.name, lower.path.name, views)
        if trim is None:
            return
        try:
            trim.start(hidden(top.ranges(), disk.dirty.ranges(), lower, top.size))
            while not trim.step():
                pass
            disk.join(lower.path.name, lower.path.name, lower.path)
        finally:
            trim.close()

    def close(self, path: SnapshotPath) -> None:
        if path in self.open:
            self.commit(path)
            self.open.pop(path).close()

    def rename(self, path: SnapshotPath) -> None:
        for each in sorted(self.sizes):
            if each[: len(path)] == path:
                self.close(each)
        name = f"r{self.version}"
        self.mark("will", "rename", path, name)
        self.store.rename(path, name)
        self.mark("did")
        for each in sorted(self.sizes):
            if each[: len(path)] == path:
                self.sizes[(*path[:-1], name, *each[len(path) :])] = self.sizes.pop(each)

    def delete(self, path: SnapshotPath) -> None:
        if any(each[: len(path)] == path and each != path for each in self.sizes):
            return
        self.close(path)
        self.mark("will", "delete", path)
        self.store.delete(path)
        self.mark("did")
        del self.sizes[path]


STEPS = ["write_and_share"] * 5
STEPS += ["write"] * 8 + ["zero"] * 3 + ["share"] * 3 + ["commit"] * 4 + ["create"] * 2
STEPS += (
    ["pin", "resize", "rename", "delete", "close"] + ["freeze"] * 3 + ["merge"] * 6 + ["trim"] * 5
)


def main() -> None:
    os.environ["STATE_DIRECTORY"] = sys.argv[1]
    root, marks, seed, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    writer = Writer(root, os.open(marks, os.O_WRONLY | os.O_CREAT, 0o600), seed)
    for _ in range(steps):
        writer.step(writer.random.choice(STEPS))


if __name__ == "__main__":
    main()
