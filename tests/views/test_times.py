"""The times of a file that is written through: ours first, then the source's, and never back."""

from __future__ import annotations

import time

from imgfs.sources.base import SourceStat
from imgfs.views.times import Times

S = 1_000_000_000
OLD = 1_500_000_000 * S


def stat(mtime_ns: int, ctime_ns: int | None = None) -> SourceStat:
    return SourceStat(0, mtime_ns, 0o600, None, ctime_ns)


def test_a_change_shows_at_once_and_each_one_does() -> None:
    times = Times(stat(OLD, OLD + 5))
    assert (times.mtime_ns, times.ctime_ns) == (OLD, OLD + 5)
    times.changed()
    first = times.mtime_ns
    assert abs(first - time.time_ns()) < 60 * S
    times.changed()
    assert times.mtime_ns > first


def test_then_it_is_the_sources() -> None:
    times = Times(stat(OLD))
    times.changed()
    there = times.mtime_ns + 1000
    times.follow(stat(there, there))
    assert (times.mtime_ns, times.ctime_ns) == (there, there)


def test_a_source_that_is_behind_takes_nothing_back() -> None:
    times = Times(stat(OLD))
    times.changed()
    shown = times.mtime_ns, times.ctime_ns
    times.follow(stat(times.mtime_ns - times.mtime_ns % S))
    assert (times.mtime_ns, times.ctime_ns) == shown
    times.follow(stat(times.mtime_ns - 10 * S))
    assert (times.mtime_ns, times.ctime_ns) == shown


def test_what_is_set_stays_until_a_change() -> None:
    times = Times(stat(OLD))
    times.changed()
    changed = times.ctime_ns
    times.was_set(stat(7 * S), 7 * S + 123, is_kept=True)
    assert times.mtime_ns == 7 * S + 123
    assert times.ctime_ns > changed
    times.follow(stat(7 * S))  # whole seconds are all that it keeps
    assert times.mtime_ns == 7 * S + 123
    times.changed()
    assert times.mtime_ns >= changed


def test_a_time_in_the_future_is_left_for_now() -> None:
    future = time.time_ns() + 1000 * S
    times = Times(stat(OLD))
    times.was_set(stat(future), future, is_kept=True)
    times.changed()
    assert times.mtime_ns > future
    now = time.time_ns()
    times.follow(stat(now))
    assert times.mtime_ns == now
