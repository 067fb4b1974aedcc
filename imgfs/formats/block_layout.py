"""Generated files of the VHD kind: structures, a table of blocks, the blocks that hold data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from imgfs.extents import ExtentList
from imgfs.formats.layout import Clusters, Layout
from imgfs.pieces import PieceList, PieceListBuilder

_LITERAL = 1 << 20  # bytes of a piece at most


def rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


class BlockLayout(Layout):
    """The file is: `structures` at their offsets; the table; from `blocks_at` on each block with
    data in the order of the disk, `lead` in front of it; `tail`.  Between them it is zero."""

    def __init__(
        self,
        extents: ExtentList,
        blocks: Clusters,
        structures: Sequence[tuple[int, bytes]],
        table: tuple[int, int],
        blocks_at: int,
        lead: bytes = b"",
        tail: bytes = b"",
    ) -> None:
        """`extents` are of the whole disk, `table` is where its bytes begin and end."""
        self._extents = extents
        self._blocks = blocks
        # Most of many a structure is its padding.
        self._structures = sorted((start, content.rstrip(b"\0")) for start, content in structures)
        self._table_at, self._table_end = table
        self._blocks_at = blocks_at
        self._lead = lead
        self._stride = len(lead) + blocks.cluster_size
        self._tail = tail
        self._tail_at = blocks_at + blocks.count * self._stride
        self.size = self._tail_at + len(tail)
        self.own_bytes = sum(len(content) for _, content in self._structures)
        self.own_bytes += self._table_end - self._table_at + blocks.count * len(lead) + len(tail)

    @abstractmethod
    def _table(self, start: int, end: int) -> bytes:
        """The bytes `[start, end)` of the table."""

    def map(self, offset: int, length: int) -> PieceList:
        end = offset + length
        builder = PieceListBuilder(offset)
        self._map_structures(builder, min(end, self._blocks_at))
        if builder.end < min(end, self._tail_at):
            self._map_blocks(builder, min(end, self._tail_at))
        if builder.end < end:
            builder.literal(self._tail[builder.end - self._tail_at : end - self._tail_at])
        return builder.finish(end)

    def _map_structures(self, builder: PieceListBuilder, end: int) -> None:
        for start, content in self._structures:
            if start < end and builder.end < start + len(content):
                _zero_until(builder, start)
                builder.literal(content[builder.end - start : end - start])
        if self._table_at < end and builder.end < self._table_end:
            _zero_until(builder, self._table_at)
            while builder.end < min(end, self._table_end):
                part = min(end, self._table_end, builder.end + _LITERAL)
                builder.literal(self._table(builder.end - self._table_at, part - self._table_at))
        _zero_until(builder, end)

    def _map_blocks(self, builder: PieceListBuilder, end: int) -> None:
        at, size = self._blocks_at, self._blocks.cluster_size
        first, last = (builder.end - at) // self._stride, -(-(end - at) // self._stride)
        for block, run_end, rank in self._blocks.runs_by_rank(first, last):
            together = 1 if self._lead else run_end - block
            for index in range(0, run_end - block, together):
                start = at + (rank + index) * self._stride
                data_at = start + len(self._lead)
                if builder.end < data_at:
                    builder.literal(self._lead[builder.end - start : end - start])
                if builder.end < end:
                    until = min(end, data_at + together * size)
                    self._map_disk(builder, until, (block + index) * size - data_at)

    def _map_disk(self, builder: PieceListBuilder, end: int, shift: int) -> None:
        """Up to `end`: what the disk holds `shift` bytes further on; zero where it is over."""
        for start, data_end in self._extents.data_ranges(builder.end + shift):
            if start - shift >= end:
                break
            _zero_until(builder, start - shift)
            builder.data(min(end, data_end - shift), builder.end + shift)
        _zero_until(builder, end)


def _zero_until(builder: PieceListBuilder, end: int) -> None:
    if builder.end < end:
        builder.zero(end)
