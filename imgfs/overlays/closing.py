"""How a layer was left: closed, as a whole, or by a crash.

`closed` beside the log says how far that went when its writer closed it, what was in it, and how
long `sums` was.  Who opens it for writing takes that away first.  It need not be durable: without
it a layer is as good as after a crash.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from array import array
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

from imgfs._native import _map
from imgfs.errors import CorruptSnapshot
from imgfs.overlays.log import write_all

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Closed:
    """`is_whole`: all that is in `data` is the layer's.  `sums_size` is None of a layer of before
    there were any."""

    sums_size: int | None
    is_whole: bool


def mark_closed(path: Path, log: int, end: int, *, is_whole: bool) -> None:
    """The batches of the layer's log end there, and all of it is durable.  Raises OSError."""
    size = (path / "sums").stat().st_size
    words = b"%d %08x %d %d" % (end, _sum_of_file(log, end), size, is_whole)
    fresh = path / "closed.new"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, b"%s %08x\n" % (words, zlib.crc32(words, _of(path))), 0)
    finally:
        os.close(fd)
    fresh.rename(path / "closed")


def was_closed(path: Path, content: bytes, end: int) -> Closed | None:
    """Was it closed, and not left by a crash?  `content` is its log's, whose batches end there.

    Raises CorruptSnapshot when that is not what it was then, and OSError.
    """
    try:
        words, _, checksum = (path / "closed").read_bytes().strip().rpartition(b" ")
    except FileNotFoundError:
        return None
    fields = words.split(b" ")
    is_old = len(fields) == 1
    if checksum != b"%08x" % zlib.crc32(words, 0 if is_old else _of(path)):
        return None  # a crash came before it was on the disk
    then = int(fields[0])
    if end < then:
        raise CorruptSnapshot(
            f"{path / 'log'}: ends at byte {end}, and at {then} when it was closed; "
            "what is missing was cut off since: bring the file back"
        )
    if is_old:
        return Closed(None, True)
    if end > then or fields[1] != b"%08x" % zlib.crc32(memoryview(content)[:then]):
        raise CorruptSnapshot(
            f"{path / 'log'}: is not what it was when it was closed; bring the file back"
        )
    return Closed(int(fields[2]), fields[3] == b"1")


def _of(path: Path) -> int:
    """What of another layer is not this one's."""
    return zlib.crc32(path.name.encode("utf-8", "surrogateescape"))


def _sum_of_file(fd: int, end: int) -> int:
    found = 0
    for at in range(0, end, _PIECE):
        found = zlib.crc32(os.pread(fd, min(_PIECE, end - at), at), found)
    return found


def punch_stray(data: int, state: _map.SegmentMap, store: _map.Store) -> None:
    """Give back the space of what was written before a crash and is not the layer's."""
    ends, flags = _map.scan_file(data, state.size)
    there = _map.SegmentMap(state.size)
    there.load(ends, flags, store)
    # What is the layer's is to be ASK; what it says is zeroes stays what it is in the file.
    starts, stops, kinds = state.ranges()
    own = bytes(kind == _map.STORE for kind in kinds)
    starts, stops = (array("Q", compress(each, own)) for each in (starts, stops))
    there.set_ranges(starts, stops, bytes([_map.ASK]) * len(starts))
    for start, end, kind in zip(*there.ranges(), strict=True):
        if kind == _map.STORE:
            with contextlib.suppress(OSError):  # it only takes space
                store.punch(start, end - start)
