"""Readahead for a view that is put together of others: its plan says where to fetch from.

Who reads a disk in sequence may jump about in the file that holds it, so streams are found in the
view's own offsets (imgfs.cache.readahead) and only what is fetched for them is translated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from imgfs.cache.fills import Fill
from imgfs.cache.readahead import Ahead
from imgfs.cache.window import Window
from imgfs.pieces import Coded, Derived, Kind, Piece, PieceList
from imgfs.views.view import View

RUN = 4 << 20  # bytes of the view that are fetched in one go
WATCHED = 3  # pieces of a window: of one alone nothing may have to be read
_NOT_FETCHED = (Kind.ZERO, Kind.LITERAL)


class PlanAhead:
    """An `Ahead` of `size` bytes.  `known(offset)` is the plan there, where it is remembered.

    `below` is that of the first file which has one.
    """

    def __init__(
        self,
        size: int,
        files: Sequence[View],
        known: Callable[[int], PieceList | None],
        below: Ahead,
    ) -> None:
        self.size = size
        self._files = files
        self._known = known
        self._below = below

    @property
    def most_ahead(self) -> int:
        return self._below.most_ahead

    @property
    def line(self) -> Window:
        return self._below.line

    @property
    def round_trip_s(self) -> float:
        return self._below.round_trip_s

    def ahead_ranges(self, start: int) -> Iterator[tuple[int, int]]:
        run: tuple[int, int] | None = None
        for piece in self._pieces(start, self.size):
            if run is not None and (
                piece.kind in _NOT_FETCHED or piece.start > run[1] or run[1] - run[0] >= RUN
            ):
                yield run
                run = None
            if piece.kind not in _NOT_FETCHED:
                run = (piece.start if run is None else run[0], piece.end)
        if run is not None:
            yield run

    def fetch_ahead(self, start: int, end: int, *, at_once: bool = False) -> list[Fill]:
        fills: list[Fill] = []
        for file, low, high in _joined(self._pieces(start, end)):
            below = self._files[file].ahead
            if below is not None:
                fills += below.fetch_ahead(low, high, at_once=at_once)
        return fills

    def drop_ahead(self, fills: list[Fill]) -> None:
        for file in self._files:
            if file.ahead is not None:
                file.ahead.drop_ahead(fills)

    def watch(self, start: int, end: int, then: Callable[[], None]) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = []
        watched = 0
        for file, low, high in _joined(p for p in self._pieces(start, end) if p.kind == Kind.DATA):
            below = self._files[file].ahead
            if below is not None:
                found += below.watch(low, high, then)
                watched += 1
            if watched == WATCHED:
                break
        return found

    def _pieces(self, start: int, end: int) -> Iterator[Piece]:
        """As far as they are remembered."""
        while start < end:
            plan = self._known(start)
            if plan is None:
                return
            upto = min(end, plan.end)
            yield from plan.between(start, upto)
            start = upto


def _used(piece: Piece) -> tuple[int, int, int] | None:
    """The file's number, and its range, of which the piece is made."""
    length = piece.end - piece.start
    if piece.kind == Kind.DATA:
        return piece.file, piece.offset, piece.offset + length
    if isinstance(piece.detail, Coded):
        return piece.file, piece.offset, piece.offset + piece.detail.length
    if isinstance(piece.detail, Derived):
        skip = piece.detail.skip
        return piece.file, *piece.detail.needs(skip, skip + length)
    return None


def _joined(pieces: Iterator[Piece]) -> Iterator[tuple[int, int, int]]:
    """What they are made of, file and range, in their order; what follows or overlaps is one."""
    last: tuple[int, int, int] | None = None
    for piece in pieces:
        used = _used(piece)
        if used is None or used[1] >= used[2]:
            continue
        if last is not None and used[0] == last[0] and last[1] <= used[1] <= last[2]:
            last = (last[0], last[1], max(last[2], used[2]))
            continue
        if last is not None:
            yield last
        last = used
    if last is not None:
        yield last
