"""What two looks at a status tell of the time between them."""

from __future__ import annotations

from typing import Any

import pytest

from imgfs.status.rates import Look, Row, Totals, busiest_first, rows, totals


def look(at_s: float, fast: dict[str, Any] | None = None, **images: dict[str, Any]) -> Look:
    cache = {"limit": 100, "used": 7}
    return Look({"pid": 1, "images": images, "cache": cache, "fast_path": fast or {}}, at_s)


def image(read: int, fetched: int, hits: int, misses: int) -> dict[str, Any]:
    return {
        "state": "open",
        "bytes_native": read - 1,
        "bytes_python": 1,
        "bytes_fetched": fetched,
        "hits": hits,
        "misses": misses,
        "fetching": 3,
        "cached": 4,
        "errors": 5,
        "last_error": "no",
    }


def test_first_look_is_of_all_time() -> None:
    assert rows(look(5, a=image(1000, 500, 3, 1))) == [
        Row("a", "open", 1000, 500, 0.75, 3, 4, 5, "no")
    ]


def test_second_look_is_of_the_time_between() -> None:
    before, now = look(5, a=image(1000, 500, 3, 1)), look(7, a=image(1600, 500, 4, 5))
    assert rows(now, before) == [Row("a", "open", 300, 0, 0.2, 3, 4, 5, "no")]


def test_no_reads_is_no_ratio() -> None:
    now = look(1, a=image(1, 0, 9, 9))
    assert rows(now, now)[0].hit_ratio is None


def test_counters_that_began_again() -> None:
    before, now = look(0, a=image(1000, 500, 30, 10)), look(2, a=image(200, 100, 1, 0))
    row = rows(now, before)[0]
    assert (row.read, row.fetched, row.hit_ratio) == (100, 50, 1.0)


def test_image_that_came_or_went() -> None:
    before = look(0, a=image(10, 10, 1, 1), c={"state": "not opened yet"})
    now = look(2, b=image(40, 20, 1, 0), c=image(60, 0, 1, 0))
    assert [(row.name, row.read) for row in rows(now, before)] == [("b", 20), ("c", 30)]


def test_no_time_between() -> None:
    assert rows(look(1, a=image(9, 0, 1, 0)), look(1, a=image(1, 0, 0, 0)))[0].read == 0


@pytest.mark.parametrize(
    "status",
    [
        {"images": {}},
        {"images": {"a": {}}},
        {"images": {"a": {"state": None, "bytes_native": "x", "errors": None, "hits": 1}}},
        {"images": {"a": 3}, "cache": 3, "fast_path": None, "pid": "x"},
    ],
)
def test_another_versions_status(status: dict[str, Any]) -> None:
    now = Look(status, 1)
    for row in rows(now, now):
        assert (row.read, row.fetched, row.hit_ratio, row.cached) == (None,) * 4
    found = totals(now, now)
    assert (found.pid, found.cache_limit, found.native_reads) == (None,) * 3


def test_totals() -> None:
    before = look(0, fast={"reads": 10, "queued": 2, "queue_length": 9})
    now = look(
        2,
        fast={"reads": 30, "queued": 3, "queue_length": 1},
        a=image(1, 1, 1, 1),
        b={"state": "not opened yet"},
        c={"state": "stale"},
        d={"state": "failed"},
    )
    assert totals(now, before) == Totals(1, 4, 2, 100, 7, 10, 0.5, 1)
    assert totals(now).native_reads == 30


def test_busiest_first() -> None:
    now = look(
        0,
        idle=image(1, 0, 0, 0) | {"fetching": 0, "bytes_native": 0, "bytes_python": 0},
        unknown={},
        waits=image(1, 0, 0, 0) | {"bytes_native": 0, "bytes_python": 0},
        fetches=image(1, 8, 0, 0) | {"bytes_native": 0, "bytes_python": 0},
        reads=image(9, 0, 0, 0),
    )
    order = [row.name for row in busiest_first(rows(now))]
    assert order == ["reads", "fetches", "waits", "idle", "unknown"]
