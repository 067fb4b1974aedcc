"""The log of a VHDX, replayed in memory: [MS-VHDX] section 2.3.

A writer that was interrupted has left changes of its structures in the log; the file is what it
would be with them made.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from imgfs.errors import CorruptImage, UnsupportedFeature
from imgfs.formats import vhdx_tables as vt
from imgfs.pieces import PieceListBuilder
from imgfs.steps import Read, Steps, read, read_all

MOST_LOG = 32 << 20  # Windows makes logs of 1 MiB
_MOST_CHANGES = 64 << 10


@dataclass(frozen=True, slots=True)
class Change:
    """Of the bytes `[start, end)` of the file; without content they become zero."""

    start: int
    end: int
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class Replayed:
    """A file with changes in front of it: sorted and apart.  `size` counts what they add to it,
    which is zero where they say nothing else.  `replayed` makes it."""

    stored: int
    size: int
    changes: Sequence[Change]
    _starts: Sequence[int]

    def read_all(self, reads: Sequence[Read]) -> Steps[list[bytes]]:
        """As `imgfs.steps.read_all`, of the file with its changes."""
        found = yield from read_all(reads)
        pairs = zip(reads, found, strict=True)
        return [self.patched(r.offset, r.length, bytes(data)) for r, data in pairs]

    def patched(self, offset: int, length: int, data: bytes) -> bytes:
        """What the stored data of a range is with the changes."""
        end = min(offset + length, self.size)
        if len(data) < end - offset:
            data = data.ljust(end - offset, b"\0")
        changed: bytearray | None = None
        for change in self._between(offset, end):
            changed = changed if changed is not None else bytearray(data)
            start, stop = max(change.start, offset), min(change.end, end)
            if start >= stop:
                continue  # past the end of what there is
            changed[start - offset : stop - offset] = _content(change, start, stop)
        return data if changed is None else bytes(changed)

    def append(self, builder: PieceListBuilder, end: int, offset: int) -> None:
        """Up to `end`: the file's bytes from `offset` on, which must be inside of `size`."""
        shift = offset - builder.end
        if not self.changes:
            self._append_stored(builder, end, shift)
            return
        for change in self._between(offset, end + shift):
            self._append_stored(builder, change.start - shift, shift)
            start, stop = builder.end + shift, min(change.end, end + shift)
            if change.content is None:
                builder.zero(stop - shift)
            else:
                builder.literal(_content(change, start, stop))
        self._append_stored(builder, end, shift)

    def _append_stored(self, builder: PieceListBuilder, end: int, shift: int) -> None:
        there = min(end, self.stored - shift)
        if builder.end < there:
            builder.data(there, builder.end + shift)
        if builder.end < end:
            builder.zero(end)

    def _between(self, start: int, end: int) -> Sequence[Change]:
        first = max(0, bisect_right(self._starts, start) - 1)
        last = bisect_right(self._starts, end - 1)
        return [change for change in self.changes[first:last] if change.end > start]


def _content(change: Change, start: int, end: int) -> bytes:
    if change.content is None:
        return bytes(end - start)
    return change.content[start - change.start : end - change.start]


def replayed(stored: int, size: int, changes: Sequence[Change]) -> Replayed:
    """The changes are in the order in which they were made."""
    merged = _merged(changes)
    return Replayed(stored, size, merged, [change.start for change in merged])


def replay(name: str, size: int, header: vt.Header) -> Steps[Replayed]:
    """The file of `size` bytes as its log makes it.

    A log with no valid entry changes nothing: it is that of a writer that came no further.  Raises
    CorruptImage and UnsupportedFeature.
    """
    if header.log_guid == vt.NO_GUID or header.log_length == 0:
        return replayed(size, size, [])
    if header.log_version != vt.LOG_VERSION:
        raise UnsupportedFeature(f"{name}: the log's version is {header.log_version}, not 0")
    if header.log_length > MOST_LOG:
        raise UnsupportedFeature(
            f"{name}: has a log of {header.log_length} bytes to be replayed, more than {MOST_LOG}"
        )
    if header.log_length % vt.MIB or header.log_offset % vt.MIB or header.log_offset < vt.MIB:
        raise CorruptImage(
            f"{name}: the log's offset {header.log_offset} or length {header.log_length} is no "
            "multiple of 1 MiB"
        )
    log = bytes((yield from read(header.log_offset, header.log_length)))
    if len(log) < header.log_length:
        raise CorruptImage(
            f"{name}: the log at offset {header.log_offset} is past the end of the file"
        )
    entries = _active_sequence(log, header.log_guid)
    if not entries:
        return replayed(size, size, [])
    newest = vt.log_entry(entries[-1])
    if newest.flushed_file_offset > size:
        raise CorruptImage(
            f"{name}: is truncated: it had {newest.flushed_file_offset} bytes, says its log"
        )
    changes: list[Change] = []
    for entry in entries:
        changes += _changes(entry)
        if len(changes) > _MOST_CHANGES:
            raise UnsupportedFeature(f"{name}: its log has more than {_MOST_CHANGES} changes")
    return replayed(size, max(size, min(newest.last_file_offset, 1 << 63)), changes)


