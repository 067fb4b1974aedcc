"""A view put together from pieces of other views, zeroes, and bytes of its own.

    unknown ----> planned: the pieces of the range are published in `map`
                     |  zero, literal, and what the views below have locally: answered natively
                     |  the rest, when it is read: fetched through the views below, and published
                     |  again, since they know more by then

What is not planned yet is (ASK, UNKNOWN) in the map; what only Python can give, compressed data and
what is derived from other bytes, is (ASK, DATA).
"""

from __future__ import annotations

import contextlib
import logging
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping

import trio

from imgfs._native import _map
from imgfs.errors import CorruptImage, SourceChanged
from imgfs.extents import ExtentList
from imgfs.formats.codecs import decode
from imgfs.image import Buffer
from imgfs.pieces import Coded, Derived, Kind, Piece, PieceList
from imgfs.views.drive import all_of
from imgfs.views.view import View
from imgfs.views.work import work

log = logging.getLogger(__name__)

MOST_PIECES = 1 << 16  # that are remembered, of all plans together
MOST_UNITS = 32 << 20  # bytes of decompressed units that are remembered


class PlannedView(View):
    """`files` are the views that the plan's pieces of data are in."""

    def __init__(self, name: str, size: int, below: View, files: list[View]) -> None:
        super().__init__(name, size, below.mtime_ns, below.mode)
        self.files = files
        self.map = _map.SegmentMap(size)
        self._plans: OrderedDict[tuple[int, int], PieceList] = OrderedDict()
        self._units: OrderedDict[tuple[int, int, int], bytes] = OrderedDict()
        self._decoding: dict[tuple[int, int, int], trio.Event] = {}
        self._preparing = trio.Lock()
        self._is_prepared = self._is_measured = False
        for file in files:
            file.when_stale(self.mark_stale)

    @abstractmethod
    async def _plan(self, offset: int, length: int) -> PieceList:
        """Pieces from `offset` or before it on, at least one byte further; never BELOW."""

    async def measure(self) -> None:
        """Nothing is published for that: of many files that are looked at, few are opened."""
        async with self._preparing:
            if self._is_measured:
                return
            with contextlib.suppress(CorruptImage):
                extents = await self.extents(0, self.size)
                self.stored_bytes = await work(len(extents), extents.stored_bytes)
                self._is_measured = True
                return
        await self.prepare()

    async def prepare(self) -> None:
        async with self._preparing:
            if not self._is_prepared:
                try:
                    await self.resolve(0, self.size)
                except CorruptImage as exc:
                    log.warning("%s; what is not damaged can be read", exc)
                    await trio.to_thread.run_sync(self._give_up_planning)
                if not self._is_measured:
                    self.stored_bytes = await trio.to_thread.run_sync(self.map.data_bytes)
                self._is_prepared = self._is_measured = True

    async def resolve(self, offset: int, length: int) -> None:
        end = offset + length
        at = offset
        while at < end:
            self.refuse_stale()
            at = await trio.to_thread.run_sync(self._next_unknown, at, end)
            if at < end:
                pieces = await self._planned(at, end)
                await self._publish(pieces)
                at = pieces.end

    def _give_up_planning(self) -> None:
        """Call all that is unknown data: who reads what is damaged there is told so."""
        at = 0
        while (at := self._next_unknown(at, self.size)) < self.size:
            start, end, _, _ = self.map.segments(at, self.size - at)[0]
            self.map.set_ask(start, end, _map.DATA)

    def _next_unknown(self, start: int, end: int) -> int:
        step = 1 << 30  # of a list of segments
        while start < end:
            for a, _, _, seek in self.map.segments(start, min(step, end - start)):
                if seek == _map.UNKNOWN:
                    return a
            start = min(end, start + step)
        return end

    async def _planned(self, offset: int, end: int) -> PieceList:
        for key, pieces in self._plans.items():
            if key[0] <= offset < key[1]:
                self._plans.move_to_end(key)
                return pieces
        pieces = await self._plan(offset, end - offset)
        if not pieces.start <= offset < pieces.end <= self.size:
            raise AssertionError(f"{self.name}: a plan of [{pieces.start}, {pieces.end})")
        self._plans[pieces.start, pieces.end] = pieces
        while len(self._plans) > 1 and sum(map(len, self._plans.values())) > MOST_PIECES:
            self._plans.popitem(last=False)
        return pieces

    async def _publish(self, pieces: PieceList) -> None:
        """Say in the map where the bytes are."""
        for file, (start, end) in _reaches(pieces).items():
            await self.files[file].resolve(start, end - start)
        if self.stale is None:
            await work(len(pieces), self._publish_now, pieces)
        self.refuse_stale()

    def _publish_now(self, pieces: PieceList) -> None:
        for piece in pieces:
            self._publish_piece(piece)

    def _publish_piece(self, piece: Piece) -> None:
        if piece.kind == Kind.ZERO:
            self.map.set_zero(piece.start, piece.end)
        elif piece.kind == Kind.DATA:
            length = piece.end - piece.start
            self.map.copy(piece.start, self.files[piece.file].map, piece.offset, length)
        elif piece.kind == Kind.LITERAL:
            assert isinstance(piece.detail, bytes)
            self.map.set_literal(piece.start, piece.detail)
        else:
            self.map.set_ask(piece.start, piece.end, _map.DATA)

    async def _extents(self, offset: int, length: int) -> ExtentList:
        """As the files' own extents and tables say, and not what was found out by reading: this is
        the same whenever it is asked for."""
        end = offset + length
        marked = _map.SegmentMap(end)
        at = offset
        while at < end:
            pieces = await self._planned(at, end)
            holes = {
                file: await self.files[file].extents(start, to - start)
                for file, (start, to) in _reaches(pieces).items()
            }
            part = pieces.between(at, min(end, pieces.end))
            items = len(pieces) + sum(map(len, holes.values()))
            at = await work(items, _mark_holes, marked, part, holes)
        ends, flags = marked.extents(offset, length)
        return ExtentList(offset, ends, flags)

    async def _read(self, offset: int, length: int) -> Buffer:
        self.refuse_stale()
        try:
            await self.resolve(offset, length)
            local = await trio.to_thread.run_sync(
                self.map.read, offset, length, abandon_on_cancel=True
            )
            return await self._fetch(offset, length) if local is None else local
        except SourceChanged as exc:
            self.mark_stale(exc)
            raise

    async def _fetch(self, offset: int, length: int) -> Buffer:
        pieces: list[Piece] = []
        at, end = offset, offset + length
        while at < end:
            planned = await self._planned(at, end)
            pieces += planned.between(at, min(end, planned.end))
            at = min(end, planned.end)
        if len(pieces) == 1:
            return await self._bytes_of(pieces[0])
        found = bytearray(length)
        jobs: list[Callable[[], Awaitable[None]]] = []
        for piece in pieces:
            if piece.kind != Kind.ZERO:

                async def put(piece: Piece = piece) -> None:
                    content = await self._bytes_of(piece)
                    found[piece.start - offset : piece.end - offset] = content

                jobs.append(put)
        await all_of(jobs)
        return found

    async def _bytes_of(self, piece: Piece) -> Buffer:
        length = piece.end - piece.start
        if piece.kind == Kind.ZERO:
            return bytes(length)
        if piece.kind == Kind.LITERAL:
            assert isinstance(piece.detail, bytes)
            return piece.detail
        if piece.kind == Kind.DATA:
            content = await self.files[piece.file].read(piece.offset, length)
            if self.stale is None:
                self._publish_piece(piece)
            return content
        if isinstance(piece.detail, Derived):
            return await self._derived(piece.file, piece.detail, length)
        assert isinstance(piece.detail, Coded)
        unit = await self._unit(piece.file, piece.offset, piece.detail)
        return unit[piece.detail.skip : piece.detail.skip + length]

    async def _derived(self, file: int, derived: Derived, length: int) -> bytes:
        start, end = derived.skip, derived.skip + length
        first, last = derived.needs(start, end)
        data = await self.files[file].read(first, last - first) if first < last else b""
        return await trio.to_thread.run_sync(derived.make, memoryview(data), start, end)

    async def _unit(self, file: int, offset: int, coded: Coded) -> bytes:
        """Decompressed, once for all who want it now."""
        key = (file, offset, coded.sector)
        while key in self._decoding:
            await self._decoding[key].wait()
        if key in self._units:
            self._units.move_to_end(key)
            return self._units[key]
        done = self._decoding[key] = trio.Event()
        try:
            below = self.files[file]
            length = min(coded.length, below.size - offset)
            data = await below.read(offset, length)
            where = f"{self.name}: compressed data at {offset} of {below.name}"
            unit = await trio.to_thread.run_sync(
                decode, coded.codec, memoryview(data), coded.unit, where, coded.sector
            )
        finally:
            del self._decoding[key]
            done.set()
        self._units[key] = unit
        while len(self._units) > 1 and sum(map(len, self._units.values())) > MOST_UNITS:
            self._units.popitem(last=False)
        return unit


def _reaches(pieces: PieceList) -> dict[int, tuple[int, int]]:
    """Of each file from where to where it is used."""
    found: dict[int, tuple[int, int]] = {}
    for piece in pieces:
        if piece.kind == Kind.DATA:
            start, end = piece.offset, piece.offset + piece.end - piece.start
            low, high = found.get(piece.file, (start, end))
            found[piece.file] = min(low, start), max(high, end)
    return found


def _mark_holes(
    marked: _map.SegmentMap, pieces: Iterable[Piece], files: Mapping[int, ExtentList]
) -> int:
    """Mark as zero what is; returns where the pieces end."""
    end = 0
    for piece in pieces:
        end = piece.end
        if piece.kind == Kind.ZERO:
            marked.set_zero(piece.start, piece.end)
        elif piece.kind == Kind.DATA:
            shift = piece.start - piece.offset
            known = files[piece.file]
            for start, to in known.hole_ranges(piece.offset, piece.offset + end - piece.start):
                marked.set_zero(start + shift, to + shift)
    return end
