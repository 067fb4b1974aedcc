"""Reads qcow2, versions 2 and 3, as qemu's docs/interop/qcow2.rst describes it.

L2 tables are taken as one address space: the L2 entry of guest cluster `c` is at byte
`c * entry_size` of it, and the L1 table says for each cluster of that space where it is in the
file.  A step of `map` looks at a window of the L1 table and reads at most `MOST_TABLES` of the
L2 tables that it names; tables that follow one another in the file are one read.

Refcounts are not looked at: they say nothing of what a disk holds.

qemu reads whatever is past the end of the file as zeroes.  Here that holds for the cluster that the
end falls into; one that begins there is an error, since it means that the file was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from imgfs.errors import CorruptImage, OutOfRange, SnapshotNotFound
from imgfs.formats import qcow2_tables as t
from imgfs.formats.claims import WHOLE, Taken
from imgfs.formats.disk import Disk
from imgfs.formats.entries import Entries
from imgfs.formats.qcow2_header import Header, Snapshot, parse_snapshots, read_header
from imgfs.formats.qcow2_places import MOST_TAKEN, Places
from imgfs.formats.qcow2_runs import ALIKE, extended_runs, host_runs, subcluster_runs
from imgfs.pieces import Coded, Kind, PieceList, PieceListBuilder
from imgfs.steps import Opened, Read, Steps, open_file, read, read_all
from imgfs.units import format_size

MOST_TABLES = 4 << 20  # bytes of L2 tables that one step of a map reads
SLICE = 64 << 10  # bytes of an L2 table that are read at least
EXTENDED_SLICE = 16 << 10  # of one with subclusters, which may make 32 pieces an entry
MOST_PIECES = 1 << 17  # or so, of one step past what was asked for: nobody waits longer for a map
ODD_PIECES = 8  # times as long takes one of an entry that is looked at by itself
ODD_ENTRIES = 64  # that are looked at by themselves where the first one is out of the ordinary
WINDOW = 8192  # L1 entries that one step looks at
KEPT_L1 = 1 << 20  # bytes of an L1 table that is kept; of a longer one, parts are read when needed
SNAPSHOT_GUESS = 128  # bytes of an entry of the snapshot table
SECTOR = 512


class _Part(NamedTuple):
    """A range of the address space of L2 tables."""

    start: int
    end: int
    host: int  #: where it is in the file; 0: nowhere, all of it is unallocated


@dataclass(frozen=True, slots=True)
class _L1:
    offset: int
    size: int  #: entries
    kept: bytes | None


def open_disk(name: str, size: int, snapshot: str | None = None) -> Steps[Qcow2Disk]:
    """The disk in a qcow2 file of `size` bytes, or that of its internal snapshot with this id or
    name.

    Raises CorruptImage and UnsupportedFeature with the field, SnapshotNotFound, and what opening
    an external data file raises.
    """
    header = yield from read_header(name)
    reads = []
    if header.nb_snapshots:
        guess = min(header.nb_snapshots * SNAPSHOT_GUESS, 1 << 20)
        reads.append(Read(header.snapshots_offset, guess))
    if snapshot is None and _is_kept(header.l1_size):
        reads.append(Read(header.l1_table_offset, header.l1_size * t.ENTRY.size))
    found = yield from read_all(reads)
    snapshots: tuple[Snapshot, ...] = ()
    others: list[Taken] = []
    if header.nb_snapshots:
        snapshots = yield from parse_snapshots(name, header, found.pop(0))
    if snapshot is None:
        disk_size = header.size
        l1 = _L1(header.l1_table_offset, header.l1_size, found[0] if found else None)
    else:
        chosen = _find(name, header, snapshots, snapshot)
        disk_size = chosen.size
        kept = None
        if _is_kept(chosen.l1_size):
            kept = yield from read(chosen.l1_table_offset, chosen.l1_size * t.ENTRY.size)
        l1 = _L1(chosen.l1_table_offset, chosen.l1_size, kept)
        end = chosen.l1_table_offset + chosen.l1_size * t.ENTRY.size
        others.append((chosen.l1_table_offset, end, f"the L1 table of snapshot {snapshot!r}"))
    places = Places(name, size, header, others)
    if l1.kept is not None:
        places.check_l1(l1.kept, 0)
    data = Opened(0, size)
    if header.data_file is not None:
        data = yield from open_file(header.data_file)
    return Qcow2Disk(name, size, header, snapshots, disk_size, l1, data, places)


def _is_kept(l1_size: int) -> bool:
    return 0 < l1_size * t.ENTRY.size <= KEPT_L1


def _find(name: str, header: Header, snapshots: Sequence[Snapshot], wanted: str) -> Snapshot:
    chosen = next((s for s in snapshots if s.id == wanted), None)
    chosen = chosen or next((s for s in snapshots if s.name == wanted), None)
    if chosen is None:
        there = ", ".join(repr(s.name) for s in snapshots[:20]) or "none"
        raise SnapshotNotFound(
            f"{name}: no snapshot has the id or name {wanted!r}; there are: {there}"
        )
    offset, most = chosen.l1_table_offset, t.MAX_L1_TABLE // t.ENTRY.size
    if offset % header.cluster_size or offset > t.MAX_HOST_OFFSET:
        why = f"must be a multiple of {header.cluster_size}, below 2^56"
        raise CorruptImage(f"{name}: l1_table_offset of snapshot {wanted!r} is {offset}: {why}")
    if chosen.l1_size > most:
        why = f"the most is {most}"
        raise CorruptImage(f"{name}: l1_size of snapshot {wanted!r} is {chosen.l1_size}: {why}")
    if chosen.size > most * header.l1_coverage:
        why = f"the most is {most * header.l1_coverage}"
        raise CorruptImage(f"{name}: disk size of snapshot {wanted!r} is {chosen.size}: {why}")
    return chosen


class Qcow2Disk(Disk):
    """Where there is a backing file, what it does not reach up to reads as zeroes: it may be
    shorter than this disk."""

    format = "qcow2"

    def __init__(
        self,
        name: str,
        file_size: int,
        header: Header,
        snapshots: tuple[Snapshot, ...],
        disk_size: int,
        l1: _L1,
        data: Opened,
        places: Places,
    ) -> None:
        """For `open_disk` only."""
        self.name = name
        self.header = header
        self.snapshots = snapshots
        self.size = disk_size // SECTOR * SECTOR  # qemu leaves out a part of a sector too
        self.backing = header.backing
        self._file_size = file_size
        self._l1 = l1
        self._data = data
        self._cluster = header.cluster_size
        self._entry = header.entry_size
        self._extended = header.extended_l2
        self._places = places
        kept = l1.kept or b""
        kept = kept[: min(len(kept) // t.ENTRY.size, MOST_TAKEN) * t.ENTRY.size]
        self._l2_places = [value & t.ENTRY_OFFSET for (value,) in t.ENTRY.iter_unpack(kept)]
        self._is_checked = False
        self._plain = self._plain_entries()

    def facts(self) -> list[tuple[str, str]]:
        header = self.header
        found = [
            ("version", str(header.version)),
            ("cluster size", format_size(header.cluster_size)),
            ("compression", header.codec.value),
            ("refcount bits", str(header.refcount_bits)),
        ]
        if header.extended_l2:
            found.append(("subcluster size", format_size(header.cluster_size // t.SUBCLUSTERS)))
        if header.lazy_refcounts:
            found.append(("lazy refcounts", "yes"))
        if header.incompatible & t.Incompatible.DIRTY:
            found.append(("dirty", "yes: refcounts may be wrong, which reading does not mind"))
        if header.incompatible & t.Incompatible.CORRUPT:
            found.append(("corrupt", "yes: qemu found broken tables; what it holds may be wrong"))
        if header.data_file is not None:
            raw = " (raw)" if header.raw_data_file else ""
            found.append(("data file", f"{header.data_file!r}{raw}"))
        for snapshot in self.snapshots:
            date = datetime.fromtimestamp(snapshot.date_s, UTC).isoformat()
            size = format_size(snapshot.size)
            found.append(("snapshot", f"{snapshot.id!r} {snapshot.name!r}, {date}, {size}"))
        return found

    def map(self, offset: int, length: int) -> Steps[PieceList]:
        end = min(offset + length, self.size)
        if not 0 <= offset < end:
            raise OutOfRange(f"{self.name}: [{offset}, {offset + length}) of {self.size} bytes")
        if not self._is_checked:
            yield from self._check_small()
        first, last = self._tables_for(offset, end)
        parts = yield from self._find_parts(first, last)
        reads = [Read(part.host, part.end - part.start) for part in parts if part.host]
        found = yield from read_all(reads)
        if not self._is_checked:
            self._check_places([part for part in parts if part.host], found)
        tables = iter(found)
        pieces = PieceListBuilder(self._guest(first))
        room = MOST_PIECES
        for part in parts:
            table = self._whole_entries(part, next(tables)) if part.host else b""
            at = part.start
            while at < part.end:
                if self._plain is not None and part.host:
                    before = len(pieces)
                    rest = memoryview(table)[at - part.start :]
                    count = self._plain.append(pieces, rest, self._cluster, self.size, room)
                    at += count * self._entry
                    room -= len(pieces) - before
                for upto, value, bitmap in self._runs(part, table, at):
                    at = upto
                    if pieces.end > offset:
                        alike = bitmap in ALIKE
                        room -= ODD_PIECES * (1 if alike else len(subcluster_runs(bitmap)))
                    if room <= 0:
                        return pieces.finish(pieces.end)
                    to = self._guest(at)
                    try:
                        self._append(pieces, to, value, bitmap, part)
                    except CorruptImage:
                        # It is this range's alone: what was asked for may be before or behind it.
                        if to <= offset:
                            pieces = PieceListBuilder(to)
                        elif pieces.end > offset:
                            return pieces.finish(pieces.end)
                        else:
                            raise
        return pieces.finish(pieces.end)

    def _check_small(self) -> Steps[None]:
        """Look at all L2 tables, if these are few; else at each part that is read."""
        if self._l1.kept is None:
            return
        clusters = -(-self.size // self._cluster) * self._entry
        count = min(-(-clusters // self._cluster), len(self._l1.kept) // t.ENTRY.size)
        table = self._l1.kept[: count * t.ENTRY.size]
        parts = self._parts(table, 0, 0, min(clusters, count * self._cluster), WHOLE + 1)
        there = [part for part in parts if part.host]
        if sum(part.end - part.start for part in there) > WHOLE:
            return
        found = yield from read_all([Read(part.host, part.end - part.start) for part in there])
        self._check_places(there, found)
        self._is_checked = True

    def _check_places(self, parts: Sequence[_Part], tables: Sequence[bytes]) -> None:
        found = []
        for part, data in zip(parts, tables, strict=True):
            for at in range(0, part.end - part.start, self._cluster):
                start, host = part.start + at, part.host + at
                if host % self._cluster == start % self._cluster:  # else it is told of elsewhere
                    table = data[at : at + self._cluster]
                    found.append((start // self._entry, host, table))
        self._places.check_l2(found, self._l2_places)

    def _plain_entries(self) -> Entries | None:
        """What all entries mean but those with subclusters, compressed ones, and wrong ones."""
        if self._extended:
            return None
        flags = t.ENTRY_COMPRESSED | t.ENTRY_ZERO
        unaligned = t.ENTRY_OFFSET & (self._cluster - 1)
        absent = Kind.ZERO if self.backing is None else Kind.BELOW
        rules = [(flags | t.ENTRY_OFFSET, 0, absent)]
        if self._data.file:
            # Its offsets are the guest's, so that runs of them are long, and 0 is one.
            rules = [(flags | t.ENTRY_OFFSET | t.ENTRY_COPIED, 0, absent)]
        else:
            rules.append((flags | unaligned, 0, Kind.DATA))
        if self.header.version > 2:
            rules.append((flags | unaligned, t.ENTRY_ZERO, Kind.ZERO))
        return Entries(
            t.ENTRY.size, rules, big_endian=True, mask=t.ENTRY_OFFSET, high=self._file_size
        )

    def _guest(self, at: int) -> int:
        """The disk's byte that the entry at `at` in the address space of L2 tables is for."""
        return min(at // self._entry * self._cluster, self.size)

    def _tables_for(self, offset: int, end: int) -> tuple[int, int]:
        """The range of the address space of L2 tables, in the units in which they are read."""
        clusters = -(-self.size // self._cluster)
        unit = min(self._cluster, EXTENDED_SLICE if self._extended else SLICE)
        first = offset // self._cluster * self._entry // unit * unit
        last = -(-end // self._cluster) * self._entry
        return first, min(-(-last // unit) * unit, clusters * self._entry)

    def tables(self, offset: int, length: int, most: int) -> tuple[list[Read], int]:
        end = min(offset + length, self.size)
        if self._l1.kept is None or offset >= end:
            return [], end
        first, last = self._tables_for(offset, end)
        index, last_index = first // self._cluster, -(-last // self._cluster)
        table = self._l1.kept[index * t.ENTRY.size : last_index * t.ENTRY.size]
        parts = self._parts(table, index, first, last, most)
        reads = [Read(part.host, part.end - part.start) for part in parts if part.host]
        if sum(read.length for read in reads) <= MOST_TABLES:
            return [], end
        return reads, self._guest(parts[-1].end)

    def _find_parts(self, first: int, last: int) -> Steps[list[_Part]]:
        """Where `[first, last)` of the L2 tables is; the beginning of that when it is too much."""
        index = first // self._cluster
        last = min(last, (index + WINDOW) * self._cluster)
        end = min(-(-last // self._cluster), self._l1.size)
        table = yield from self._read_l1(index, end)
        return self._parts(table, index, first, last, MOST_TABLES)

    def _parts(self, table: bytes, index: int, first: int, last: int, room: int) -> list[_Part]:
        """As `_find_parts`, of L1 entries from `index` on and at most `room` bytes of L2 tables."""
        cluster = self._cluster
        parts: list[_Part] = []
        at = first
        for count, value in host_runs(table, cluster):
            start, index = index * cluster, index + count
            end = min(index * cluster, last)
            host = value & t.ENTRY_OFFSET
            if host:
                end = min(end, at + room)
                room -= end - at
            parts.append(_Part(at, end, host and host + at - start))
            at = end
            if not room:
                return parts
        if self._l1.size * cluster <= at < last:  # a snapshot's may be shorter than its disk
            parts.append(_Part(at, last, 0))
        return parts

    def _read_l1(self, first: int, end: int) -> Steps[bytes]:
        if first >= end:
            return b""
        a, b = first * t.ENTRY.size, end * t.ENTRY.size
        if self._l1.kept is not None:
            table = self._l1.kept[a:b]
        else:
            table = yield from read(self._l1.offset + a, b - a)
        whole = len(table) // t.ENTRY.size
        if not whole:
            raise CorruptImage(
                f"{self.name}: L1 entry {first} at byte {self._l1.offset + a} is past the end of"
                " the file; is it cut?"
            )
        # The map ends where the table does; what lies beyond is asked for by itself.
        return table[: whole * t.ENTRY.size]

    def _whole_entries(self, part: _Part, table: bytes) -> bytes:
        """Of a part's bytes what can be used."""
        if part.host % self._cluster != part.start % self._cluster:
            return b""
        return table[: len(table) // self._entry * self._entry]

    def _runs(self, part: _Part, table: bytes, at: int) -> Iterator[tuple[int, int | None, int]]:
        """(end in the address space, first entry, bitmap) of runs of a part's entries, from the one
        at `at` on; of the first ones only, where there may be plain ones behind them.

        An entry of None: the table is not there.
        """
        if not part.host:
            yield part.end, 0, 0
            return
        rest = table[at - part.start :]
        if self._extended:
            for count, value, bitmap in extended_runs(rest, self._cluster):
                at += count * self._entry
                yield at, value, bitmap
        else:
            for count, value in host_runs(rest[: ODD_ENTRIES * self._entry], self._cluster):
                at += count * self._entry
                yield at, value, 0
        if part.start + len(table) <= at < part.end:
            yield part.end, None, 0

    def _append(
        self, pieces: PieceListBuilder, end: int, value: int | None, bitmap: int, part: _Part
    ) -> None:
        """Raises CorruptImage; then what is wrong begins at the pieces' end."""
        if value is None:
            raise self._wrong(
                pieces, part, "is in a table that is not aligned or past the file's end"
            )
        if value & t.ENTRY_COMPRESSED:
            self._append_compressed(pieces, end, value, part)
            return
        host = value & t.ENTRY_OFFSET
        if host % self._cluster:
            raise self._wrong(pieces, part, f"has the offset {host}, which is not aligned")
        # Offset 0 of an external data file is as good as any.
        stored = bool(host) or (self.header.data_file is not None and bool(value & t.ENTRY_COPIED))
        if self._extended:
            self._append_subclusters(pieces, end, host, stored, bitmap, part)
        elif value & t.ENTRY_ZERO:
            if self.header.version == 2:
                raise self._wrong(pieces, part, "has the zero flag, which version 2 has not")
            pieces.zero(end)
        elif stored:
            self._append_data(pieces, end, host, part)
        else:
            self._append_nothing(pieces, end)

    def _append_nothing(self, pieces: PieceListBuilder, end: int) -> None:
        if self.backing is None:
            pieces.zero(end)
        else:
            pieces.below(end)

    def _append_data(self, pieces: PieceListBuilder, end: int, host: int, part: _Part) -> None:
        if self._data.file and host != pieces.end:
            why = f"has the offset {host}: with an external data file it must be the guest's"
            raise self._wrong(pieces, part, why)
        start = pieces.end
        stop = start + self._data.size - host  # where the file ends
        if start < stop:
            pieces.data(min(stop, end), host, self._data.file)
            if stop < end and stop % self._cluster:
                pieces.zero(min(-(-stop // self._cluster) * self._cluster, end))
        if pieces.end < end:
            lost = host + pieces.end - start
            why = f"has data at {lost}, past the end of the file at {self._data.size}; is it cut?"
            raise self._wrong(pieces, part, why)

    def _append_compressed(
        self, pieces: PieceListBuilder, end: int, value: int, part: _Part
    ) -> None:
        if self.header.data_file is not None:
            raise self._wrong(
                pieces, part, "is compressed, which an external data file cannot have"
            )
        bits = self.header.cluster_bits - 8
        shift = 62 - bits
        host = value & ((1 << shift) - 1)
        sectors = 1 + (value >> shift & ((1 << bits) - 1))
        length = sectors * t.COMPRESSED_SECTOR - host % t.COMPRESSED_SECTOR
        length = min(length, self._file_size - host)
        if length <= 0:
            why = f"has the compressed offset {host}, past the end of the file; is it cut?"
            raise self._wrong(pieces, part, why)
        pieces.coded(end, host, Coded(self.header.codec, length, self._cluster))

    def _append_subclusters(
        self,
        pieces: PieceListBuilder,
        end: int,
        host: int,
        stored: bool,
        bitmap: int,
        part: _Part,
    ) -> None:
        allocated, zero = bitmap & t.SUBCLUSTERS_ALL, bitmap >> t.SUBCLUSTERS
        if allocated & zero or (allocated and not stored):
            raise self._wrong(pieces, part, f"has the impossible subcluster bitmap {bitmap:#x}")
        if allocated == t.SUBCLUSTERS_ALL:
            self._append_data(pieces, end, host, part)
        elif zero == t.SUBCLUSTERS_ALL:
            pieces.zero(end)
        elif not bitmap:
            self._append_nothing(pieces, end)
        else:
            step = self._cluster // t.SUBCLUSTERS
            start, done = pieces.end, 0
            for upto, bits in subcluster_runs(bitmap):
                to = min(start + upto * step, end)
                if bits & t.SUBCLUSTERS_ALL:
                    self._append_data(pieces, to, host + done * step, part)
                elif bits:
                    pieces.zero(to)
                else:
                    self._append_nothing(pieces, to)
                if to == end:
                    break
                done = upto

    def _wrong(self, pieces: PieceListBuilder, part: _Part, what: str) -> CorruptImage:
        entry = pieces.end // self._cluster * self._entry
        return CorruptImage(
            f"{self.name}: L2 entry at byte {part.host + entry - part.start},"
            f" for byte {pieces.end} of the disk, {what}"
        )
