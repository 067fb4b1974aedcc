"""Linux swap: all but its first page, and pages that are marked bad, is of no use once it is off.

The header is `union swap_header` of the kernel's include/linux/swap.h; mkswap writes it.
"""

from __future__ import annotations

import struct
import uuid
from array import array
from itertools import pairwise

from imgfs.guest.space import Filesystem
from imgfs.steps import Steps, read

KIND = "swap"
PAGE_SIZES = (4096, 8192, 16384, 32768, 65536)
MAGIC_LENGTH = 10  # at the end of the first page
VERSION_0 = b"SWAP-SPACE"
VERSION_1 = b"SWAPSPACE2"
_VERSIONS = (VERSION_0, VERSION_1)
#: what stands there instead while the machine sleeps, and its memory is in the pages
SUSPENDED = (b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001")
TUXONICE = b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c"  # at the very start

_HEADER = 1024
_FIELDS = "III16s16s"  # version, last_page, nr_badpages, uuid, volume name
_BAD_PAGES = 1536


def look(start: int, size: int) -> Steps[Filesystem]:
    """The swap area at byte `start` of file 0, in a partition of `size` bytes."""
    head = yield from read(start, min(size, PAGE_SIZES[-1]))
    pages = [each for each in PAGE_SIZES if head[each - MAGIC_LENGTH : each] in _VERSIONS]
    if len(pages) != 1:
        return _whole(size, f"its signature ends {len(pages)} pages of different sizes")
    page = pages[0]
    if head[page - MAGIC_LENGTH : page] == VERSION_0:
        return _whole(size, "swap of version 0")
    order = "<" if head[_HEADER : _HEADER + 4] == b"\1\0\0\0" else ">"
    version, last, bad, identity, name = struct.unpack_from(order + _FIELDS, head, _HEADER)
    if version != 1:
        return _whole(size, f"swap of version {version:#x} at byte {_HEADER}")
    if last == 0 or (last + 1) * page > size:
        return _whole(size, f"last_page {last} of {page} bytes is not in {size} bytes")
    if bad > (page - MAGIC_LENGTH - _BAD_PAGES) // 4:
        return _whole(size, f"nr_badpages {bad} does not fit in the header of {page} bytes")
    marked = struct.unpack_from(f"{order}{bad}I", head, _BAD_PAGES)
    if not all(0 < each <= last for each in marked):
        return _whole(size, f"a bad page is not in the {last + 1} pages")
    return Filesystem(
        kind=KIND,
        size=(last + 1) * page,
        label=name.partition(b"\0")[0].decode("utf-8", "replace"),
        uuid=str(uuid.UUID(bytes=identity)) if any(identity) else "",
        used=page,
        free=_pages_between(sorted({0, *marked, last + 1}), page),
    )


def _pages_between(taken: list[int], page: int) -> array[int]:
    free = array("Q")
    for before, after in pairwise(taken):
        if before + 1 < after:
            free.extend(((before + 1) * page, after * page))
    return free


def _whole(size: int, why: str) -> Filesystem:
    return Filesystem(KIND, size, left_whole=why)
