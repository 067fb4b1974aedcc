"""Reading all that snapshots are made of, to say what is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from imgfs._native import _map
from imgfs.errors import CorruptSnapshot, LayerHeld
from imgfs.overlays.layer import Layer, open_layer
from imgfs.overlays.log import BLOCK
from imgfs.overlays.records import Snapshot, SnapshotPath
from imgfs.overlays.store import SnapshotStore

_PIECE = 4 << 20  # bytes that are compared at once


@dataclass(slots=True)
class Checked:
    """What is wrong with a snapshot's layers, and which could not be read; a line each."""

    damaged: list[str] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)


def check(
    store: SnapshotStore, path: SnapshotPath | None = None
) -> Iterator[tuple[Snapshot, Checked]]:
    """Read all snapshots, or this one.  Raises SnapshotNotFound, CorruptSnapshot and OSError."""
    known: dict[str, Checked] = {}
    for each in store.snapshots() if path is None else [store.get(path)]:
        found = Checked()
        for name in each.layers:
            if name not in known:
                known[name] = _check_layer(store.layer_path(name))
            found.damaged += known[name].damaged
            found.in_use += known[name].in_use
        yield each, found


def _check_layer(path: Path) -> Checked:
    try:
        layer = open_layer(path)
    except LayerHeld as exc:
        line = f"{path}: was not checked: it is open for {exc.what} in {exc.who}"
        return Checked(in_use=[line])
    except CorruptSnapshot as exc:
        return Checked(damaged=[str(exc)])
    try:
        found = list(_damage(layer))
    finally:
        layer.close()
    if len(found) > 1:
        found[1:] = [f"{path / 'data'}: and {len(found) - 1} blocks more"]
    return Checked(damaged=found)


def _damage(layer: Layer) -> Iterator[str]:
    """A line for each block."""
    for start, end, kind in zip(*layer.ranges(), strict=True):
        for at in range(start, end, _PIECE) if kind == _map.STORE else ():
            length = min(_PIECE, end - at)
            try:
                layer.store.verify(at, length)
            except CorruptSnapshot:
                for block in range(at, at + length, BLOCK):
                    try:
                        layer.store.verify(block, min(BLOCK, end - block))
                    except CorruptSnapshot as exc:
                        yield str(exc)
