"""The free runs of a filesystem as they are found."""

from __future__ import annotations

from array import array

from imgfs.guest.doubt import Doubt

MOST_RUNS = 8 << 20  # 128 MiB; a filesystem in more pieces has little to gain


class FreeRuns:
    """Collects runs in ascending order; touching ones become one."""

    def __init__(self) -> None:
        self.found = array("Q")  #: start, end, start, end and so on, in bytes

    def extend(self, runs: array[int], unit: int, first: int, end: int) -> None:
        """Add runs of units of `unit` bytes that count from unit `first`; the last may reach past
        byte `end`, and is cut there.  Raises Doubt when they begin before the end of what was
        found, or are too many."""
        if not runs:
            return
        new = array("Q", [(first + each) * unit for each in runs])
        new[-1] = min(new[-1], end)
        found = self.found
        if found and new[0] < found[-1]:
            raise Doubt(f"free space at {new[0]} comes after that up to {found[-1]}")
        if found and new[0] == found[-1]:
            found[-1] = new[1]
            del new[:2]
        found.extend(new)
        if len(found) > 2 * MOST_RUNS:
            raise Doubt(f"more than {MOST_RUNS} runs of free space")
