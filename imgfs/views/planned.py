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
from array import array
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice

import trio

from imgfs._native import _map, _pieces
from imgfs.cache.readahead import Readahead, followed, is_followed
from imgfs.errors import CorruptImage, SourceChanged
from imgfs.extents import ExtentList, ExtentListBuilder
from imgfs.formats.codecs import decode
from imgfs.image import Buffer
from imgfs.locks import Lock
from imgfs.pieces import Coded, Derived, Kind, Piece, PieceList
from imgfs.views.ahead import PlanAhead
from imgfs.views.drive import all_of
from imgfs.views.plans import Plans
from imgfs.views.units import shared_units
from imgfs.views.view import Origin, View
from imgfs.views.work import work

log = logging.getLogger(__name__)

MOST_LITERALS = 2 << 20  # bytes of generated tables that a map holds; others are made when read
MOST_TRACED = 256  # pieces
_NOTHING: tuple[int, array[int], bytes] = (0, array("Q"), b"")


class PlannedView(View):
    """`files` are the views that the plan's pieces of data are in."""

    def __init__(self, name: str, size: int, below: View, files: list[View]) -> None:
        super().__init__(name, size, below.mtime_ns, below.mode)
        self.files = files
        self.map = _map.SegmentMap(size)
        self._plans = Plans()
        self._units = shared_units()
        self._me = object()
        self._decoding: dict[tuple[int, int, int], trio.Event] = {}
        self._preparing = Lock()
        self._is_prepared = self._is_measured = False
        self._literals = 0
        self._ahead: PlanAhead | None = None
        self._readahead: Readahead | None = None
        for file in files:
            file.when_stale(self.mark_stale)

    def made_of(self) -> Sequence[View]:
        return self.files

    @property
    def is_nameless(self) -> bool:
        return any(file.is_nameless for file in self.files)

    @abstractmethod
    async def _plan(self, offset: int, length: int) -> PieceList:
        """Pieces from `offset` or before it on, at least one byte further; never BELOW."""

    async def measure(self) -> None:
        """Nothing is published for that: of many files that are looked at, few are opened."""
        if self._is_measured:
            return
        async with self._preparing:
            if self._is_measured:
                return
            with contextlib.suppress(CorruptImage):
                extents = await self.extents(0, self.size)
                self.stored_bytes = await work(len(extents), extents.data_bytes)
                self._is_measured = True
                return
        await self.prepare()

    async def prepare(self) -> None:
        if self._is_prepared:
            return
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
            at = self.map.next_unknown(at, end)
            if at < end:
                pieces = await self._planned(at, end)
                await self._publish(pieces)
                at = pieces.end

    def _give_up_planning(self) -> None:
        """Call all that is unknown data: who reads what is damaged there is told so."""
        at = 0
        while (at := self.map.next_unknown(at, self.size)) < self.size:
            start, end, _, _ = self.map.segments(at, self.size - at)[0]
            self.map.set_ask(start, end, _map.DATA)

    def _known(self, offset: int) -> PieceList | None:
        """The plan there, if it can be told at once."""
        return self._plans.at(offset)

    async def _planned(self, offset: int, end: int) -> PieceList:
        known = self._plans.at(offset)
        if known is not None:
            return known
        pieces = await self._plan(offset, end - offset)
        if not pieces.start <= offset < pieces.end <= self.size:
            raise AssertionError(f"{self.name}: a plan of [{pieces.start}, {pieces.end})")
        self._plans.add(pieces)
        return pieces

    async def _publish(self, pieces: PieceList) -> None:
        """Say in the map where the bytes are."""
        for file, (start, end) in _pieces.reaches(pieces.packed).items():
            await self.files[file].resolve(start, end - start)
        if self.stale is None:
            await work(len(pieces), self._publish_now, pieces)
        self.refuse_stale()

    def _publish_now(self, pieces: PieceList) -> None:
        self.map.put(pieces.packed, [file.map for file in self.files])
        for start, content in pieces.literals():
            self._literals += len(content)
            if self._literals <= MOST_LITERALS:
                self.map.set_literal(start, content)
            else:
                self.map.set_ask(start, start + len(content), _map.DATA)

    async def _extents(self, offset: int, length: int) -> ExtentList:
        """As the files' own extents and tables say, and not what was found out by reading: this is
        the same whenever it is asked for."""
        end = offset + length
        found = ExtentListBuilder(offset)
        while found.end < end:
            pieces = await self._planned(found.end, end)
            known = [_NOTHING] * len(self.files)
            for file, (start, to) in _pieces.reaches(pieces.packed).items():
                extents = await self.files[file].extents(start, to - start)
                known[file] = (start, extents.ends, extents.flags)
            upto = min(end, pieces.end)
            part = await work(len(pieces), _pieces.extents, pieces.packed, found.end, upto, known)
            found.extend(*part)
        return found.finish(end)

    async def trace(self, offset: int, length: int) -> list[Origin]:
        self.refuse_stale()
        found: list[Origin] = []
        at, end = offset, offset + length
        while at < end and len(found) < MOST_TRACED:
            pieces = await self._planned(at, end)
            for piece in islice(pieces.between(at, min(end, pieces.end)), MOST_TRACED):
                at = piece.end
                if piece.kind == Kind.DATA:
                    found.append(Origin(piece.start, at, self.files[piece.file], piece.offset))
                else:
                    of = None if piece.kind == Kind.ZERO else self
                    found.append(Origin(piece.start, at, of, piece.start))
        return found

    async def _read(self, offset: int, length: int) -> Buffer:
        self.refuse_stale()
        try:
            await self.resolve(offset, length)
            local = await self.from_map(offset, length)
            return await self._follow(offset, length) if local is None else local
        except SourceChanged as exc:
            self.mark_stale(exc)
            raise

    @property
    def is_only_looked_at(self) -> bool:
        return all(file.is_only_looked_at for file in self.files)

    async def peek(self, ranges: Sequence[tuple[int, int]]) -> list[Buffer] | None:
        if not self.is_only_looked_at:
            return None
        self.refuse_stale()
        found: list[Buffer] = []
        wanted: dict[int, list[tuple[int, int]]] = {}
        places: dict[int, list[tuple[bytearray, int]]] = {}
        for offset, length in ranges:
            part = bytearray(length)
            found.append(part)
            for piece in await self._pieces(offset, length):
                at, size = piece.start - offset, piece.end - piece.start
                if piece.kind == Kind.LITERAL:
                    assert isinstance(piece.detail, bytes)
                    part[at : at + size] = piece.detail
                elif piece.kind == Kind.DATA:
                    wanted.setdefault(piece.file, []).append((piece.offset, size))
                    places.setdefault(piece.file, []).append((part, at))
                elif piece.kind != Kind.ZERO:
                    return None
        for file, of_file in wanted.items():
            parts = await self.files[file].peek(of_file)
            if parts is None:
                return None
            for (part, at), data in zip(places[file], parts, strict=True):
                part[at : at + len(data)] = data
        return found

    @property
    def ahead(self) -> PlanAhead | None:
        if self._ahead is None:
            below = next((file.ahead for file in self.files if file.ahead is not None), None)
            if below is not None:
                self._ahead = PlanAhead(self.size, self.files, self._known, below)
        return self._ahead

    async def plan_ahead(self, offset: int, length: int) -> None:
        at, end = offset, min(offset + length, self.size)
        while at < end:
            pieces = await self._planned(at, end)
            upto = min(end, pieces.end)
            for piece in pieces.between(at, upto):
                if piece.kind == Kind.DATA:
                    length = piece.end - piece.start
                    await self.files[piece.file].plan_ahead(piece.offset, length)
            at = upto

    async def _follow(self, offset: int, length: int) -> Buffer:
        """As `_fetch`, and fetch ahead for who reads on."""
        if self.ahead is None:
            return await self._fetch(offset, length)
        if not is_followed():
            self._readahead = self._readahead or Readahead(self.ahead)
            end = offset + length
            await self.plan_ahead(offset, length)
            if self._readahead.missed(offset, end):
                await self.plan_ahead(end, 2 * self._readahead.window)
        with followed():
            return await self._fetch(offset, length)

    async def _fetch(self, offset: int, length: int) -> Buffer:
        pieces = await self._pieces(offset, length)
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

    async def _pieces(self, offset: int, length: int) -> list[Piece]:
        """All of the range, no more."""
        pieces: list[Piece] = []
        at, end = offset, offset + length
        while at < end:
            planned = await self._planned(at, end)
            pieces += planned.between(at, min(end, planned.end))
            at = min(end, planned.end)
        return pieces

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
                self.map.copy(piece.start, self.files[piece.file].map, piece.offset, length)
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
        known = self._units.get(self._me, key)
        if known is not None:
            return known
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
        self._units.put(self._me, key, unit)
        return unit
