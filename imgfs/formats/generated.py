"""A generated file as a row of parts, each of which knows its own bytes."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

from imgfs.extents import ExtentList
from imgfs.formats.layout import Clusters
from imgfs.pieces import PieceList, PieceListBuilder

LONGEST_LITERAL = 1 << 20  # bytes
_CHUNK = 4096  # bytes of a table that are zeroes or a literal together


class Part(NamedTuple):
    start: int  #: bytes
    end: int
    #: appends the pieces of [start, end) of the file, which are not empty and inside of the part
    append: Callable[[PieceListBuilder, int, int], None]


class Parts:
    """Parts one after the other; what is between them is zeroes."""

    def __init__(self, parts: list[Part]) -> None:
        self._parts = [part for part in parts if part.end > part.start]
        self._starts = [part.start for part in self._parts]

    def map(self, offset: int, length: int) -> PieceList:
        """`[offset, offset + length)` of the file."""
        builder, end = PieceListBuilder(offset), offset + length
        for index in range(max(0, bisect_right(self._starts, offset) - 1), len(self._parts)):
            part = self._parts[index]
            if part.start >= end:
                break
            if part.end <= builder.end:
                continue
            if part.start > builder.end:
                builder.zero(part.start)
            part.append(builder, builder.end, min(end, part.end))
        if builder.end < end:
            builder.zero(end)
        return builder.finish(end)


def fixed(start: int, content: bytes) -> Part:
    def append(builder: PieceListBuilder, a: int, b: int) -> None:
        builder.literal(content[a - start : b - start])

    return Part(start, start + len(content), append)


def little_table(start: int, count: int, entries: Callable[[int, int], bytes]) -> Part:
    """A table of `count` little-endian entries of 4 bytes; `entries(first, end)` makes them."""

    def append(builder: PieceListBuilder, a: int, b: int) -> None:
        while a < b:
            stop = min(b, a + LONGEST_LITERAL)
            first, end = (a - start) // 4, -(-(stop - start) // 4)
            skip = a - start - first * 4
            builder.literal(entries(first, end)[skip : skip + stop - a])
            a = stop

    return Part(start, start + count * 4, append)


def sparse_table(
    start: int, count: int, clusters: Clusters, entries: Callable[[int, int], bytes]
) -> Part:
    """As `little_table`, an entry for each of the clusters, zero where there is no data."""
    table = little_table(start, count, entries)

    def append(builder: PieceListBuilder, a: int, b: int) -> None:
        def cluster(at: int) -> int:
            return (at - start) // 4

        for first, end, _ in clusters.runs(cluster(a), -(-(b - start) // 4)):
            used = start + first * 4 // _CHUNK * _CHUNK
            if used > builder.end:
                builder.zero(used)
            used_end = min(b, start + -(-end * 4 // _CHUNK) * _CHUNK)
            if used_end > builder.end:
                table.append(builder, builder.end, used_end)
        if b > builder.end:
            builder.zero(b)

    return Part(start, table.end, append)


def sparse_table_bytes(extents: ExtentList, cluster_size: int) -> int:
    """How many bytes of such a table are not zeroes; `extents` are of the whole disk."""
    entries = _CHUNK // 4
    chunks = Clusters(extents, entries * cluster_size)
    held = chunks.count * _CHUNK
    last = chunks.total - 1
    if chunks.total and chunks.rank(chunks.total) > chunks.rank(last):
        held -= (chunks.total * entries - -(-extents.end // cluster_size)) * 4
    return held


def counted(first: int, count: int, step: int = 1) -> bytes:
    """Little-endian entries of 4 bytes: `first`, `first + step` and so on."""
    return _little(array("I", range(first, first + count * step, step)))


def by_rank(clusters: Clusters, first: int, end: int, base: int, step: int, absent: int) -> bytes:
    """Little-endian entries of 4 bytes for the clusters `[first, end)`: `base + step * rank` for
    those with data, and `absent`."""
    table = array("I", [absent]) * (end - first)
    for a, b, rank in clusters.runs(first, end):
        start = base + step * rank
        table[a - first : b - first] = array("I", range(start, start + step * (b - a), step))
    return _little(table)


def _little(table: array[int]) -> bytes:
    if sys.byteorder == "big":
        table.byteswap()
    return table.tobytes()


def clusters_part(start: int, clusters: Clusters, disk_size: int) -> Part:
    """The clusters with data, in order; the last one of the disk is filled with zeroes."""
    size = clusters.cluster_size

    def append(builder: PieceListBuilder, a: int, b: int) -> None:
        first, end = (a - start) // size, -(-(b - start) // size)
        for cluster, stop, rank in clusters.runs_by_rank(first, end):
            at = start + rank * size  # in the file
            low, high = max(a, at), min(b, at + (stop - cluster) * size)
            offset = cluster * size + low - at  # on the disk
            stored = min(high - low, disk_size - offset)
            if stored > 0:
                builder.data(low + stored, offset)
            if stored < high - low:
                builder.zero(high)

    return Part(start, start + clusters.count * size, append)
