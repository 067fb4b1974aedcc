"""How a layer was left: closed, with a log of a known length, or by a crash.

`closed` beside the log says how far that went when its writer closed it.  Who opens it for writing
takes that away first.  It need not be durable: without it a layer is as good as after a crash.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from array import array
from itertools import compress
from pathlib import Path

from imgfs._native import _map
from imgfs.errors import CorruptSnapshot
from imgfs.overlays.log import write_all


def mark_closed(path: Path, end: int) -> None:
    """The batches of the layer's log end there, and all of it is durable.  Raises nothing."""
    number = b"%d" % end
    fresh = path / "closed.new"
    with contextlib.suppress(OSError):
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            write_all(fd, b"%s %08x\n" % (number, zlib.crc32(number)), 0)
        finally:
            os.close(fd)
        fresh.rename(path / "closed")


def was_closed(path: Path, end: int) -> bool:
    """Was it closed, and not left by a crash?

    Raises CorruptSnapshot when the batches end before where they ended then, and OSError.
    """
    try:
        number, _, checksum = (path / "closed").read_bytes().strip().partition(b" ")
    except FileNotFoundError:
        return False
    if checksum != b"%08x" % zlib.crc32(number):
        return False  # a crash came before it was on the disk
    if end < int(number):
        raise CorruptSnapshot(
            f"{path / 'log'}: ends at byte {end}, and at {int(number)} when it was closed; "
            "what is missing was cut off since: bring the file back"
        )
    return True


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
