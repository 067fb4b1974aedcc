"""After a power loss at any moment every sector is the base's, the last synced, or a later one.

What was not forced out of the store's files is lost or not, in any subset (powerloss.py).  The
directories that it is in are made by it, too.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from imgfs._native import _map
from imgfs.overlays.layer import Layer
from imgfs.overlays.rawpins import is_pinned_raw
from imgfs.overlays.records import SnapshotPath
from imgfs.overlays.store import SnapshotStore

from .powerloss import Call, Disk, record
from .writer import BASE, BASES, SECTOR, SIZE, content

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
SEEDS = range(12 if LONG else 3)
STEPS = 150 if LONG else 60
CRASHES = 600 if LONG else 80
STATE = "home/.local/state/imgfs"  # below a directory that is there at first


@dataclass(slots=True)
class Known:
    """Of one snapshot: each sector's synced version, and those that it was given since."""

    sizes: list[int]  #: the synced one, and those since
    synced: dict[int, int]  #: what is not in it is the base's, or zero past the base's end
    later: list[dict[int, int]] = field(default_factory=list)

    def allowed(self, sector: int) -> set[int]:
        first = self.synced.get(sector, BASES if sector < SIZE // SECTOR else 0)
        return {first} | {each[sector] for each in self.later if sector in each}

    def sync(self) -> None:
        for each in self.later:
            self.synced |= each
        self.later.clear()
        del self.sizes[:-1]


@dataclass(slots=True)
class Model:
    snapshots: dict[SnapshotPath, Known] = field(default_factory=dict)
    pins: set[str] = field(default_factory=set)  #: sources that are to stay raw


def begin(before: Model, words: list[object]) -> tuple[Model, Model]:
    """What may be there while the step is under way: one of the two."""
    model = before.snapshots
    match words:
        case ["write", path, int(start), int(end), int(version)]:
            model[tuple(path)].later.append(dict.fromkeys(range(start, end), version))
        case ["share", path, int(start), list(versions)]:
            model[tuple(path)].later.append(dict(enumerate(versions, start)))
        case ["resize", path, int(size)]:
            known = model[tuple(path)]
            ends = known.sizes[-1] // SECTOR, size // SECTOR
            known.later.append(dict.fromkeys(range(min(ends), max(ends)), 0))
            known.sizes.append(size)
    result = deepcopy(before)
    after = result.snapshots
    match words:
        case ["pin", str(name)]:
            result.pins.add(name)
        case ["create", path, int(size)]:
            above = after.get(tuple(path[:-1]))
            synced = {} if above is None else dict(above.synced)
            after[tuple(path)] = Known([size], synced)
        case ["commit", path]:
            after[tuple(path)].sync()
        case ["delete", path]:
            del after[tuple(path)]
        case ["rename", path, str(name)]:
            old = tuple(path)
            for each in list(after):
                if each[: len(old)] == old:
                    after[(*old[:-1], name, *each[len(old) :])] = after.pop(each)
    return before, result


def found_wrong(root: Path, model: Model) -> str:
    """What on the disk is not as the model allows; or nothing."""
    store = SnapshotStore(BASE.url, root)
    names = {each.path for each in store.snapshots()}
    if names != set(model.snapshots):
        return f"{sorted(names)} are there, not {sorted(model.snapshots)}"
    for name in model.pins:
        if not is_pinned_raw(name):
            return f"{name} is not pinned"
    for path, known in model.snapshots.items():
        layers = store.open_layers(path, writable=True)
        try:
            wrong = disk_wrong(layers, known)
            if wrong:
                return f"{path}: {wrong}"
        finally:
            for layer in layers:
                layer.close()
    return ""


def disk_wrong(layers: list[Layer], known: Known) -> str:
    size = layers[0].size
    if size not in known.sizes:
        return f"its size is {size}, not one of {known.sizes}"
    held = _map.SegmentMap(size)
    for layer in layers:
        held.fill(*layer.ranges(), layer.store)
    for start, end, kind, _ in held.segments(0, size):
        for at in range(start, end, SECTOR):
            version = BASES if at < SIZE else 0
            if kind != _map.ASK:
                data = held.read(at, SECTOR)
                assert data is not None
                version = int.from_bytes(data[:4], "little")
                if data != content(version):
                    return f"the sector at {at} is in pieces"
            if version not in known.allowed(at // SECTOR):
                return f"the sector at {at} is {version}, not in {known.allowed(at // SECTOR)}"
    return ""


@pytest.fixture(autouse=True)
def next_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks does so after the machine was started again; the writer is another process."""
    monkeypatch.setattr("imgfs.overlays.sums.boot_id", lambda: "the next one")


@pytest.mark.parametrize("strict", [False, True], ids=["loose", "strict"])
@pytest.mark.parametrize("seed", SEEDS)
def test_power_loss(
    seed: int, strict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, marks = tmp_path / "disk", tmp_path / "marks"
    root.mkdir()
    command = [sys.executable, "-m", "tests.overlays.writer", str(root / STATE), str(marks)]
    calls = list(record([*command, str(seed), str(STEPS)], tmp_path / "trace"))
    own = [call for call in calls if any(path.startswith(str(tmp_path)) for path in call.paths)]
    crashes = sorted(random.Random(seed).sample(range(len(own)), min(CRASHES, len(own))))
    disk, may_be, index = Disk(root, strict=strict), (Model(), Model()), 0
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "after" / STATE))
    for crash in crashes:
        for call in own[index:crash]:
            may_be = seen(call, marks, disk, may_be)
        index = crash
        after = tmp_path / "after"
        disk.lose(after, random.Random(seed * 10000 + crash))
        wrong = [found_wrong(after / STATE, model) for model in may_be]
        assert "" in wrong, f"after call {crash}: {wrong}"
        shutil.rmtree(after)
    assert len(crashes) > 50


def seen(call: Call, marks: Path, disk: Disk, may_be: tuple[Model, Model]) -> tuple[Model, Model]:
    if str(marks) not in call.paths:
        disk.apply(call)
    elif call.name == "write":
        word, *words = json.loads(call.data)
        if word == "will":
            return begin(may_be[0], words)
        return may_be[1], may_be[1]
    return may_be
