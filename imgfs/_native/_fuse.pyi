"""The interposer: request threads in front of pyfuse3.  One session a process.

Load it through `imgfs._native.load_fuse()`, before anything imports pyfuse3.
"""

from collections.abc import Callable
from typing import TypedDict

from imgfs._native._map import SegmentMap

#: Set in the handle of a file that is opened with direct_io, and written.
DIRECT_HANDLE: int

class Status(TypedDict):
    ended: bool  # the connection is gone
    error: int  # errno of an unexpected end, or 0
    queue_length: int  # requests that wait for Python
    max_write: int  # bytes, from INIT
    reads: int  # answered natively
    bytes: int
    spliced: int  # of the reads: those whose bytes were not copied here
    seeks: int
    lookups: int  # of names, answered natively
    queued: int  # handed to Python so far
    parked: int  # waited natively for blocks that were on their way
    interrupts: int
    waited_for_disk: int  # of the reads that were not spliced
    writes: int  # answered natively, as are the zeroes: punched holes, zeroed ranges
    bytes_written: int
    writes_spliced: int  # of the writes: those whose bytes were not copied here
    zeroes: int
    syncs: int  # FSYNCs answered natively, and writes with O_DSYNC
    handed_over: int  # writes and zeroes for which no request thread could be spared

def arm(max_background: int = 1024, max_pending_writes: int = 64 << 20) -> None:
    """From now on the interposed functions work; before `pyfuse3.init`.  `max_pending_writes` is bytes
    that wait for Python."""

def hooked() -> bool:
    """Did pyfuse3.init come through here, and will its other calls?  If not, the fast path would be
    silently dead."""

def start(threads: int) -> None:
    """Start the request threads, after `pyfuse3.init`.  OSError."""

def stop() -> None:
    """Stop and join the request threads and forget every published inode."""

def disarm() -> None:
    """After `stop` and `pyfuse3.close`."""

def status() -> Status: ...
def set_extra_handler(handler: Callable[[str, int, int, int, tuple[int, ...]], None]) -> None:
    """handler(name, request, inode, file handle, arguments) is called on the loop's thread for
    lseek (offset, whence), fallocate (mode, offset, length) and copy_file_range (offset, inode out,
    handle out, offset out, length, flags); it answers, now or later, with a reply_ function."""

def reply_lseek(request: int, offset: int) -> int: ...
def reply_err(request: int, errno: int) -> int: ...
def reply_write(request: int, count: int) -> int:
    """Also of copy_file_range: so many bytes."""

def interrupt_fd() -> int:
    """An eventfd, readable while `take_interrupts` has something, and for good after the end."""

def take_interrupts() -> list[tuple[int, int]]:
    """(the request meant, the interrupt's own number)"""

def retry_interrupt(unique: int) -> int:
    """Answer an interrupt whose request is not known here: the kernel sends it again if it is due."""

def parked() -> dict[int, int]:
    """The requests that wait natively for blocks, and the threads they are for; a thousand at most."""

def interrupt_parked(unique: int) -> bool:
    """Answer a parked request with EINTR; False when it is not parked (any more)."""

def current_unique() -> int:
    """The number of the request that pyfuse3 took last: valid in a handler's first step."""

def current_dsync() -> bool:
    """Of the request that pyfuse3 took last: is it a WRITE that the answer says is on the disk?"""

def current_pid() -> int:
    """The thread that this request is for, valid as long; 0 when it is not in our namespace."""

def publish(inode: int, map: SegmentMap) -> None:
    """From now on answer reads and seeks of this inode from the map where it can; and, while the map has
    a target, writes, zeroes, and FSYNC where `SegmentMap.sync` can."""

def publish_name(
    parent: int,
    name: bytes,
    entry: tuple[int, int, int, int, int, int, int, int, int],
    mtime: tuple[int, int],
    ctime: tuple[int, int],
    timeouts: tuple[int, int],
    /,
) -> bool:
    """From now on answer look-ups of this name.  False: it is published already.

    `entry` is (inode, generation, size, blocks, mode, links, uid, gid, size of a block); times are
    in seconds and nanoseconds, and how long the kernel may believe the name and the attributes, in
    seconds."""

def withdraw_name(parent: int, name: bytes, /) -> int:
    """Look-ups of it are handed on again; how many were answered since it was published."""

def retract(inode: int) -> bool: ...
