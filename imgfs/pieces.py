"""Where the bytes of a range come from: ordered pieces, each of one kind.

A format says so of the disk that it holds, a layout of the file that it would be.  Ranges are
half-open, `[start, end)`, in bytes.

A `PieceList` is packed (nineteen bytes a piece) because tables have millions of entries.  It
is made only by `PieceListBuilder`, which proves that it is ascending, contiguous and
covering, and joins what continues its neighbour.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias


class Kind(enum.IntEnum):
    BELOW = 0  #: not said here: the backing file's bytes, or zeroes where there is none
    ZERO = 1  #: zeroes, whatever is below
    DATA = 2  #: bytes of a file, from `offset` on
    CODED = 3  #: compressed: `detail` is a `Coded`
    LITERAL = 4  #: `detail` is the bytes themselves
    DERIVED = 5  #: made of a file's bytes: `detail` is a `Derived`


class Codec(enum.Enum):
    DEFLATE = "deflate"  #: RFC 1951, without a header
    ZLIB = "zlib"  #: RFC 1950
    ZSTD = "zstd"  #: RFC 8878
    GRAIN = "grain"  #: a grain marker of VMDK (sector and length), then RFC 1950


@dataclass(frozen=True, slots=True)
class Coded:
    """A unit that can only be decoded as a whole; it begins at the piece's `offset` in its file.

    It is over in at most `length` bytes there, and makes `unit` bytes, of which the piece is those
    from `skip` on.
    """

    codec: Codec
    length: int
    unit: int
    skip: int = 0
    sector: int = 0  #: GRAIN: what its marker must say


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived(ABC):
    """Bytes that are made of others, in a file; the piece is those from `skip` on."""

    skip: int = 0

    @abstractmethod
    def needs(self, start: int, end: int) -> tuple[int, int]:
        """The range of the file of which the bytes `[start, end)` are made; it may be empty."""

    @abstractmethod
    def make(self, data: bytes | memoryview, start: int, end: int) -> bytes:
        """The bytes `[start, end)`, of what the file has in the range that `needs` says."""


Detail: TypeAlias = Coded | Derived | bytes | None
#: what native code takes: start, ends, kinds, files, offsets
Packed: TypeAlias = "tuple[int, array[int], bytes, array[int], array[int]]"


class Piece(NamedTuple):
    start: int
    end: int
    kind: Kind
    file: int = 0  #: DATA, CODED and DERIVED: which of the files, as `imgfs.steps` counts them
    offset: int = 0  #: DATA and CODED: of the first byte there
    detail: Detail = None

    def clip(self, start: int, end: int) -> Piece:
        """The part of it in `[start, end)`, which must lie inside."""
        cut = start - self.start
        offset, detail = self.offset, self.detail
        if self.kind == Kind.DATA:
            offset += cut
        elif isinstance(detail, Coded | Derived):
            detail = replace(detail, skip=detail.skip + cut)
        elif isinstance(detail, bytes):
            detail = detail[cut : end - self.start]
        return Piece(start, end, self.kind, self.file, offset, detail)


class PieceList:
    """Contiguous pieces from `start` to `end`; immutable."""

    __slots__ = ("_details", "_ends", "_files", "_kinds", "_offsets", "start")

    def __init__(
        self,
        start: int,
        ends: array[int],
        kinds: bytes,
        files: array[int],
        offsets: array[int],
        details: dict[int, Detail],
    ) -> None:
        """For `PieceListBuilder` only."""
        self.start = start
        self._ends = ends
        self._kinds = kinds
        self._files = files
        self._offsets = offsets
        self._details = details

    @property
    def end(self) -> int:
        return self._ends[-1] if self._ends else self.start

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def packed(self) -> Packed:
        return self.start, self._ends, self._kinds, self._files, self._offsets

    @property
    def has_below(self) -> bool:
        return Kind.BELOW in self._kinds

    def literals(self) -> Iterator[tuple[int, bytes]]:
        """Where each LITERAL begins, and its bytes."""
        for index, detail in self._details.items():
            if isinstance(detail, bytes):
                yield self._ends[index - 1] if index else self.start, detail

    @property
    def literal_bytes(self) -> int:
        return sum(len(content) for _, content in self.literals())

    def renumbered(self, first: int) -> PieceList:
        """The same, of files whose numbers begin at `first`."""
        if not first:
            return self
        files = array("H", (file + first for file in self._files))
        return PieceList(self.start, self._ends, self._kinds, files, self._offsets, self._details)

    def __iter__(self) -> Iterator[Piece]:
        start, details = self.start, self._details
        packed = zip(self._ends, self._kinds, self._files, self._offsets, strict=True)
        for index, (end, kind, file, offset) in enumerate(packed):
            yield Piece(start, end, Kind(kind), file, offset, details.get(index))
            start = end

    def between(self, start: int, end: int) -> Iterator[Piece]:
        """The pieces of `[start, end)`, which must lie within this list, cut to it."""
        if not self.start <= start <= end <= self.end:
            raise ValueError(f"[{start}, {end}) is not inside [{self.start}, {self.end})")
        index = bisect_right(self._ends, start)
        while start < end:
            first = self._ends[index - 1] if index else self.start
            piece = Piece(
                first,
                self._ends[index],
                Kind(self._kinds[index]),
                self._files[index],
                self._offsets[index],
                self._details.get(index),
            )
            yield piece.clip(start, min(end, piece.end))
            start = piece.end
            index += 1


class PieceListBuilder:
    """Builds a `PieceList` by appending; refuses gaps, overlaps and no progress."""

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._end = start
        self._ends: array[int] = array("Q")
        self._kinds = bytearray()
        self._files: array[int] = array("H")
        self._offsets: array[int] = array("Q")
        self._details: dict[int, Detail] = {}

    @property
    def end(self) -> int:
        """Up to where the list reaches so far."""
        return self._end

    def __len__(self) -> int:
        return len(self._ends)

    def below(self, end: int) -> None:
        self._append(end, Kind.BELOW)

    def zero(self, end: int) -> None:
        self._append(end, Kind.ZERO)

    def data(self, end: int, offset: int, file: int = 0) -> None:
        """From the present end up to `end`: the file's bytes from `offset` on."""
        self._append(end, Kind.DATA, file, offset)

    def extend(self, ends: array[int], kinds: bytes, offsets: array[int], file: int = 0) -> None:
        """Append pieces of BELOW, ZERO and DATA, none of which continues the one before it.

        Raises ValueError when the first one is no progress; that all are ascending is the
        caller's to know.
        """
        if not ends:
            return
        self._append(ends[0], Kind(kinds[0]), file, offsets[0])
        self._ends.extend(ends[1:])
        self._kinds += kinds[1:]
        self._files.extend(array("H", [file]) * (len(ends) - 1))
        self._offsets.extend(offsets[1:])
        self._end = ends[-1]

    def coded(self, end: int, offset: int, coded: Coded, file: int = 0) -> None:
        self._append(end, Kind.CODED, file, offset, coded)

    def derived(self, end: int, derived: Derived, file: int = 0) -> None:
        self._append(end, Kind.DERIVED, file, detail=derived)

    def literal(self, content: bytes) -> None:
        self._append(self._end + len(content), Kind.LITERAL, detail=content)

    def piece(self, piece: Piece) -> None:
        """Append it as it is; it must begin at the present end."""
        if piece.start != self._end:
            raise ValueError(f"piece begins at {piece.start}, not at {self._end}")
        self._append(piece.end, piece.kind, piece.file, piece.offset, piece.detail)

    def _append(
        self, end: int, kind: Kind, file: int = 0, offset: int = 0, detail: Detail = None
    ) -> None:
        if end <= self._end:
            raise ValueError(f"piece ends at {end}, not past {self._end}")
        if self._kinds and self._kinds[-1] == kind and self._continues(kind, file, offset):
            self._ends[-1] = end
        else:
            if detail is not None:
                self._details[len(self._ends)] = detail
            self._ends.append(end)
            self._kinds.append(kind)
            self._files.append(file)
            self._offsets.append(offset)
        self._end = end

    def _continues(self, kind: Kind, file: int, offset: int) -> bool:
        if kind == Kind.DATA:
            before = self._ends[-2] if len(self._ends) > 1 else self._start
            length = self._end - before
            return self._files[-1] == file and self._offsets[-1] + length == offset
        return kind in (Kind.BELOW, Kind.ZERO)

    def finish(self, end: int) -> PieceList:
        """The list, which must reach exactly `end` (ValueError otherwise)."""
        if end != self._end:
            raise ValueError(f"pieces reach {self._end}, not {end}")
        kinds = bytes(self._kinds)
        return PieceList(self._start, self._ends, kinds, self._files, self._offsets, self._details)
