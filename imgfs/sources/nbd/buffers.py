"""Memory that long reads go to, used again when nobody looks at it any more.

The C library gives large pieces of memory back to the kernel as soon as they are free, and the
kernel clears every page that it hands out: for an image that is read from end to end that costs
more than receiving it.  So a few buffers are kept, for all NBD sources of the process.

A buffer is free when only the list here refers to it: a view, and a view of a view, each keep a
reference to the bytearray itself (and so does libnbd, until the request has its reply).
"""

from __future__ import annotations

import sys

SIZE = 2 << 20  # bytes: the cache fetches a little less at once
LEAST = 512 << 10  # what is shorter the C library keeps by itself
MOST = 32

_UNUSED = 3  # references: the list's, the variable's, getrefcount's own
_buffers: list[bytearray] = []
_needed = 0  # how many of them, since `let_go`


def buffer(length: int) -> memoryview:
    """`length` bytes to write to; what is in them is whatever was there."""
    global _needed
    if not LEAST <= length <= SIZE:
        return memoryview(bytearray(length))
    for index in range(len(_buffers)):
        each = _buffers[index]
        if sys.getrefcount(each) == _UNUSED:
            _needed = max(_needed, index + 1)
            return memoryview(each)[:length]
    new = bytearray(SIZE)
    if len(_buffers) < MOST:
        _buffers.append(new)
        _needed = len(_buffers)
    return memoryview(new)[:length]


def let_go() -> None:
    """Keep as many as were needed since this was called last."""
    global _needed
    del _buffers[_needed:]
    _needed = 0
