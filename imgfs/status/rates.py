"""What a mount has done between two looks at its status.  Sizes are bytes, rates are per second.

The status may be another version's: a figure that is not there, or is none, is None here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Look:
    """A status (imgfs.status.fields.MountStatus), and when it was made, in seconds of any clock."""

    status: Mapping[str, Any]
    at_s: float

    @property
    def images(self) -> Mapping[str, Mapping[str, Any]]:
        return {n: image for n, image in _part(self.status, "images").items() if _is_table(image)}


@dataclass(frozen=True, slots=True)
class Row:
    """An image, or all of them: since the look before, or, without one, since it was opened."""

    name: str
    state: str
    read: float | None  #: given to programs: a rate, or without a look before the sum
    fetched: float | None  #: from the source, likewise
    hit_ratio: float | None  #: of the reads meanwhile; None also where there were none
    fetching: int | None  #: requests to the source that wait now
    cached: int | None
    errors: int | None  #: ever
    last_error: str


@dataclass(frozen=True, slots=True)
class Totals:
    """The mount itself."""

    pid: int | None
    images: int
    opened: int
    cache_limit: int | None
    cache_used: int | None
    native_reads: float | None  #: a rate, or without a look before the sum
    python_requests: float | None  #: likewise
    waiting: int | None  #: requests that wait for Python
    last_error: str = ""


def rows(now: Look, before: Look | None = None) -> list[Row]:
    """A row for each image, in the status's order."""
    found = []
    for name, image in now.images.items():
        old = before.images.get(name, {}) if before is not None else {}
        seconds = None if before is None else now.at_s - before.at_s
        hits, misses = (_grown(image, old, key) for key in ("hits", "misses"))
        reads = None if hits is None or misses is None else hits + misses
        found.append(
            Row(
                name=name,
                state=str(image.get("state", "")),
                read=_per(_grown(image, old, "bytes_native", "bytes_python"), seconds),
                fetched=_per(_grown(image, old, "bytes_fetched"), seconds),
                hit_ratio=hits / reads if hits is not None and reads else None,
                fetching=_number(image, "fetching"),
                cached=_number(image, "cached"),
                errors=_number(image, "errors"),
                last_error=str(image.get("last_error") or ""),
            )
        )
    return found


def busiest_first(found: list[Row]) -> list[Row]:
    """What moves, then what waits for its source, then the rest as it came."""
    return sorted(found, key=lambda row: (-(row.read or row.fetched or 0), -(row.fetching or 0)))


def totals(now: Look, before: Look | None = None) -> Totals:
    fast = _part(now.status, "fast_path")
    old = _part(before.status, "fast_path") if before is not None else {}
    seconds = None if before is None else now.at_s - before.at_s
    cache = _part(now.status, "cache")
    return Totals(
        pid=_number(now.status, "pid"),
        images=len(now.images),
        opened=sum(
            image.get("state") not in ("not opened yet", "failed") for image in now.images.values()
        ),
        cache_limit=_number(cache, "limit"),
        cache_used=_number(cache, "used"),
        native_reads=_per(_grown(fast, old, "reads"), seconds),
        python_requests=_per(_grown(fast, old, "queued"), seconds),
        waiting=_number(fast, "queue_length"),
        last_error=str(now.status.get("last_error") or ""),
    )


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _part(status: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = status.get(key)
    return value if isinstance(value, dict) else {}


def _number(table: Mapping[str, Any], key: str) -> int | None:
    value = table.get(key)
    return int(value) if isinstance(value, int | float) else None


def _grown(now: Mapping[str, Any], old: Mapping[str, Any], *keys: str) -> int | None:
    """By how much the sum of these counters has grown."""
    known = [value for value in (_number(now, key) for key in keys) if value is not None]
    new, before = sum(known), sum(_number(old, key) or 0 for key in keys)
    if not known:
        return None
    # A source that was opened anew counts from 0 again.
    return new - before if new >= before else new


def _per(value: int | None, seconds: float | None) -> float | None:
    if value is None or seconds is None:
        return value
    return value / seconds if seconds > 0 else 0.0
