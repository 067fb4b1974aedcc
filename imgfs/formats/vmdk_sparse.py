"""Sparse extents of VMDK: a directory of tables of grains.

A table is wrong where it says what is not in the file; then the redundant directory's is asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

from imgfs._native._tables import runs
from imgfs.formats import vmdk_tables as t
from imgfs.formats.claims import WHOLE, Taken, check_entries, sorted_apart
from imgfs.formats.entries import Entries
from imgfs.formats.window import Window
from imgfs.pieces import Codec, Coded, Kind
from imgfs.steps import Read, Steps, read_all

SECTOR = t.SECTOR
_ALL_BITS = 0xFFFFFFFF


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
    taken: tuple[
        Taken, ...
    ] = ()  #: the places of structures, which tables and grains must not have
    is_checked: bool = False  #: no two tables or grains have the same place, in all of it

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

    def checked(self) -> Steps[SparseExtent]:
        """This, with what is in its directory looked at as a whole, and in its tables if these are
        small; of others each part is when it is read.  Raises CorruptImage."""
        if self.directory is None:
            return self
        self._check_directory(self.directory, 0)
        if self.tables * self.entries * self.width > WHOLE:
            return self
        located = list(self._locate(self.directory, self.tables))
        self._check_tables(located, (yield from self._read_tables(located)), 0)
        return replace(self, is_checked=True)

    def _check_directory(self, directory: bytes, first: int) -> None:
        """Of its entries from `first` on."""

        def of(index: int) -> str:
            at = self.directories[0] + (first + index) * self.width
            return f"the table of grain directory entry {first + index} (offset {at})"

        whole = directory[: len(directory) // self.width * self.width]
        size = self.entries * self.width
        apart = sorted_apart(self.where, self.taken)
        check_entries(self._directory_entries(), whole, size, apart, self.where, of)

    def _check_tables(self, located: list[Tables], tables: list[bytes], first: int) -> None:
        """Of the tables from `first` on, which are at the places that `located` says."""
        size = self.entries * self.width
        numbers, at = [], first  # of the first table of each that is there
        taken = list(self.taken)
        for each in located:
            if each.offset:
                numbers.append(at)
                end = min(each.offset + each.tables * size, self.file_size)
                taken.append((each.offset, end, "a grain table"))
            at += each.tables
        whole = [self._numbers(data[: len(data) // self.width * self.width]) for data in tables]
        counts = list(accumulate((len(data) // self.width for data in whole), initial=0))

        def of(index: int) -> str:
            number = bisect_right(counts, index) - 1
            grain = numbers[number] * self.entries + index - counts[number]
            return f"the grain of byte {grain * self.grain}"

        apart = sorted_apart(self.where, taken)
        check_entries(self._grain_entries(), b"".join(whole), self._unit, apart, self.where, of)

    @property
    def _unit(self) -> int:
        """Bytes that a grain has in the file, at least."""
        return self.grain

    def _numbers(self, table: bytes) -> bytes:
        """The table as `_grain_entries` has it."""
        return table

    def read_grains(self, first: int, end: int) -> Steps[list[Grains]]:
        """Of the tables `[first, end)`, in order."""
        if self.directory is None:
            found = yield from self._read_entries(self.directories[0], first, end)
            self._check_directory(found, first)
        else:
            found = self.directory[first * self.width : end * self.width]
        located = list(self._locate(found, end - first))
        tables = yield from self._read_tables(located)
        if not self.is_checked:
            self._check_tables(located, tables, first)
        grains = self._parse_all(located, tables)
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

    def _read_tables(self, located: list[Tables]) -> Steps[list[bytes]]:
        """Of those that there are."""
        size = self.entries * self.width
        reads = [Read(x.offset, x.tables * size, self.file) for x in located if x.offset]
        return (yield from read_all(reads))

    def _parse_all(self, located: list[Tables], contents: list[bytes]) -> list[list[Grains]]:
        """One list for each entry of `located`."""
        found = iter(contents)
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
        all_of_them = [x for group in located for x in group]
        flat = self._parse_all(all_of_them, (yield from self._read_tables(all_of_them)))
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
    def _directory_entries(self) -> Entries:
        """Where a directory's entries say that tables are."""

    @abstractmethod
    def _grain_entries(self) -> Entries:
        """Where a table's entries say that grains are."""

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

    def _directory_entries(self) -> Entries:
        return self._sectors([(_ALL_BITS, 0, Kind.ZERO)])

    def _grain_entries(self) -> Entries:
        rules = [(_ALL_BITS, 0, Kind.ZERO)]
        rules += [(_ALL_BITS, t.GTE_ZERO, Kind.ZERO)] if self.zero_grains else []
        return self._sectors(rules)

    def _sectors(self, rules: list[tuple[int, int, Kind]]) -> Entries:
        rules = [*rules, (0, 0, Kind.DATA)]
        return Entries(self.width, rules, mask=_ALL_BITS, scale=SECTOR, high=self.file_size)

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
    def _unit(self) -> int:
        return SECTOR  # a marker and what is compressed, up to a sector's end

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
