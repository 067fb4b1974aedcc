"""The mtime and ctime of a file whose writes are on their way to a source, which has its own.

What is written shows the time here until the source has it all, and the source's own time from then
on.  Where that is behind ours (its clock, or whole seconds) ours stays, so that no time goes back.
"""

from __future__ import annotations

import time

from imgfs.sources.base import SourceStat

_NS = 1_000_000_000
_COARSE = 5  # CLOCK_REALTIME_COARSE, by which a kernel tells a file's times


class Times:
    """`owes_touch`: the source is to be touched yet, for no byte that is sent changes its mtime."""

    def __init__(self, stat: SourceStat) -> None:
        self.mtime_ns = stat.mtime_ns
        self.ctime_ns = stat.mtime_ns if stat.ctime_ns is None else stat.ctime_ns
        self.owes_touch = False
        self._seen = stat
        self._least_ns = 0  # the mtime that was shown of what was written since it was set

    def changed(self) -> None:
        """Something is written now."""
        now = time.clock_gettime_ns(_COARSE)
        self._least_ns = self.mtime_ns = max(now, self.mtime_ns + 1)
        self.ctime_ns = max(now, self.ctime_ns + 1)

    def follow(self, stat: SourceStat) -> None:
        """The source has all that was written, and says this."""
        if stat is self._seen:
            return
        self._seen = stat
        if not stat.mtime_ns < self._least_ns <= time.time_ns():
            self.mtime_ns = stat.mtime_ns
        self.ctime_ns = max(self.ctime_ns, stat.ctime_ns or stat.mtime_ns)

    def was_set(self, stat: SourceStat, mtime_ns: int, is_kept: bool) -> None:
        """A user has set it, and if it `is_kept` at the source that says what it is now."""
        self.changed()
        self._seen = stat
        self.owes_touch = False
        if is_kept and stat.mtime_ns != mtime_ns - mtime_ns % _NS:
            mtime_ns = stat.mtime_ns
        self.mtime_ns = self._least_ns = mtime_ns

    def was_touched(self, stat: SourceStat) -> None:
        """The source has been given the mtime that is shown."""
        self._seen = stat
