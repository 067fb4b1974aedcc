"""Sparse extents of VMDK: a directory of tables of grains.

A table is wrong where it says what is not in the file; then the redundant directory's is asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from imgfs._native._tables import runs
from imgfs.formats import vmdk_tables as t
from imgfs.formats.window import Window
from imgfs.pieces import Codec, Coded, Kind
from imgfs.steps import Read, Steps, read_all

SECTOR = t.SECTOR


class Tables(NamedTuple):
    """Grain tables that stand in the file one after the other."""

    tables: int
    offset: int  #: bytes in the file; 0: there are none
    problem: str = ""


class Grains(NamedTuple):
    """Grains that are alike."""

    grains: int
    kind: Kind  #: BELOW, ZERO or DATA
    offset: int = 0  #: DATA: of the first, bytes in the file
    stride: int = 0  #: DATA: from each to the next, bytes
    problem: str = ""  #: why nothing is known of them


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseExtent(ABC):
    where: str  #: begins messages
    file: int
    file_size: int  #: bytes
    size: int  #: bytes of the disk
    grain: int  #: bytes
    entries: int  #: of a grain table
    width: int  #: bytes of an entry
    directories: tuple[int, ...]  #: bytes in the file: the grain directory's, the redundant one's
    absent: Kind  #: what a grain is that there is not
    directory: bytes | None = field(default=None, repr=False)  #: None: it is too large to be kept

    @property
    def span(self) -> int:
        """Bytes of the disk that a table is for."""
        return self.grain * self.entries

    @property
    def tables(self) -> int:
        return -(-self.size // self.span)

    @property
    def table_cost(self) -> int:
        """Bytes that a table counts for when it is said how many may be read at once."""
        return self.entries * self.width

    def read_directory(self) -> Read:
        """All of it."""
        return Read(self.directories[0], self.tables * self.width, self.file)

    def read_grains(self, first: int, end: int) -> Steps[list[Grains]]:
        """Of the tables `[first, end)`, in order."""
        if self.directory is None:
            found = yield from self._read_entries(self.directories[0], first, end)
        else:
            found = self.directory[first * self.width : end * self.width]
        located = list(self._locate(found, end - first))
        grains = yield from self._read_located(located)
        if len(self.directories) > 1:
            suspect = self._suspect(located, grains)
            grains = yield from self._replace(first, grains, suspect)
        return [run for table in grains for run in table]

    def _read_entries(self, directory: int, first: int, end: int) -> Steps[bytes]:
        at, length = directory + first * self.width, (end - first) * self.width
        (found,) = yield from read_all([Read(at, length, self.file)])
        return found

    def _locate(self, directory: bytes, count: int) -> Iterator[Tables]:
        """The tables of `count` entries of a directory, which may be cut off."""
        whole = len(directory) // self.width
        for entries, value, step in _triples(
            directory[: whole * self.width], self.width, self._directory_step()
        ):
            yield from self._tables(entries, value, step)
        if whole < count:
            yield Tables(count - whole, 0, f"{self.where}: the file ends in its grain directory")

    def _read_located(self, located: list[Tables]) -> Steps[list[list[Grains]]]:
        """One list for each entry of `located`."""
        size = self.entries * self.width
        reads = [Read(x.offset, x.tables * size, self.file) for x in located if x.offset]
        found = iter((yield from read_all(reads)))
        grains = []
        for tables in located:
            count = tables.tables * self.entries
            if tables.problem or not tables.offset:
                grains.append([Grains(count, self.absent, problem=tables.problem)])
            else:
                grains.append(list(self._parse(tables.offset, next(found), count)))
        return grains

    def _parse(self, offset: int, table: bytes, count: int) -> Iterator[Grains]:
        """The grains of `count` entries of tables at `offset`, which may be cut off."""
        whole = len(table) // self.width
        done = 0
        table = table[: whole * self.width]
        for entries, value, step in _triples(table, self.width, self._table_step()):
            yield from self._grains(entries, value, step, offset + done * self.width)
            done += entries
        if whole < count:
            problem = f"{self.where}: the file ends in the grain table at {offset}"
            yield Grains(count - whole, self.absent, problem=problem)

    def _suspect(self, located: list[Tables], grains: list[list[Grains]]) -> list[tuple[int, int]]:
        """[first, end) of the tables that the other directory may know better, counted from 0.

        Creators that write two directories write all tables: one without a table is suspect.
        """
        suspect = []
        first = 0
        for tables, found in zip(located, grains, strict=True):
            if not tables.offset or any(run.problem for run in found):
                suspect.append((first, first + tables.tables))
            first += tables.tables
        return suspect

    def _replace(
        self, first: int, grains: list[list[Grains]], suspect: list[tuple[int, int]]
    ) -> Steps[list[list[Grains]]]:
        """`grains`, which begin with table `first`, with what the redundant directory says of
        suspect ones where it is without fault."""
        if not suspect:
            return grains
        base = self.directories[1] + first * self.width
        reads = [Read(base + a * self.width, (b - a) * self.width, self.file) for a, b in suspect]
        entries = yield from read_all(reads)
        located = [list(self._locate(x, b - a)) for x, (a, b) in zip(entries, suspect, strict=True)]
        flat = yield from self._read_located([x for group in located for x in group])
        others = iter(flat)
        better = {}
        for (a, _), group in zip(suspect, located, strict=True):
            better[a] = [run for _ in group for run in next(others)]
        result = []
        table = 0
        for found in grains:
            other = better.get(table)
            usable = other is not None and not any(run.problem for run in other)
            result.append(other if other is not None and usable else found)
            table += sum(run.grains for run in found) // self.entries
        return result

    def append(self, window: Window, start: int, grains: list[Grains]) -> bool:
        """Append these to the window; the extent begins at `start` of the disk.  Whether the
        window ends here."""
        limit = start + self.size
        begins = self._begins(grains)
        for run in grains:
            at = window.builder.end
            end = min(limit, at + run.grains * self.grain)
            if end <= at:  # the last table has entries for more than there is
                break
            if run.problem:
                if window.bad(end, run.problem):
                    return True
            elif run.kind == Kind.DATA:
                if self._append_data(window, start, end, run, begins):
                    return True
            elif run.kind == Kind.ZERO:
                window.builder.zero(end)
            else:
                window.builder.below(end)
        return False

    def _begins(self, grains: list[Grains]) -> list[int]:
        """Where grains begin in the file, sorted, as far as `_append_data` wants to know."""
        return []

    def _append_data(
        self, window: Window, start: int, end: int, run: Grains, begins: list[int]
    ) -> bool:
        """As `append`, of a run of kind DATA; it ends at byte `end` of the disk."""
        at = window.builder.end
        together = end - at if run.stride == self.grain else self.grain
        offset = run.offset
        while at < end:
            stop = min(end, at + together)
            inside = max(0, self.file_size - offset) // SECTOR * SECTOR
            if inside >= stop - at:
                window.builder.data(stop, offset, self.file)
            else:
                good = inside // self.grain * self.grain
                if good:
                    window.builder.data(at + good, offset, self.file)
                problem = (
                    f"{self.where}: the grain of byte {at + good} is at {offset + good}, past "
                    f"the end of the file ({self.file_size} bytes)"
                )
                if window.bad(stop, problem):
                    return True
            at, offset = stop, offset + run.stride
        return False

    @abstractmethod
    def _directory_step(self) -> int:
        """By how much the entries of tables differ that stand one after the other."""

    @abstractmethod
    def _table_step(self) -> int:
        """By how much the entries of grains differ that stand one after the other."""

    @abstractmethod
    def _tables(self, count: int, value: int, step: int) -> Iterator[Tables]:
        """What a run of directory entries says."""

    @abstractmethod
    def _grains(self, count: int, value: int, step: int, offset: int) -> Iterator[Grains]:
        """What a run of table entries says, the first of which stands at `offset`."""

    def _past(self, what: str, value: int, offset: int) -> str:
        return (
            f"{self.where}: {what} {value:#x} says byte {offset}, past the end of the file "
            f"({self.file_size} bytes)"
        )


def _triples(table: bytes, width: int, step: int) -> Iterator[tuple[int, int, int]]:
    found = runs(table, width, False, step)
    return zip(found[0::3], found[1::3], found[2::3], strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedExtent(SparseExtent):
    """Entries of 32 bits that are sectors of the file: "KDMV", and "COWD"."""

    zero_grains: bool = False  #: GTE_ZERO is zeroes

    def _directory_step(self) -> int:
        return self.entries * self.width // SECTOR

    def _table_step(self) -> int:
        return self.grain // SECTOR

    def _tables(self, count: int, value: int, step: int) -> Iterator[Tables]:
        if value == 0:
            alike = 1 if step else count
            yield Tables(alike, 0)
            count, value = count - alike, step
        # A table that is named again is read again.
        each, times = (count, min(count, 1)) if step else (1, count)
        for _ in range(times):
            offset = value * SECTOR
            if offset >= self.file_size:
                yield Tables(each, 0, self._past("grain directory entry", value, offset))
            else:
                yield Tables(each, offset)

    def _grains(self, count: int, value: int, step: int, offset: int) -> Iterator[Grains]:
        if value == 0 or (value == t.GTE_ZERO and self.zero_grains):
            alike = 1 if step else count
            yield Grains(alike, Kind.ZERO if value else self.absent)
            count, value = count - alike, value + step
        if count:
            yield Grains(count, Kind.DATA, value * SECTOR, step * SECTOR)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedExtent(HostedExtent):
    """Grains that are zlib streams, mostly with a marker in front."""

    markers: bool

    @property
    def table_cost(self) -> int:
        """More, since each grain is a piece of its own."""
        return 8 * self.entries * self.width

    def _begins(self, grains: list[Grains]) -> list[int]:
        return sorted({offset for run in grains for offset in _offsets(run)})

    def _append_data(
        self, window: Window, start: int, end: int, run: Grains, begins: list[int]
    ) -> bool:
        for offset in _offsets(run):
            at = window.builder.end
            if at >= end:
                break
            stop = min(end, at + self.grain)
            if offset < self.file_size:
                coded = self._coded(offset, begins, stop - at, at - start)
                window.builder.coded(stop, offset, coded, self.file)
            elif window.bad(stop, self._past("grain table entry", offset // SECTOR, offset)):
                return True
        return False

    def _coded(self, offset: int, begins: list[int], unit: int, at: int) -> Coded:
        # Only the marker says how long it is; it is over where the next one begins, and no
        # compressor makes two grains of one.
        following = bisect_right(begins, offset)
        ends = [self.file_size, offset + 2 * self.grain, *begins[following : following + 1]]
        length = min(ends) - offset
        if self.markers:
            return Coded(Codec.GRAIN, length, unit, sector=at // SECTOR)
        return Coded(Codec.ZLIB, length, unit)


def _offsets(run: Grains) -> list[int]:
    if run.kind != Kind.DATA:
        return []
    return [run.offset + index * run.stride for index in range(run.grains)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeSparseExtent(SparseExtent):
    """Entries of 64 bits that are numbers in areas of tables and of grains."""

    tables_offset: int  #: bytes
    grains_offset: int  #: bytes

    def _directory_step(self) -> int:
        return 1

    def _table_step(self) -> int:
        return 1 << t.SESPARSE_LOW_SHIFT

    def _tables(self, count: int, value: int, step: int) -> Iterator[Tables]:
        if value == 0 and not step:
            yield Tables(count, 0)
            return
        each, times = (count, 1) if step else (1, count)
        offset = self.tables_offset + (value & 0xFFFFFFFF) * self.entries * self.width
        for _ in range(times):
            if (value + (each - 1) * step) >> 32 != t.SESPARSE_GDE_HIGH or (
                value >> 32 != t.SESPARSE_GDE_HIGH
            ):
                yield Tables(
                    each, 0, f"{self.where}: grain directory entry {value:#x} is of no known kind"
                )
            elif offset >= self.file_size:
                yield Tables(each, 0, self._past("grain directory entry", value, offset))
            else:
                yield Tables(each, offset)

    def _grains(self, count: int, value: int, step: int, offset: int) -> Iterator[Grains]:
        kind = value >> t.SESPARSE_KIND_SHIFT
        if kind != (value + (count - 1) * step) >> t.SESPARSE_KIND_SHIFT:
            for index in range(count):
                yield from self._grains(1, value + index * step, 0, offset + index * self.width)
        elif kind == t.SESPARSE_GTE_NONE and not value and not step:
            yield Grains(count, self.absent)
        elif kind in (t.SESPARSE_GTE_UNMAPPED, t.SESPARSE_GTE_ZERO):
            yield Grains(count, Kind.ZERO)
        elif kind == t.SESPARSE_GTE_DATA:
            low = value >> t.SESPARSE_LOW_SHIFT & ((1 << t.SESPARSE_LOW_BITS) - 1)
            number = (value & t.SESPARSE_HIGH_MASK) << t.SESPARSE_LOW_BITS | low
            stride = self.grain if step else 0
            yield Grains(count, Kind.DATA, self.grains_offset + number * self.grain, stride)
        else:
            problem = (
                f"{self.where}: the grain table entry {value:#x} at {offset} is of no known kind"
            )
            yield Grains(count, self.absent, problem=problem)
