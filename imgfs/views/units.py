"""Decompressed units that were read of late, of all views of the process together."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Hashable

from imgfs.budget import Budget, shared

SHARE = 8  # the part of the budget that they may take


class Units:
    """The least recently used go first; one stays in any case."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._limit = budget.limit // SHARE
        self._units: OrderedDict[tuple[object, Hashable], bytes] = OrderedDict()
        self._used = 0

    def get(self, view: object, key: Hashable) -> bytes | None:
        """`view` is an object of the view's own, by which its units are told from others'."""
        unit = self._units.get((view, key))
        if unit is not None:
            self._units.move_to_end((view, key))
        return unit

    def put(self, view: object, key: Hashable, unit: bytes) -> None:
        if (view, key) in self._units:
            self._drop(view, key)
        self._units[view, key] = unit
        self._used += len(unit)
        self._budget.add(len(unit))
        while len(self._units) > 1 and self._used > self._limit:
            self._drop(*next(iter(self._units)))

    def _drop(self, view: object, key: Hashable) -> None:
        length = len(self._units.pop((view, key)))
        self._used -= length
        self._budget.sub(length)


@functools.cache
def shared_units() -> Units:
    return Units(shared())
