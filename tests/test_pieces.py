"""Lists of pieces, against one piece a byte."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.pieces import Codec, Coded, Derived, Kind, Piece, PieceList, PieceListBuilder

CODED = Coded(Codec.ZLIB, 77, 64)


@dataclass(frozen=True, slots=True)
class Shifted(Derived):
    """The file's bytes from `offset` on, plus one."""

    offset: int

    def needs(self, start: int, end: int) -> tuple[int, int]:
        return self.offset + start, self.offset + end

    def make(self, data: bytes | memoryview, start: int, end: int) -> bytes:
        return bytes(byte + 1 for byte in data)


@st.composite
def lists(draw: st.DrawFn) -> PieceList:
    builder = PieceListBuilder(draw(st.integers(0, 5)))
    start = builder.end
    for kind in draw(st.lists(st.sampled_from(Kind), max_size=12)):
        length = draw(st.integers(1, 6))
        end = builder.end + length
        if kind == Kind.BELOW:
            builder.below(end)
        elif kind == Kind.ZERO:
            builder.zero(end)
        elif kind == Kind.DATA:
            builder.data(end, draw(st.integers(0, 20)), draw(st.integers(0, 1)))
        elif kind == Kind.CODED:
            builder.coded(end, draw(st.integers(0, 20)), CODED)
        elif kind == Kind.DERIVED:
            builder.derived(end, Shifted(5))
        else:
            builder.literal(draw(st.binary(min_size=length, max_size=length)))
    assert start <= builder.end
    return builder.finish(builder.end)


def single(piece: Piece, at: int) -> tuple[object, ...]:
    one = piece.clip(at, at + 1)
    return (one.kind, one.file, one.offset, one.detail)


@given(lists(), st.data())
def test_a_part_says_what_the_whole_says(pieces: PieceList, data: st.DataObject) -> None:
    whole = {at: single(piece, at) for piece in pieces for at in range(piece.start, piece.end)}
    assert sorted(whole) == list(range(pieces.start, pieces.end))
    start = data.draw(st.integers(pieces.start, pieces.end))
    end = data.draw(st.integers(start, pieces.end))
    part = {
        at: single(piece, at)
        for piece in pieces.between(start, end)
        for at in range(piece.start, piece.end)
    }
    assert part == {at: whole[at] for at in range(start, end)}


def test_neighbours_are_joined() -> None:
    builder = PieceListBuilder()
    builder.zero(5)
    builder.zero(6)
    builder.data(10, 100)
    builder.data(12, 104)
    builder.data(14, 106, file=1)
    builder.below(20)
    builder.below(30)
    assert list(builder.finish(30)) == [
        Piece(0, 6, Kind.ZERO),
        Piece(6, 12, Kind.DATA, 0, 100),
        Piece(12, 14, Kind.DATA, 1, 106),
        Piece(14, 30, Kind.BELOW),
    ]


def test_no_progress_is_refused() -> None:
    builder = PieceListBuilder(4)
    with pytest.raises(ValueError, match="not past 4"):
        builder.zero(4)
    with pytest.raises(ValueError, match="not past 4"):
        builder.literal(b"")
    builder.zero(8)
    with pytest.raises(ValueError, match="begins at 9"):
        builder.piece(Piece(9, 10, Kind.ZERO))
    with pytest.raises(ValueError, match="reach 8, not 9"):
        builder.finish(9)


def test_a_range_outside() -> None:
    builder = PieceListBuilder()
    builder.zero(8)
    with pytest.raises(ValueError, match="not inside"):
        list(builder.finish(8).between(0, 9))


@given(lists(), st.data())
def test_many_are_appended_as_one_by_one(pieces: PieceList, data: st.DataObject) -> None:
    kinds = (Kind.BELOW, Kind.ZERO, Kind.DATA)
    plain = [piece for piece in pieces if piece.kind in kinds]
    at_once, one_by_one = PieceListBuilder(), PieceListBuilder()
    before = data.draw(st.sampled_from(kinds))
    for builder in (at_once, one_by_one):
        builder.piece(Piece(0, 3, before, 1 if before == Kind.DATA else 0, 7))
    ends: array[int] = array("Q")
    last = 3
    for piece in plain:
        length = piece.end - piece.start
        one_by_one.piece(Piece(last, last + length, piece.kind, 1, piece.offset))
        last += length
    joined = list(one_by_one.finish(last))
    packed = [piece for piece in joined if piece.end > 3]
    ends.extend(piece.end for piece in packed)
    kind_bytes = bytes(piece.kind for piece in packed)
    # What continued the first one begins where that ended.
    offsets = array("Q", (p.offset + max(0, 3 - p.start) for p in packed))
    at_once.extend(ends, kind_bytes, offsets, file=1)
    assert [p._replace(file=0) for p in at_once.finish(at_once.end)] == [
        p._replace(file=0) for p in joined
    ]


def test_appending_many_refuses_no_progress() -> None:
    builder = PieceListBuilder(9)
    with pytest.raises(ValueError, match="not past 9"):
        builder.extend(array("Q", [9]), bytes([Kind.ZERO]), array("Q", [0]))
