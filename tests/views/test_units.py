"""Decompressed units that are remembered: bounded, of all views, and each view's own."""

from __future__ import annotations

from imgfs.budget import Budget
from imgfs.views.units import SHARE, Units


def test_bounded_and_least_recently_used_first() -> None:
    budget = Budget(SHARE * 1000)
    units, a, b = Units(budget), object(), object()
    for number in range(10):
        units.put(a, number, bytes([number]) * 100)
    assert budget.kept == 1000
    assert units.get(a, 0) == bytes(100)
    units.put(b, 0, b"b" * 100)  # the same key, of another view
    assert units.get(a, 1) is None
    assert units.get(a, 0) == bytes(100) and units.get(b, 0) == b"b" * 100
    units.put(b, 0, b"c" * 50)
    assert units.get(b, 0) == b"c" * 50 and budget.kept == 950
    units.put(a, "large", bytes(5000))
    assert units.get(a, "large") == bytes(5000) and budget.kept == 5000
    units.put(a, "small", b"x")
    assert budget.kept == 1
