"""Packed pieces, made of tables and looked through, against the plainest way to do it."""

from __future__ import annotations

import itertools
import struct
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgfs._native import _map, _pieces
from imgfs.extents import ExtentList, Flags
from imgfs.formats.entries import Entries
from imgfs.pieces import Kind, Piece, PieceList, PieceListBuilder

UNIT = 16
LOW, HIGH = 32, 400  # of the file, where data may be
RULES = [(0xF, 0xF, Kind.BELOW), (0x1, 0x1, Kind.ZERO), (0x6, 0x0, Kind.DATA)]  # 0x6: odd ones
CODES = {(4, False): "<I", (4, True): ">I", (8, False): "<Q", (8, True): ">Q"}


def meaning(entry: int, length: int) -> tuple[Kind, int] | None:
    """The rules, said again: kind and offset."""
    if entry & 0xF == 0xF:
        return Kind.BELOW, 0
    if entry & 1:
        return Kind.ZERO, 0
    offset = (entry >> 4) * 8 + 32
    if entry & 6 or not LOW <= offset <= HIGH - length:
        return None
    return Kind.DATA, offset


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 900) | st.sampled_from([0x10, 0x30, 0x50, 0x70, 1, 0xF])),
    st.sampled_from(sorted(CODES)),
    st.integers(0, 3),
    st.integers(1, 40),
    st.integers(0, UNIT - 1),
)
def test_entries(
    entries: list[int], how: tuple[int, bool], first: int, most: int, cut: int
) -> None:
    width, big_endian = how
    plain = Entries(
        *(width, RULES),
        big_endian=big_endian,
        mask=~0xF & 0xFFFFFFFF,
        shift=4,
        scale=8,
        base=32,
        low=LOW,
        high=HIGH,
    )
    end = max(1, (first + len(entries)) * UNIT - cut)
    made, wanted = PieceListBuilder(first * UNIT), PieceListBuilder(first * UNIT)
    taken = 0
    for entry in entries:
        at, to = wanted.end, min(wanted.end + UNIT, end)
        says = meaning(entry, to - at) if at < to else None
        if says is None:
            break
        before = len(wanted)
        piece = Piece(at, to, says[0], 1 if says[0] == Kind.DATA else 0, says[1])
        trial = PieceListBuilder(first * UNIT)
        for each in wanted.finish(wanted.end):
            trial.piece(each)
        trial.piece(piece)
        if len(trial) > most and len(trial) > before:
            break
        wanted.piece(piece)
        taken += 1
    table = b"".join(struct.pack(CODES[how], entry) for entry in entries)
    assert plain.append(made, table, UNIT, end, most, file=1) == taken
    found = [
        piece if piece.kind == Kind.DATA else piece._replace(file=0)
        for piece in made.finish(made.end)
    ]
    assert found == list(wanted.finish(wanted.end))


def test_offsets_that_no_file_has() -> None:
    plain = Entries(8, [(0, 0, Kind.DATA)], mask=2**64 - 1, scale=512, high=2**63)
    pieces = PieceListBuilder()
    table = struct.pack("<2Q", 3, 2**63)
    assert plain.append(pieces, table, 512, 1 << 20, 10) == 1
    assert list(pieces.finish(512)) == [Piece(0, 512, Kind.DATA, 0, 1536)]


def test_broken_arguments() -> None:
    plain = Entries(8, [(0, 0, Kind.ZERO)], mask=0, high=0)
    with pytest.raises(ValueError, match="whole entries"):
        plain.append(PieceListBuilder(), b"1234567", 512, 1 << 20, 10)
    bad = (0, array("Q", [1, 2]), b"\1", array("H", [0]), array("Q", [0]))
    with pytest.raises(ValueError, match="one length"):
        _pieces.reaches(bad)
    with pytest.raises(ValueError, match="one length"):
        _map.SegmentMap(5).put(bad, [])
    with pytest.raises(TypeError):
        _pieces.reaches(5)  # type: ignore[arg-type]


