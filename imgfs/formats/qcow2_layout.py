"""Shows a disk as qcow2, version 3: whole, or as what changed over a backing file.

The file is, in clusters: the header; the refcount table; the refcount blocks; the L1 table; the
L2 tables that are needed; the clusters that hold data, in the disk's order.  Every cluster is
used once, so that all of it follows from counts: where a table or a cluster is, is its rank.

The specification is qemu's docs/interop/qcow2.rst.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from imgfs.errors import UnsupportedFeature
from imgfs.extents import ExtentList, ExtentListBuilder, Flags
from imgfs.formats import qcow2_tables as t
from imgfs.formats.layout import About, Clusters, Layout
from imgfs.pieces import Kind, PieceList, PieceListBuilder
from imgfs.units import format_size

SMALLEST_CLUSTER_BITS = 16
HEADER_LENGTH = 112
REFCOUNT_ONE = b"\0\1"
LITERAL = 1 << 20  # bytes of one literal at most
BLOCK = 4096  # bytes of a table that are a hole when no entry in them is set
SECTOR = 512


def layout(extents: ExtentList, about: About) -> Layout:
    """A qcow2 without a backing file; holes are not allocated.

    Raises UnsupportedFeature for disks that qcow2 cannot hold: of more than 2 EiB, or with nearly
    64 PiB of data.
    """
    for bits in range(SMALLEST_CLUSTER_BITS, t.MAX_CLUSTER_BITS + 1):
        data = Clusters(extents, 1 << bits)
        tables = Clusters(extents, _l1_coverage(bits))
        allocated = _Allocated(extents, data, None, tables)
        if (plan := _Plan.of(bits, allocated)) is not None:
            made = _Qcow2Layout(plan, allocated, _header(plan, extents.end, None))
            made.own_bytes = _own_bytes(plan, extents, bits)
            return made
    raise _too_large(about, extents.end)


def _own_bytes(plan: _Plan, extents: ExtentList, bits: int) -> int:
    """Of the header and of the tables, without what of them is a hole."""
    entries = BLOCK // t.ENTRY.size
    refcount_table = -(-(plan.l1_table - plan.refcount_blocks) // entries) * BLOCK
    l1_table = Clusters(extents, _l1_coverage(bits) * entries).count * BLOCK
    l2_tables = Clusters(extents, (1 << bits) * entries).count * BLOCK
    header = HEADER_LENGTH + t.EXTENSION.size
    return header + refcount_table + plan.end * len(REFCOUNT_ONE) + l1_table + l2_tables


def delta_layout(
    changes: PieceList, size: int, about: About, backing_name: str, backing_format: str
) -> Layout:
    """A qcow2 that holds what differs from a backing file.

    `changes` are those of the whole disk of `size` bytes: BELOW is the backing file's, ZERO zeroes,
    and anything else is data, whichever file it is in: file 0 of the layout's pieces is the
    disk as it is with its changes.  A cluster of which only a part is changed is stored whole.
    What is BELOW and past the end of a shorter backing file reads as zeroes.

    `backing_name` is as qemu takes it: a path, a URL, or `json:{...}`.  Raises UnsupportedFeature
    when that does not fit into a header, or the disk into qcow2.
    """
    if (changes.start, changes.end) != (0, size):
        raise ValueError(f"changes are of [{changes.start}, {changes.end}), not of {size} bytes")
    backing = _Backing.of(backing_name, backing_format, about)
    for bits in range(SMALLEST_CLUSTER_BITS, t.MAX_CLUSTER_BITS + 1):
        allocated = _changed(changes, bits)
        if (plan := _Plan.of(bits, allocated)) is not None:
            return _Qcow2Layout(plan, allocated, _header(plan, size, backing))
    raise _too_large(about, size)


def _too_large(about: About, size: int) -> UnsupportedFeature:
    return UnsupportedFeature(f"{about.name}: qcow2 cannot hold a disk of {format_size(size)}")


def _l1_coverage(cluster_bits: int) -> int:
    """Bytes of the disk that one L1 entry is for."""
    return 1 << cluster_bits + cluster_bits - 3


@dataclass(frozen=True, slots=True)
class _Backing:
    name: bytes
    format: bytes

    @classmethod
    def of(cls, name: str, kind: str, about: About) -> _Backing:
        told = cls(*(text.encode("utf-8", "surrogateescape") for text in (name, kind)))
        for what, data, most in (
            ("name of the base", told.name, t.MAX_BACKING_NAME),
            ("format of the base", told.format, t.MAX_BACKING_FORMAT),
        ):
            if not 0 < len(data) <= most or b"\0" in data:
                raise UnsupportedFeature(
                    f"{about.name}: the {what} has {len(data)} bytes; a qcow2 header has room for"
                    f" 1 to {most}, none of them 0"
                )
        return told


@dataclass(frozen=True, slots=True)
class _Allocated:
    """What of a disk has L2 entries."""

    content: ExtentList  #: of the disk: what of the data clusters is known to be zeroes
    data: Clusters
    zeroes: Clusters | None  #: clusters that say that they are zeroes; none of them has data
    tables: Clusters  #: of the size that one L1 entry is for: those that need an L2 table


def _changed(changes: PieceList, cluster_bits: int) -> _Allocated:
    content, data, zeroes, used = (ExtentListBuilder() for _ in range(4))
    for piece in changes:
        content.append(piece.end, Flags.ZERO if piece.kind == Kind.ZERO else Flags.DATA)
    for end, kind in _cluster_kinds(changes, 1 << cluster_bits):
        data.append(end, Flags.DATA if kind == Kind.DATA else Flags.ZERO)
        zeroes.append(end, Flags.DATA if kind == Kind.ZERO else Flags.ZERO)
        used.append(end, Flags.ZERO if kind == Kind.BELOW else Flags.DATA)
    size = changes.end
    return _Allocated(
        content.finish(size),
        Clusters(data.finish(size), 1 << cluster_bits),
        Clusters(zeroes.finish(size), 1 << cluster_bits),
        Clusters(used.finish(size), _l1_coverage(cluster_bits)),
    )


def _cluster_kinds(changes: PieceList, cluster: int) -> Iterator[tuple[int, Kind]]:
    """(end, kind) of runs of clusters: those that are wholly the base's, or zeroes, are that, and
    all others are data."""
    size, at = changes.end, 0
    for piece in changes:
        if piece.kind not in (Kind.BELOW, Kind.ZERO):
            continue
        start = -(-piece.start // cluster) * cluster
        end = piece.end // cluster * cluster
        # The disk may end in a sector: what the base has in the rest of it must not be seen.
        if piece.end == size and (piece.kind == Kind.ZERO or size % SECTOR == 0):
            end = size
        if start < end:
            if at < start:
                yield start, Kind.DATA
            yield end, piece.kind
            at = end
    if at < size:
        yield size, Kind.DATA


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where everything is, in clusters of the file."""

    cluster_bits: int
    refcount_table: int
    refcount_blocks: int
    l1_table: int
    l2_tables: int
    data: int
    end: int
    l1_size: int  #: entries

    @classmethod
    def of(cls, cluster_bits: int, allocated: _Allocated) -> _Plan | None:
        """None when tables would be larger than qemu takes them, or offsets than entries hold."""
        cluster = 1 << cluster_bits
        l1_size = allocated.tables.total
        l1_clusters = -(-l1_size * t.ENTRY.size // cluster)
        rest = 1 + l1_clusters + allocated.tables.count + allocated.data.count
        blocks = tables = 0
        while True:  # both grow until they count themselves
            all_of_it = rest + blocks + tables
            needed = -(-all_of_it * len(REFCOUNT_ONE) // cluster)
            needed_tables = -(-needed * t.ENTRY.size // cluster)
            if (needed, needed_tables) == (blocks, tables):
                break
            blocks, tables = needed, needed_tables
        if l1_size * t.ENTRY.size > t.MAX_L1_TABLE or tables * cluster > t.MAX_REFCOUNT_TABLE:
            return None
        if all_of_it * cluster > t.MAX_HOST_OFFSET:
            return None
        l1_table = 1 + tables + blocks
        l2_tables = l1_table + l1_clusters
        data = l2_tables + allocated.tables.count
        return cls(cluster_bits, 1, 1 + tables, l1_table, l2_tables, data, all_of_it, l1_size)


def _header(plan: _Plan, size: int, backing: _Backing | None) -> bytes:
    extensions = b""
    if backing is not None:
        extensions = t.EXTENSION.pack(t.EXTENSION_BACKING_FORMAT, len(backing.format))
        extensions += backing.format + bytes(-len(backing.format) % 8)
    extensions += t.EXTENSION.pack(t.EXTENSION_END, 0)
    name = b"" if backing is None else backing.name
    cluster = 1 << plan.cluster_bits
    fixed = t.HeaderV2(
        magic=t.MAGIC,
        version=3,
        backing_file_offset=HEADER_LENGTH + len(extensions) if name else 0,
        backing_file_size=len(name),
        cluster_bits=plan.cluster_bits,
        size=-(-size // SECTOR) * SECTOR,
        crypt_method=0,
        l1_size=plan.l1_size,
        l1_table_offset=plan.l1_table * cluster,
        refcount_table_offset=plan.refcount_table * cluster,
        refcount_table_clusters=plan.refcount_blocks - plan.refcount_table,
        nb_snapshots=0,
        snapshots_offset=0,
    )
    more = t.HeaderV3(header_length=HEADER_LENGTH)
    head = t.HEADER_V2.pack(*fixed) + t.HEADER_V3.pack(*more)
    return head.ljust(HEADER_LENGTH, b"\0") + extensions + name


class _Qcow2Layout(Layout):
    def __init__(self, plan: _Plan, allocated: _Allocated, header: bytes) -> None:
        self._plan = plan
        self._allocated = allocated
        self._header = header
        self._cluster = 1 << plan.cluster_bits
        self.size = plan.end * self._cluster

    def map(self, offset: int, length: int) -> PieceList:
        plan, end = self._plan, offset + length
        if not 0 <= offset <= end <= self.size:
            raise ValueError(f"[{offset}, {end}) is not inside of {self.size} bytes")
        pieces = PieceListBuilder(offset)
        sections = (
            (plan.refcount_table, self._map_header),
            (plan.refcount_blocks, self._map_refcount_table),
            (plan.l1_table, self._map_refcount_blocks),
            (plan.l2_tables, self._map_l1),
            (plan.data, self._map_l2),
            (plan.end, self._map_data),
        )
        for section_end, append in sections:
            upto = min(end, section_end * self._cluster)
            if pieces.end < upto:
                append(pieces, upto)
        return pieces.finish(end)

    def _map_header(self, pieces: PieceListBuilder, end: int) -> None:
        if part := self._header[pieces.end : end]:
            pieces.literal(part)
        if pieces.end < end:
            pieces.zero(end)

    def _map_refcount_table(self, pieces: PieceListBuilder, end: int) -> None:
        count = self._plan.l1_table - self._plan.refcount_blocks
        first = self._plan.refcount_blocks * self._cluster

        def entries(a: int, b: int) -> Iterator[_Entries]:
            if a < min(b, count):
                yield _Entries(a, min(b, count), first + a * self._cluster, self._cluster)

        _append_table(pieces, self._plan.refcount_table * self._cluster, end, entries)

    def _map_refcount_blocks(self, pieces: PieceListBuilder, end: int) -> None:
        start = self._plan.refcount_blocks * self._cluster
        used = start + self._plan.end * len(REFCOUNT_ONE)
        whole = REFCOUNT_ONE * (min(LITERAL, used - start) // 2 + 1)
        while pieces.end < min(end, used):
            skip = (pieces.end - start) % 2
            upto = min(end, used, pieces.end + LITERAL)
            pieces.literal(whole[skip : skip + upto - pieces.end])
        if pieces.end < end:
            pieces.zero(end)

    def _map_l1(self, pieces: PieceListBuilder, end: int) -> None:
        first = self._plan.l2_tables * self._cluster | t.ENTRY_COPIED

        def entries(a: int, b: int) -> Iterator[_Entries]:
            for i, j, rank in self._allocated.tables.runs(a, b):
                yield _Entries(i, j, first + rank * self._cluster, self._cluster)

        _append_table(pieces, self._plan.l1_table * self._cluster, end, entries)

    def _map_l2(self, pieces: PieceListBuilder, end: int) -> None:
        """Each table by itself: which of the disk's clusters it is for depends on its rank."""
        start = self._plan.l2_tables * self._cluster
        first, last = (pieces.end - start) // self._cluster, -(-(end - start) // self._cluster)
        for i, j, rank in self._allocated.tables.runs_by_rank(first, last):
            for index in range(i, j):
                table = start + (rank + index - i) * self._cluster
                self._map_l2_table(pieces, index, table, min(end, table + self._cluster))

    def _map_l2_table(self, pieces: PieceListBuilder, index: int, table: int, end: int) -> None:
        before = index * (self._cluster // t.ENTRY.size)
        first = self._plan.data * self._cluster | t.ENTRY_COPIED
        data, zeroes = self._allocated.data, self._allocated.zeroes

        def entries(a: int, b: int) -> Iterator[_Entries]:
            for i, j, rank in data.runs(a + before, b + before):
                value = first + rank * self._cluster
                yield _Entries(i - before, j - before, value, self._cluster)
            if zeroes is not None:
                for i, j, _ in zeroes.runs(a + before, b + before):
                    yield _Entries(i - before, j - before, t.ENTRY_ZERO, 0)

        _append_table(pieces, table, end, entries)

    def _map_data(self, pieces: PieceListBuilder, end: int) -> None:
        start = self._plan.data * self._cluster
        first, last = (pieces.end - start) // self._cluster, -(-(end - start) // self._cluster)
        for i, j, rank in self._allocated.data.runs_by_rank(first, last):
            shift = start + rank * self._cluster - i * self._cluster  # the file's over the disk's
            self._map_disk(pieces, shift, min(end, j * self._cluster + shift))

    def _map_disk(self, pieces: PieceListBuilder, shift: int, end: int) -> None:
        """Up to `end` of the file, where the disk is shifted by so much."""
        content = self._allocated.content
        index = bisect_right(content.ends, pieces.end - shift)
        zero = int(Flags.ZERO)
        while pieces.end < end and index < len(content.ends):
            upto = min(end, content.ends[index] + shift)
            if content.flags[index] & zero:
                pieces.zero(upto)
            else:
                pieces.data(upto, pieces.end - shift)
            index += 1
        if pieces.end < end:  # the last cluster goes on where the disk has ended
            pieces.zero(end)


class _Entries(NamedTuple):
    """A run of a table's entries, `[first, end)`."""

    first: int
    end: int
    value: int  #: the first one's
    step: int  #: by how much each next one is larger

    def packed(self) -> bytes:
        count = self.end - self.first
        if self.step:
            values = array("Q", range(self.value, self.value + count * self.step, self.step))
        else:
            values = array("Q", [self.value]) * count
        if sys.byteorder == "little":
            values.byteswap()
        return values.tobytes()


def _append_table(
    pieces: PieceListBuilder,
    start: int,
    end: int,
    entries: Callable[[int, int], Iterator[_Entries]],
) -> None:
    """The bytes up to `end` of the table that begins at `start`.

    `entries(a, b)` are those among the entries `[a, b)` that are not 0.  Blocks in which there are
    none are holes.
    """
    size = t.ENTRY.size
    while pieces.end < end:
        upto = min(end, pieces.end + LITERAL)
        a, b = (pieces.end - start) // size, -(-(upto - start) // size)
        base = start + a * size
        content = bytearray((b - a) * size)
        first = pieces.end // BLOCK
        held = bytearray(-(-upto // BLOCK) - first)
        for run in entries(a, b):
            x, y = (run.first - a) * size, (run.end - a) * size
            content[x:y] = run.packed()
            block = max(base + x, pieces.end) // BLOCK - first
            block_end = -(-min(base + y, upto) // BLOCK) - first
            held[block:block_end] = b"\1" * (block_end - block)
        for is_held, blocks in groupby(range(len(held)), held.__getitem__):
            stop = min(upto, (first + max(blocks) + 1) * BLOCK)
            if is_held:
                pieces.literal(bytes(content[pieces.end - base : stop - base]))
            else:
                pieces.zero(stop)
