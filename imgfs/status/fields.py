"""What a mount tells of itself in `.imgfs/status.json`: the schema, and nothing else.

`imgfs.app` makes it, `imgfs.status.metrics` renders it, `imgfs top` reads it, perhaps of another
version: a figure that is not known is left out, and readers take nothing that is NotRequired for
granted.  Names may be surrogates where they are not UTF-8, as os.fsdecode makes them; JSON escapes
those.
"""

from __future__ import annotations

from typing import Final, Literal, NotRequired, TypeAlias, TypedDict

#: `failed`: it could not be opened; `last_error` says why, and the next use tries again.
#: `stale`: the source is another than what is open, and is opened anew at the next open.
#: `unreachable`: it does not answer; what is cached of it can be read.
State: TypeAlias = Literal["open", "not opened yet", "failed", "stale", "unreachable"]

STATES: Final[tuple[State, ...]] = ("open", "not opened yet", "failed", "stale", "unreachable")


class ImageStatus(TypedDict):
    """One image.  Counters count from when its source was opened last, and may start again at 0.

    `bytes_native` + `bytes_python` is what programs have read, `bytes_fetched` what came from the
    source for that; of a local file the source is read by the kernel, and that is 0.
    `hits` + `misses` is `reads`: a miss had to wait for the source.
    """

    source: str  #: a URL without secrets, or an absolute path
    state: State
    identity: NotRequired[str | None]  #: None: nothing tells one state of the source from another
    size: NotRequired[int]  #: bytes of the raw view
    stored: NotRequired[int]  #: bytes of it that are not holes
    bytes_native: NotRequired[int]  #: counter; answered by the fast path
    bytes_python: NotRequired[int]  #: counter; answered by Python
    bytes_fetched: NotRequired[int]  #: counter; asked of the source, readahead too
    reads: NotRequired[int]  #: counter; answered requests, by whomever
    hits: NotRequired[int]  #: counter
    misses: NotRequired[int]  #: counter
    in_flight: NotRequired[int]  #: reads that wait for Python
    fetching: NotRequired[int]  #: requests to the source that wait now
    window: NotRequired[int]  #: bytes that readahead is ahead of the fastest stream; 0: off
    cached: NotRequired[int]  #: bytes on disk
    bytes_written: NotRequired[int]  #: counter; sent to the source
    dirty: NotRequired[int]  #: bytes that were written and are not at the source yet
    errors: NotRequired[int]  #: counter; those that programs got
    last_error: NotRequired[str]  #: one line; empty: none so far
    #: why of these (`partition 1`, `volume vg-root`, `disk`) nothing is called free; left out until
    #: somebody has looked into sparse/ or partitions/
    left_whole: NotRequired[dict[str, str]]


class CacheStatus(TypedDict):
    """The cache of all images of the mount, in bytes.  A limit of 0: there is none on disk."""

    limit: int
    used: int


class MemoryStatus(TypedDict):
    """Bytes that are on their way, read ahead, or waiting to be written, of all images together."""

    limit: int  #: chosen from the limits in force when the mount began
    used: int
    peak: int  #: the most so far
    waiting: int  #: fetches that wait for room


class FastPathStatus(TypedDict, total=False):
    """The native side, of all images together (imgfs/_native/_fuse.pyi)."""

    ended: bool
    error: int  #: errno, 0: none
    queue_length: int  #: requests that wait for Python now
    max_write: int  #: bytes
    reads: int  #: counter
    bytes: int  #: counter
    spliced: int  #: counter; of the reads, those whose bytes went by reference
    seeks: int  #: counter
    lookups: int  #: counter
    queued: int  #: counter; requests handed to Python
    parked: int  #: counter; reads that waited for blocks on their way
    interrupts: int  #: counter
    waited_for_disk: int  #: counter
    writes: int  #: counter
    bytes_written: int  #: counter
    writes_spliced: int  #: counter; of the writes, those whose bytes went by reference
    zeroes: int  #: counter; holes punched and ranges zeroed
    syncs: int  #: counter
    handed_over: int  #: counter; writes for which no request thread could be spared


class MountStatus(TypedDict):
    """The whole file."""

    pid: int
    source: str  #: what is mounted, as an image's
    images: dict[str, ImageStatus]
    cache: CacheStatus
    fast_path: FastPathStatus
    memory: NotRequired[MemoryStatus]
    #: why it does not end though it was asked to, or why the TOML file was not read again
    last_error: NotRequired[str]
