"""Whether the tables and the clusters of a qcow2 leave each other their places in the file.

Two entries of one L1 table never name one L2 table.  Two entries of L2 tables may name one cluster
if its refcount says so; where one has the flag COPIED it is one, and the other entry is damaged.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence

from imgfs.formats import qcow2_tables as t
from imgfs.formats.claims import Taken, check_entries, sorted_apart
from imgfs.formats.entries import Entries
from imgfs.formats.qcow2_header import Header
from imgfs.pieces import Kind

MOST_TAKEN = 4096  # L2 tables that are not being read, whose places no cluster may have


class Places:
    """Of the file of `size` bytes; `others` are L1 tables that are not the header's."""

    def __init__(self, name: str, size: int, header: Header, others: Sequence[Taken]) -> None:
        """Raises CorruptImage where two of what the header names overlap."""
        self._name = name
        self._size = size
        self._cluster = header.cluster_size
        self._extended = header.extended_l2
        self._version = header.version
        self._external = header.data_file is not None
        l1_end = header.l1_table_offset + header.l1_size * t.ENTRY.size
        refcounts_end = header.refcount_table_offset + header.refcount_table_size
        # Names and extra data make its entries longer.
        snapshots_end = header.snapshots_offset + header.nb_snapshots * t.SNAPSHOT.size
        self._fixed = sorted_apart(
            name,
            [
                (0, header.cluster_size, "the header"),
                (header.l1_table_offset, l1_end, "the L1 table"),
                (header.refcount_table_offset, refcounts_end, "the refcount table"),
                (header.snapshots_offset, snapshots_end, "the snapshot table"),
                (*header.bitmap_directory, "the directory of bitmaps"),
                *others,
            ],
        )

    def _entries(self, *more: tuple[int, int, Kind]) -> Entries:
        """Those that are not aligned are told of where they are used."""
        unaligned = t.ENTRY_OFFSET & (self._cluster - 1)
        rules = [*more, (t.ENTRY_OFFSET, 0, Kind.ZERO), (unaligned, 0, Kind.DATA)]
        size = t.ENTRY.size
        return Entries(size, rules, big_endian=True, mask=t.ENTRY_OFFSET, high=self._size)

    def check_l1(self, table: bytes, first: int) -> None:
        """Of the L1 table's entries from `first` on.  Raises CorruptImage."""

        def of(index: int) -> str:
            return f"the L2 table of L1 entry {first + index}"

        whole = table[: len(table) // t.ENTRY.size * t.ENTRY.size]
        check_entries(self._entries(), whole, self._cluster, self._fixed, self._name, of)

    def check_l2(self, tables: Sequence[tuple[int, int, bytes]], others: Sequence[int]) -> None:
        """Of tables, or parts of such: the first cluster of the disk that each is for, where it is
        in the file, its entries.  `others` are L2 tables that are elsewhere.  Raises CorruptImage.
        """
        if self._external:  # its offsets are the guest's, as is checked where they are used
            return
        step = 2 if self._extended else 1
        size = t.ENTRY.size * step
        words = [array("Q", data[: len(data) // size * size])[::step] for *_, data in tables]
        counts = [0]
        for each in words:
            counts.append(counts[-1] + len(each))

        def of(index: int) -> str:
            number = bisect_right(counts, index) - 1
            cluster = tables[number][0] + index - counts[number]
            entry = tables[number][1] + (index - counts[number]) * size
            return f"the cluster for byte {cluster * self._cluster} (L2 entry at byte {entry})"

        cluster = self._cluster
        places = {at // cluster * cluster for _, at, _ in tables} | set(others)
        taken = [(at, at + cluster, "an L2 table") for at in places if at and at % cluster == 0]
        more = [(t.ENTRY_COMPRESSED, t.ENTRY_COMPRESSED, Kind.ZERO)]
        if self._version > 2 and not self._extended:
            more.append((t.ENTRY_ZERO, t.ENTRY_ZERO, Kind.ZERO))
        check_entries(
            self._entries(*more),
            b"".join(words),
            cluster,
            sorted_apart(self._name, [*self._fixed, *taken]),
            self._name,
            of,
            t.ENTRY_COPIED,
        )
