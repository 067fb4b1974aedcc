"""What every format is the other way round: the file that would hold a given disk.

A layout is a function of the disk's extents and of what identifies it, so that every mount gives
the same bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

from imgfs.extents import ExtentList
from imgfs.pieces import PieceList


@dataclass(frozen=True, slots=True)
class About:
    """What a generated file says of itself beside its content."""

    name: str  #: the file's own
    identity: str  #: of the disk; its ids derive from it
    mtime_s: int  #: of the disk, in seconds since 1970

    def unique(self, what: str, length: int = 16) -> bytes:
        """Bytes that are the same for the same disk, and for nothing else; at most 32."""
        return sha256(f"{what}\0{self.identity}".encode("utf-8", "surrogateescape")).digest()[
            :length
        ]


class Layout(ABC):
    """A file of `size` bytes that holds a disk."""

    size: int

    #: Bytes of the file that are neither holes nor the disk's own; None: only its map tells.
    own_bytes: int | None = None
    holds_data = True  #: is what the disk stores stored in the file as it is?

    @abstractmethod
    def map(self, offset: int, length: int) -> PieceList:
        """Exactly `[offset, offset + length)` of the file: ZERO, LITERAL, or DATA, whose file 0 is
        the disk as raw bytes."""

    def stored_bytes(self, extents: ExtentList) -> int | None:
        """What of the file is not holes, from the disk's extents; None: only its map tells."""
        if self.own_bytes is None:
            return None
        if not self.holds_data:
            return self.own_bytes
        return self.own_bytes + extents.data_bytes()


class Clusters:
    """Which clusters of a disk hold data, in order: rank and select over packed runs."""

    def __init__(self, extents: ExtentList, cluster_size: int) -> None:
        """`extents` are of the whole disk; a cluster with any data in it counts."""
        self.cluster_size = cluster_size
        self.total = -(-extents.end // cluster_size)  #: clusters of the disk
        self._firsts: array[int] = array("Q")
        self._before: array[int] = array("Q")  # how many are in the runs before
        count, reach = 0, -1
        for start, end in extents.data_ranges():
            first, last = start // cluster_size, -(-end // cluster_size)
            if first <= reach:
                count += max(0, last - reach)
                reach = max(last, reach)
            else:
                self._firsts.append(first)
                self._before.append(count)
                count, reach = count + last - first, last
        self._before.append(count)
        self.count = count  #: how many hold data

    def _end(self, index: int) -> int:
        """Where the run ends."""
        return self._firsts[index] + self._before[index + 1] - self._before[index]

    def rank(self, cluster: int) -> int:
        """How many hold data before this one."""
        index = bisect_right(self._firsts, cluster) - 1
        if index < 0:
            return 0
        return self._before[index] + min(cluster, self._end(index)) - self._firsts[index]

    def runs(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(first, end, rank of first) of the runs that hold data, cut to `[first, end)`."""
        index = max(0, bisect_right(self._firsts, first) - 1)
        while index < len(self._firsts) and self._firsts[index] < end:
            a, b = max(first, self._firsts[index]), min(end, self._end(index))
            if a < b:
                yield a, b, self._before[index] + a - self._firsts[index]
            index += 1

    def runs_by_rank(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """As `runs`, for those whose ranks are in `[first, end)`."""
        index = max(0, bisect_right(self._before, first, hi=len(self._firsts)) - 1)
        while index < len(self._firsts) and self._before[index] < end:
            before, start = self._before[index], self._firsts[index]
            a = start + max(0, first - before)
            b = min(self._end(index), start + end - before)
            if a < b:
                yield a, b, before + a - start
            index += 1