def _active_sequence(log: bytes, guid: bytes) -> list[bytes]:
    """The entries to be replayed, the oldest first: of the sequences of valid entries that follow
    each other, and begin no later than the last one's tail, that with the newest last one."""
    best: list[bytes] = []
    best_number, at = 0, 0
    while at < len(log):
        entries: list[bytes] = []
        starts: list[int] = []
        head, left = at, len(log)
        while left > 0:
            entry = _valid_entry(log, head, guid)
            if entry is None:
                break
            number = vt.log_entry(entry).sequence_number
            if entries and number != vt.log_entry(entries[-1]).sequence_number + 1:
                break
            entries.append(entry)
            starts.append(head)
            head = (head + len(entry)) % len(log)
            left -= len(entry)
        if entries:
            newest = vt.log_entry(entries[-1])
            if newest.tail in starts and newest.sequence_number > best_number:
                best = entries[starts.index(newest.tail) :]
                best_number = newest.sequence_number
        if not entries:
            at += vt.LOG_SECTOR
        elif head <= at:
            break
        else:
            at = head
    return best


def _valid_entry(log: bytes, at: int, guid: bytes) -> bytes | None:
    """The entry that begins there, wrapped around the log's end or not."""
    if log[at : at + 4] != vt.LOG_SIGNATURE:
        return None
    header = vt.log_entry(log[at : at + vt.LOG_ENTRY_HEADER_SIZE])
    length = header.entry_length
    if header.log_guid != guid or header.sequence_number == 0:
        return None
    if not 0 < length <= len(log) or length % vt.LOG_SECTOR:
        return None
    entry = log[at : at + length]
    entry += log[: length - len(entry)]
    return entry if vt.has_checksum(entry) and _is_whole(header, entry) else None


def _is_whole(header: vt.LogEntry, entry: bytes) -> bool:
    """Are its descriptors and their data what they must be?"""
    descriptors = _descriptors(header)
    if descriptors > len(entry):
        return False
    number, data_at = header.sequence_number, descriptors
    for kind, _, middle, offset, sequence in _each_descriptor(header, entry):
        if sequence != number or offset % vt.LOG_SECTOR:
            return False
        if kind == vt.ZERO_DESCRIPTOR:
            if int.from_bytes(middle, "little") % vt.LOG_SECTOR:
                return False
        elif kind == vt.DATA_DESCRIPTOR:
            sector = entry[data_at : data_at + vt.LOG_SECTOR]
            data_at += vt.LOG_SECTOR
            if len(sector) < vt.LOG_SECTOR:
                return False
            signature, high, _, low = vt.LOG_DATA.unpack(sector)
            if signature != vt.DATA_SECTOR or high << 32 | low != number:
                return False
        else:
            return False
    return True


def _changes(entry: bytes) -> list[Change]:
    """Of a valid entry."""
    header = vt.log_entry(entry)
    changes = []
    data_at = _descriptors(header)
    for kind, trailing, middle, offset, _ in _each_descriptor(header, entry):
        if kind == vt.DATA_DESCRIPTOR:
            _, _, data, _ = vt.LOG_DATA.unpack_from(entry, data_at)
            data_at += vt.LOG_SECTOR
            changes.append(Change(offset, offset + vt.LOG_SECTOR, middle + data + trailing))
        elif length := int.from_bytes(middle, "little"):
            changes.append(Change(offset, offset + length))
    return changes


def _descriptors(header: vt.LogEntry) -> int:
    """Bytes of the sectors that have the header and the descriptors."""
    length = vt.LOG_ENTRY_HEADER_SIZE + header.descriptor_count * vt.DESCRIPTOR.size
    return -(-length // vt.LOG_SECTOR) * vt.LOG_SECTOR


def _each_descriptor(
    header: vt.LogEntry, entry: bytes
) -> Sequence[tuple[bytes, bytes, bytes, int, int]]:
    at = vt.LOG_ENTRY_HEADER_SIZE
    part = entry[at : at + header.descriptor_count * vt.DESCRIPTOR.size]
    return list(vt.DESCRIPTOR.iter_unpack(part))


def _merged(changes: Sequence[Change]) -> list[Change]:
    """Sorted and apart: where several are of the same bytes the last one counts."""
    cells = sorted({edge for change in changes for edge in (change.start, change.end)})
    index = {edge: number for number, edge in enumerate(cells)}
    owner: list[Change | None] = [None] * len(cells)
    later = list(range(len(cells)))  # a cell that may be free, at or after each

    def free(cell: int) -> int:
        while later[cell] != cell:
            later[cell] = later[later[cell]]
            cell = later[cell]
        return cell

    for change in reversed(changes):
        end = index[change.end]
        cell = free(index[change.start])
        while cell < end:
            owner[cell] = change
            later[cell] = cell + 1
            cell = free(cell)
    found = []
    for start, end, last in zip(cells, cells[1:], owner, strict=False):
        if last is not None:
            content = None if last.content is None else _content(last, start, end)
            found.append(Change(start, end, content))
    return found
