"""Layers that are only read: each is open once, however many disks of this process stand on it.

A snapshot of a snapshot stands on all layers of that one.  If each opened them for itself a hundred
that stand one on the other would take five thousand times a layer's descriptors, maps and locks.
"""

from __future__ import annotations

import threading
from pathlib import Path

from imgfs.overlays.layer import Layer, open_layer

_guard = threading.Lock()
_open: dict[Path, Layer] = {}  # those that are open, and no others


def open_to_read(path: Path) -> Layer:
    """As `open_layer`; whoever gets it closes it."""
    with _guard:
        known = _open.get(path)
    if known is not None and known.hold():
        return known
    layer = open_layer(path)
    share(layer)
    return layer


def share(layer: Layer) -> None:
    """Nobody writes it any more: from now on, until it is closed, `open_to_read` gives it."""
    with _guard:
        _open[layer.path] = layer
    if not layer.when_closed(_forget):
        _forget(layer)


def _forget(layer: Layer) -> None:
    with _guard:
        # By now another may stand there, which was opened when this one could not be held.
        if _open.get(layer.path) is layer:
            del _open[layer.path]
