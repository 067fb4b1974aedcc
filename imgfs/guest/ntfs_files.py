"""Records of the MFT of an NTFS, and the streams of its files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import takewhile

from imgfs.guest import ntfs_tables as tables
from imgfs.guest.doubt import Doubt, read_whole
from imgfs.guest.ntfs_tables import Attribute, Boot, ListEntry, Record, Run
from imgfs.steps import Read, Steps

_MOST_RUNS = 1 << 18  # of one stream
_MOST_LIST = 256 << 10  # bytes of an attribute list, as in Windows


class Stream:
    """What an attribute holds, as it becomes known extent by extent.  Sizes are bytes."""

    def __init__(self, first: Attribute, what: str) -> None:
        if first.vcn:
            raise Doubt(f"{what} begins with its cluster {first.vcn}")
        if first.flags & (tables.COMPRESSED | tables.ENCRYPTED):
            raise Doubt(f"{what} is compressed or encrypted: flags {first.flags:#x}")
        self.what = what
        self.size = first.size
        self.initialized = first.initialized  #: what comes after it reads as zeroes
        self.value = first.value
        self.runs: list[Run] = []
        self._starts: list[int] = []
        self.clusters = 0  #: of which is known where they are
        self._add(first.runs)

    def extend(self, extent: Attribute) -> None:
        if extent.value is not None or extent.vcn != self.clusters:
            raise Doubt(f"{self.what} goes on at cluster {extent.vcn}, not {self.clusters}")
        self._add(extent.runs)

    def _add(self, runs: Sequence[Run]) -> None:
        self.runs += runs
        self._starts += [run.vcn for run in runs]
        if len(self.runs) > _MOST_RUNS:
            raise Doubt(f"{self.what} is in more than {_MOST_RUNS} runs")
        if runs:
            self.clusters = runs[-1].vcn + runs[-1].clusters

    def pieces(self, offset: int, length: int, cluster: int) -> list[tuple[int | None, int]]:
        """Where each part of the range is in the filesystem (None: a hole), and its length."""
        found: list[tuple[int | None, int]] = []
        end = offset + length
        if end > self.clusters * cluster:
            raise Doubt(f"{self.what} ends before its byte {end}")
        index = bisect_right(self._starts, offset // cluster) - 1
        while offset < end:
            vcn, count, lcn = self.runs[index]
            size = min(end, (vcn + count) * cluster) - offset
            found.append((None if lcn is None else (lcn - vcn) * cluster + offset, size))
            offset += size
            index += 1
        return found


class Files:
    """The files of the filesystem at byte `start` of file 0."""

    def __init__(self, start: int, boot: Boot, mft: Stream) -> None:
        self.start = start
        self.boot = boot
        self.mft = mft

    def read(self, stream: Stream, ranges: Sequence[tuple[int, int]]) -> Steps[list[bytes]]:
        """Several ranges, each an offset and a length, of a stream; at most BATCH bytes."""
        if stream.value is not None:
            if any(offset + length > stream.size for offset, length in ranges):
                raise Doubt(f"{stream.what} has {stream.size} bytes")
            return [stream.value[offset : offset + length] for offset, length in ranges]
        pieces = [stream.pieces(offset, size, self.boot.cluster) for offset, size in ranges]
        reads = [
            Read(self.start + place, length)
            for parts in pieces
            for place, length in parts
            if place is not None
        ]
        found = iter((yield from read_whole(reads)))
        contents: list[bytes] = []
        for (offset, size), parts in zip(ranges, pieces, strict=True):
            content = b"".join(
                bytes(length) if place is None else next(found) for place, length in parts
            )
            if offset + size > stream.initialized:
                content = content[: max(0, stream.initialized - offset)].ljust(size, b"\0")
            contents.append(content)
        return contents

    def records(self, numbers: Sequence[int]) -> Steps[list[Record]]:
        size = self.boot.record
        ranges = [(number * size, size) for number in numbers]
        found = yield from self.read(self.mft, ranges)
        return [
            tables.parse_record(data, number, self.boot.clusters)
            for number, data in zip(numbers, found, strict=True)
        ]

    def stream(self, record: Record, kind: int, name: str = "") -> Steps[Stream | None]:
        """Of a file, by its first record; None where the file has no such attribute."""
        what = f"attribute {kind:#x} of record {record.number}"
        wanted = name.encode("utf-16-le")
        here = [each for each in record.attributes if (each.kind, each.name) == (kind, wanted)]
        entries = yield from self._listed(record)
        if entries is None:
            if len(here) > 1:
                raise Doubt(f"{what} is there {len(here)} times")
            return Stream(here[0], what) if here else None
        stream = None
        left = [entry for entry in entries if (entry.kind, entry.name) == (kind, wanted)]
        while left:
            some = self._reachable(left) or left[:1]
            for extent in (yield from self._extents(record, some)):
                if stream is None:
                    stream = Stream(extent, what)
                else:
                    stream.extend(extent)
            del left[: len(some)]
        return stream

    def load_mft(self, first: Record) -> Steps[None]:
        """Learn where all of the MFT is: its later extents are in records that its earlier ones
        have."""
        entries = (yield from self._listed(first)) or []
        left = [e for e in entries if e.kind == tables.DATA and not e.name and e.vcn]
        while left:
            some = self._reachable(left)
            if not some:
                raise Doubt(f"the MFT goes on in its record {left[0].reference.number}")
            for extent in (yield from self._extents(first, some)):
                self.mft.extend(extent)
            del left[: len(some)]
        if self.mft.clusters * self.boot.cluster < self.mft.size:
            raise Doubt(f"the MFT has {self.mft.clusters} clusters for {self.mft.size} bytes")

    def _reachable(self, entries: Sequence[ListEntry]) -> list[ListEntry]:
        """Those at the beginning whose records lie in the known part of the MFT; some at once."""
        known = self.mft.clusters * self.boot.cluster // self.boot.record
        return list(takewhile(lambda entry: entry.reference.number < known, entries[:1024]))

    def _listed(self, record: Record) -> Steps[list[ListEntry] | None]:
        """The entries of the file's attribute list; None where it has none."""
        lists = [each for each in record.attributes if each.kind == tables.ATTRIBUTE_LIST]
        if not lists:
            return None
        what = f"record {record.number}"
        stream = Stream(lists[0], f"the attribute list of {what}")
        if stream.size > _MOST_LIST:
            raise Doubt(f"{stream.what} has {stream.size} bytes")
        (data,) = yield from self.read(stream, [(0, stream.size)])
        return list(tables.list_entries(data, what))

    def _extents(self, base: Record, entries: Sequence[ListEntry]) -> Steps[list[Attribute]]:
        """The attributes of the file that the entries are about."""
        numbers = {entry.reference.number for entry in entries} - {base.number}
        records = yield from self.records(sorted(numbers))
        by_number = {each.number: each for each in records} | {base.number: base}
        found = []
        for entry in entries:
            record = by_number[entry.reference.number]
            if record.sequence != entry.reference.sequence:
                raise Doubt(
                    f"record {record.number} has sequence number {record.sequence}, and not the"
                    f" {entry.reference.sequence} that the list of record {base.number} has"
                )
            if record is not base and record.base.number != base.number:
                raise Doubt(
                    f"record {record.number} is of record {record.base.number}, not {base.number}"
                )
            fitting = [
                each
                for each in record.attributes
                if (each.kind, each.name, each.vcn) == (entry.kind, entry.name, entry.vcn)
            ]
            if len(fitting) != 1:
                raise Doubt(
                    f"record {record.number} has {len(fitting)} attributes {entry.kind:#x} from"
                    f" cluster {entry.vcn} on"
                )
            found.append(fitting[0])
        return found
