"""Making one of two layers, of which nobody needs the lower one by itself.

    chains before:   … upper lower …        only `upper` stands on `lower`; neither is written
    chains after:    … kept …               kept is one of the two, to which the other was added

The larger one is kept, and the smaller one's ranges are added to it in place:

- the lower one's to the upper one, where that has nothing: it says then what was seen through it
  before, whoever has it open;
- the upper one's to the lower one: what changes there is hidden by the upper one, so this is done
  only while whoever has the lower one open has the upper one over it.

So at any moment the two together are what they were, and what a crash leaves needs no repair.  All
that is added is durable before the chains say that the other one is gone; the directory's next use
removes that.  Readers who have it open keep it until they close it.
"""

from __future__ import annotations

import fcntl
import os
from array import array
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from imgfs._native import _map
from imgfs.errors import CorruptSnapshot
from imgfs.overlays.layer import Layer, Ranges, open_layer, stored_bytes
from imgfs.overlays.locks import LayerLock
from imgfs.overlays.records import Records
from imgfs.overlays.store import SnapshotStore

_PIECE = 1 << 20  # bytes that are copied at once
_FORCED = 32 << 20  # bytes that are copied before they are forced out, so that few wait for it
_RANGES = 1 << 16  # ranges that the log is told of at once


@dataclass(frozen=True, slots=True)
class Pair:
    """Two layers' names; `into_lower`: the lower one is kept."""

    upper: str
    lower: str
    into_lower: bool

    @property
    def kept(self) -> str:
        return self.lower if self.into_lower else self.upper


