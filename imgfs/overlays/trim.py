"""Giving back what of a layer nobody can see any more: what is written over it has that hidden.

    top      AAAA..CC      written on, in this process
    lower    aaaabb..      of which only `top` is above: the a's are nobody's

Layers are merged when the upper one is written no more (merge.py).  The one that is written would
hide up to all of the one below it, and both take their space, until then.  So the hidden blocks
are taken out of the lower one, in its log first, then in its file.

Only such are taken as the top has durably, in its log: after a crash they are hidden still.  And of
those only such as the lower one has bytes of, not zeroes, and that the top is not about to let be
seen again.  Who might share them with the top meanwhile (views/sharing.py) would have to have the
lower one open without it, and there is none when this begins.  So nobody who writes or syncs the
top is kept waiting.
"""

from __future__ import annotations

import fcntl
import os
from array import array
from collections.abc import Collection, Iterator
from itertools import compress

from imgfs._native import _map
from imgfs.overlays.layer import Layer, Ranges, open_layer
from imgfs.overlays.merge import is_hidden_by
from imgfs.overlays.store import SnapshotStore

WORTH = 4 << 20  # bytes that must be hidden
_RANGES = 1 << 10  # that are taken at once


def hidden(top: Ranges, dirty: Ranges, lower: Layer, size: int) -> Ranges:
    """What the lower one has in its file, and the top has said durably.

    `top` is all that its log says, `dirty` what that does not say yet, `size` the top's.
    """
    seen = _map.SegmentMap(min(size, lower.size))
    seen.set_ranges(*lower.ranges(), lower.store)
    _forget(seen, top)
    found = _map.SegmentMap(seen.size)
    found.set_ranges(*lower.ranges(), lower.store)
    _forget(found, seen.ranges())
    _forget(found, _of_kind(dirty, _map.BELOW))
    starts, ends, kinds = _of_kind(found.ranges(), _map.STORE)
    return starts, ends, bytes([_map.BELOW]) * len(kinds)


def _forget(map: _map.SegmentMap, ranges: Ranges) -> None:
    starts, ends, kinds = ranges
    map.set_ranges(starts, ends, bytes([_map.ASK]) * len(kinds))


def _of_kind(ranges: Ranges, wanted: int) -> Ranges:
    starts, ends, kinds = ranges
    own = [kind == wanted for kind in kinds]
    starts, ends = (array("Q", compress(each, own)) for each in (starts, ends))
    return starts, ends, bytes([wanted]) * len(starts)


class Trim:
    """One under way.  `step` until it says True; `close` in any case.

    All of it waits for the disk, one thread at a time.  It may end at any moment.
    """

    def __init__(self, layer: Layer, lock: int) -> None:
        """For `begin_trim` only."""
        self._layer = layer
        self._lock = lock
        self._is_whole = True
        self._work: Iterator[bool] = iter(())

    def start(self, ranges: Ranges) -> None:
        """These are to be taken: what is `hidden` now."""
        self._work = self._steps(ranges)

    def step(self) -> bool:
        """Do a part of it; True when there is no more to do.  Raises OSError."""
        return next(self._work, None) is None

    def _steps(self, ranges: Ranges) -> Iterator[bool]:
        self._is_whole = False
        for first in range(0, len(ranges[0]), _RANGES):
            part = slice(first, first + _RANGES)
            starts, ends, kinds = ranges[0][part], ranges[1][part], ranges[2][part]
            self._layer.commit((starts, ends, kinds), self._layer.size)
            for start, end in zip(starts, ends, strict=True):
                self._layer.store.punch(start, end - start)
            yield True
        self._is_whole = True
        # Who opens it from now on can tell what is damaged.
        self._layer.mark_closed()

    def close(self) -> None:
        """Of what was not finished the next opening for writing gives the space back."""
        self._layer.close(is_whole=self._is_whole)
        os.close(self._lock)


def begin_trim(
    store: SnapshotStore, top: str, lower: str, views: Collection[Collection[str]]
) -> Trim | None:
    """None while somebody needs the lower one by itself, or layers are being merged.

    The top is written by this process; `views` are the layers of all that it has open.
    """
    with store.locked():
        lock = os.open(store.directory / "merge-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_hidden_by(store, top, lower, views):
                layer = open_layer(store.layer_path(lower), writable=True, alone=False)
                return Trim(layer, lock)
        except BlockingIOError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        return None
