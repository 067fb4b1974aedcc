"""The disk inside of a virtual disk's file, and of the files below that one.

A chain of layers: what a layer leaves out is in the next one, where that one is long enough, and
otherwise zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imgfs.cache.readahead import followed
from imgfs.formats.disk import Disk
from imgfs.pieces import Kind, Piece, PieceList, PieceListBuilder
from imgfs.views.drive import drive
from imgfs.views.planned import PlannedView
from imgfs.views.view import View

TABLES_AHEAD = 32 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Layer:
    """A disk and its files, of which the first is the image itself; a raw one is its own disk."""

    files: list[View]
    disk: Disk | None = None

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.files[0].size if self.disk is None else self.disk.size

    def facts(self) -> list[tuple[str, str]]:
        """What a person wants to know of its format."""
        return [] if self.disk is None else self.disk.facts()


class DecodedView(PlannedView):
    """The disk of the first layer as raw bytes."""

    def __init__(self, name: str, layers: Sequence[Layer]) -> None:
        files = [file for layer in layers for file in layer.files]
        super().__init__(name, layers[0].size, files[0], files)
        self.layers = layers
        #: from where to where of each layer's disk its tables were asked for
        self._fetched_tables = [(0, 0)] * len(layers)
        #: the number in `files` of each layer's first
        self._firsts = [sum(len(layer.files) for layer in layers[:i]) for i in range(len(layers))]

    async def _plan(self, offset: int, length: int) -> PieceList:
        return await self._layer_plan(0, offset, length)

    async def _layer_plan(self, index: int, offset: int, length: int) -> PieceList:
        """As `_plan`, of a layer and all below it."""
        layer, first = self.layers[index], self._firsts[index]
        if layer.disk is None:
            builder = PieceListBuilder(offset)
            builder.data(offset + length, offset, first)
            return builder.finish(builder.end)
        self._fetch_tables(index, offset, length)
        with followed():
            pieces = await drive(layer.disk.map(offset, length), layer.files)
        if not pieces.has_below:
            return pieces.renumbered(first)
        below = await self._below(index + 1, pieces)
        builder = PieceListBuilder(pieces.start)
        for piece in pieces:
            if piece.kind != Kind.BELOW:
                builder.piece(piece._replace(file=first + piece.file))
            else:
                self._append_below(builder, below, piece.end)
        return builder.finish(pieces.end)

    def _fetch_tables(self, index: int, offset: int, length: int) -> None:
        """Let those come in that later steps of a long map need, while this one is looked at."""
        layer, ahead = self.layers[index], self.layers[index].files[0].ahead
        start, end = self._fetched_tables[index]
        if layer.disk is None or ahead is None or start <= offset < (start + end) // 2:
            return
        reads, end = layer.disk.tables(offset, length, TABLES_AHEAD)
        self._fetched_tables[index] = offset, end
        for each in reads:
            if each.offset < ahead.size:
                end = min(each.offset + each.length, ahead.size)
                ahead.fetch_ahead(each.offset, end, at_once=True)

    async def _below(self, index: int, pieces: PieceList) -> list[PieceList]:
        """What the layer says of all that these pieces leave out."""
        if index == len(self.layers):
            return []
        gaps = [piece for piece in pieces if piece.kind == Kind.BELOW]
        if not gaps:
            return []
        at, end = gaps[0].start, min(gaps[-1].end, self.layers[index].size)
        found: list[PieceList] = []
        while at < end:
            planned = await self._layer_plan(index, at, end - at)
            found.append(planned)
            at = planned.end
        return found

    def _append_below(self, builder: PieceListBuilder, below: list[PieceList], end: int) -> None:
        for planned in below:
            if planned.start <= builder.end < planned.end and builder.end < end:
                for piece in planned.between(builder.end, min(end, planned.end)):
                    builder.piece(piece)
        if builder.end < end:
            builder.piece(Piece(builder.end, end, Kind.ZERO))

    async def _check(self) -> None:
        for file in self.files:
            await file.check()