class Merge:
    """One merge under way.  `step` until it says True, then `finish`; `close` in any case.

    All of it waits for the disk, one thread at a time.  It may end at any moment.
    """

    def __init__(self, store: SnapshotStore, pair: Pair, lock: int) -> None:
        """For `begin_merge` only."""
        self._store = store
        self.pair = pair
        self._lock = lock
        self._open: list[Layer] = []
        self._is_whole = True
        try:
            for name in (pair.upper, pair.lower):
                path = store.layer_path(name)
                self._open.append(open_layer(path, writable=name == pair.kept, alone=False))
        except BaseException:
            self.close()
            raise
        self._work = self._steps()

    def step(self) -> bool:
        """Do a part of it, of about a MiB; True when there is no more to do.

        Raises OSError: when the disk is full what was added since the last part of the log was
        written takes no space.  Raises CorruptSnapshot: what is damaged is copied nowhere.
        """
        return next(self._work, None) is None

    def _steps(self) -> Iterator[bool]:
        self._is_whole = False
        upper, lower = self._open
        if self.pair.into_lower:
            source, target, ranges = upper, lower, upper.ranges()
            if target.size != upper.size:
                target.resize(upper.size)
        else:
            source, target, ranges = lower, upper, _left_of(lower, upper)
        size = upper.size
        for batch in _batches(ranges):
            try:
                for start, end, kind in zip(*batch, strict=True):
                    if kind == _map.STORE:
                        yield from _copy(source, target, start, end)
                target.commit(batch, size)
            except (OSError, CorruptSnapshot):
                _give_back(target, batch)
                raise
            for start, end, kind in zip(*batch, strict=True):
                if kind == _map.ZERO:
                    target.store.punch(start, end - start)
            target.seal_some(0)  # as long as it need not be read again
            yield True
        target.commit((array("Q"), array("Q"), b""), size)
        self._is_whole = True
        # Who opens it from now on can tell what is damaged.
        target.mark_closed()

    def finish(self) -> bool:
        """Let the kept one take the place of both; False: they are not wanted any more."""
        return self._store.join(self.pair.upper, self.pair.lower, self.pair.kept)

    def close(self) -> None:
        for layer in self._open:
            layer.close(is_whole=self._is_whole)
        self._open = []
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def begin_merge(
    store: SnapshotStore, views: Collection[Collection[str]]
) -> tuple[Merge | None, bool]:
    """The merge that costs least, if there is one now; and whether there may be one later.

    `views` are the layers of all that this process has open.
    """
    with store.locked():
        lock = os.open(store.directory / "merge-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None, True
        try:
            pairs = list(_pairs(store, store.records()))
            for _, pair in sorted(pairs, key=lambda each: each[0]):
                if not pair.into_lower or _has_nobody(store, pair.lower, pair.upper, views):
                    return Merge(store, pair, lock), True
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        return None, bool(pairs)


def _pairs(store: SnapshotStore, records: Records) -> Iterator[tuple[int, Pair]]:
    """All that can be merged, and how many bytes must be copied for each."""
    if not records.are_whole:
        return  # what is damaged may need any of them
    tops = {each.layers[0] for each in records.snapshots}
    above: dict[str, set[str]] = {}
    for each in records.snapshots:
        for upper, lower in pairwise(each.layers):
            above.setdefault(lower, set()).add(upper)
    for lower, uppers in above.items():
        upper = next(iter(uppers))
        if len(uppers) == 1 and upper not in tops:
            size, of_lower = (stored_bytes(store.layer_path(name)) for name in (upper, lower))
            yield min(size, of_lower), Pair(upper, lower, into_lower=size <= of_lower)


def is_hidden_by(
    store: SnapshotStore, upper: str, lower: str, views: Iterable[Collection[str]]
) -> bool:
    """Has whoever stands on the lower one, or has it open, the upper one over it?"""
    records = store.records()
    chains = [each.layers for each in records.snapshots if lower in each.layers]
    pairs = [pair for chain in chains for pair in pairwise(("", *chain)) if pair[1] == lower]
    if not records.are_whole or not pairs or set(pairs) != {(upper, lower)}:
        return False
    return _has_nobody(store, lower, upper, views)


def _has_nobody(
    store: SnapshotStore, lower: str, upper: str, views: Iterable[Collection[str]]
) -> bool:
    """Has nobody the lower one open without the upper one?"""
    if any(lower in view and upper not in view for view in views):
        return False
    # What others have open nobody knows.  Who opens it from now on opens both.
    lock = LayerLock(store.layer_path(lower), writes=False)
    try:
        return lock.is_ours_alone()
    finally:
        lock.close()


def _left_of(lower: Layer, upper: Layer) -> Ranges:
    """What of the lower one is seen through the upper one."""
    seen = _map.SegmentMap(upper.size)
    seen.set_ranges(*lower.ranges(), lower.store)
    starts, ends, kinds = upper.ranges()
    seen.set_ranges(starts, ends, bytes([_map.ASK]) * len(kinds))
    return seen.ranges()


def _batches(ranges: Ranges) -> Iterator[Ranges]:
    """The ranges, cut into what is copied and told to the log at once."""
    starts, ends, kinds = array("Q"), array("Q"), bytearray()
    copied = 0
    for start, end, kind in zip(*ranges, strict=True):
        while start < end:
            to = min(end, start + _FORCED - copied) if kind == _map.STORE else end
            starts.append(start)
            ends.append(to)
            kinds.append(kind)
            copied += to - start if kind == _map.STORE else 0
            start = to
            if copied == _FORCED or len(kinds) == _RANGES:
                yield starts, ends, bytes(kinds)
                starts, ends, kinds = array("Q"), array("Q"), bytearray()
                copied = 0
    if kinds:
        yield starts, ends, bytes(kinds)


def _copy(source: Layer, target: Layer, start: int, end: int) -> Iterator[bool]:
    for at in range(start, end, _PIECE):
        length = min(_PIECE, end - at)
        target.store.write(at, source.store.read(at, length))
        yield True


def _give_back(target: Layer, batch: Ranges) -> None:
    """What was copied and is not the target's takes no space."""
    for start, end, kind in zip(*batch, strict=True):
        if kind == _map.STORE:
            for a, b, there, _ in target.state.segments(start, end - start):
                if there != _map.STORE:
                    target.store.punch(a, b - a)