@st.composite
def lists(draw: st.DrawFn) -> PieceList:
    """Over two files of 200 bytes."""
    builder = PieceListBuilder(draw(st.integers(0, 9)))
    for kind in draw(st.lists(st.sampled_from(Kind), min_size=1, max_size=9)):
        length = draw(st.integers(1, 20))
        end = builder.end + length
        if kind == Kind.DATA:
            builder.data(end, draw(st.integers(0, 180)), draw(st.integers(0, 1)))
        elif kind in (Kind.LITERAL, Kind.DERIVED):
            builder.literal(bytes(range(1, length + 1)))
        elif kind == Kind.ZERO:
            builder.zero(end)
        else:
            builder.below(end)
    return builder.finish(builder.end)


@settings(deadline=None)
@given(lists())
def test_reaches(pieces: PieceList) -> None:
    wanted: dict[int, tuple[int, int]] = {}
    for piece in pieces:
        if piece.kind == Kind.DATA:
            start, end = piece.offset, piece.offset + piece.end - piece.start
            low, high = wanted.get(piece.file, (start, end))
            wanted[piece.file] = min(low, start), max(high, end)
    assert _pieces.reaches(pieces.packed) == wanted


@settings(deadline=None)
@given(lists(), st.lists(st.booleans(), min_size=200, max_size=200), st.data())
def test_extents(pieces: PieceList, zeroes: list[bool], data: st.DataObject) -> None:
    start = data.draw(st.integers(pieces.start, pieces.end - 1))
    end = data.draw(st.integers(start + 1, pieces.end))
    low = data.draw(st.integers(0, 199))
    known = ExtentList(
        low,
        array("Q", range(low + 1, 201)),
        bytes(Flags.ZERO if zero else Flags.DATA for zero in zeroes[low:]),
    )
    wanted = []
    for piece in pieces.between(start, end):
        for at in range(piece.end - piece.start):
            where = piece.offset + at
            is_known = piece.kind == Kind.DATA and piece.file == 0 and where >= known.start
            wanted.append(piece.kind == Kind.ZERO or (is_known and zeroes[where]))
    files = [(known.start, known.ends, known.flags)]
    ends, flags = _pieces.extents(pieces.packed, start, end, files)
    found = [
        extent.is_zero for extent in ExtentList(start, ends, flags) for _ in range(extent.length)
    ]
    assert found == wanted
    assert all(a != b for a, b in itertools.pairwise(flags))


@settings(deadline=None)
@given(lists())
def test_put_is_as_one_by_one(pieces: PieceList) -> None:
    files = [_map.SegmentMap(200), _map.SegmentMap(200)]
    for index, file in enumerate(files):
        file.set_literal(20 * index, bytes(range(100)))
        file.set_zero(150, 170)
    at_once, each = _map.SegmentMap(300), _map.SegmentMap(300)
    at_once.put(pieces.packed, files)
    for piece in pieces:
        if piece.kind == Kind.ZERO:
            each.set_zero(piece.start, piece.end)
        elif piece.kind == Kind.DATA:
            length = piece.end - piece.start
            each.copy(piece.start, files[piece.file], piece.offset, length)
        elif piece.kind != Kind.LITERAL:
            each.set_ask(piece.start, piece.end, _map.DATA)
    assert at_once.segments(0, 300) == each.segments(0, 300)
    for at in range(300):
        assert at_once.read(at, 1) == each.read(at, 1)


def test_next_unknown() -> None:
    segments = _map.SegmentMap(100)
    assert segments.next_unknown(7, 50) == 7
    segments.set_zero(0, 20)
    segments.set_ask(20, 30, _map.DATA)
    assert segments.next_unknown(7, 50) == 30
    assert segments.next_unknown(7, 25) == 25
    assert segments.next_unknown(40, 50) == 40
    segments.set_zero(30, 100)
    assert segments.next_unknown(0, 100) == 100


def test_a_map_that_is_filled_in_order_is_packed() -> None:
    """A million segments are to be tens of MiB: chunks that are left half full are twice that."""
    segments = _map.SegmentMap(2_000_000)
    before = resident()
    for at in range(0, 2_000_000, 2):
        segments.set_ask(at, at + 1, _map.HOLE)
        segments.set_zero(at + 1, at + 2)
    assert len(segments) == 2_000_000
    assert resident() - before < 2_000_000 * 24 * 1.3


def resident() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123 - a line of it is all
        return int(file.read().split()[1]) * 4096
