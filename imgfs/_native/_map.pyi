"""The native segment map and block stores.  Offsets and lengths are bytes, ranges half-open.

Methods marked [blocks] release the GIL and may wait for a disk: call them in a worker thread
when the file is large or slow.  All methods are thread-safe.
"""

from array import array

from typing_extensions import Buffer

from imgfs.pieces import Packed

ASK: int  # only Python knows: a native reader hands the request on
ZERO: int  # reads as zeroes
LITERAL: int  # bytes held in memory
STORE: int  # bytes of a store, when their blocks are present
BELOW: int  # only in a `dirty`: not the target's any more

DATA: int  # lseek: data
HOLE: int  # lseek: hole
UNKNOWN: int  # lseek: ask Python (only with ASK)
OTHER: int  # whose: somebody else's
ZEROES: int  # whose: nobody's
WATCHES: int  # how many ranges of a store can be watched
BLOCK: int  # what is written as a whole, in bytes; a map's last block may be shorter

class Store:
    """A file with `size` bytes in blocks of `block_size`, each present or not.

    The store dups `fd`; -1: there is no file before `attach`.  With whole=True every block is
    present for good (a local source), unless the file is detached; blocks of a store may otherwise
    be absent, and are so at first.
    """
    def __init__(
        self, fd: int, size: int, block_size: int = 65536, *, whole: bool = False
    ) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def present(self) -> int:
        """How many blocks are present."""
    @property
    def bytes_served(self) -> int:
        """Bytes read from this store by anyone so far, natively or by Python."""
    def set_present(self, first_block: int, count: int) -> int:
        """Mark blocks present (their bytes must be written already); returns how many were not."""
    def clear_present(self, first_block: int, count: int) -> int:
        """Mark blocks absent; returns how many were present.  Then `quiesce`, then punch."""
    def set_coming(self, first_block: int, count: int) -> None:
        """These blocks are being fetched: a native reader of them waits for `settle`, which must
        follow whatever happens, instead of asking Python."""
    def settle(self, first_block: int, count: int) -> None:
        """They are present now, or zero in the map, or they are not coming: who waits looks again."""
    def is_present(self, offset: int, length: int) -> bool: ...
    def missing(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The absent blocks that touch the range, and are not held there, as maximal runs (first_block, count)."""
    def oldest(self, count: int) -> list[tuple[int, int]]:
        """About `count` present blocks, least recently read first found, as runs (first_block, count)."""
    def oldest_age(self) -> int:
        """How long ago the least recently used present block was used, in ticks of 16 ms; -1 if none."""
    def read(self, offset: int, length: int) -> bytes:
        """[blocks] The file's bytes, present or not; OSError EIO when the file is shorter."""
    def write(self, offset: int, data: Buffer) -> None:
        """[blocks] Write all of data; OSError (ENOSPC …) otherwise.  Does not mark blocks present."""
    def write_nonzero(
        self, offset: int, data: Buffer
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """[blocks] Write the data, but for the blocks in which all of it is zero.

        Returns the blocks written, as runs (first_block, count), and the rest as ranges
        (start, end) in bytes.  OSError (ENOSPC …): some of it may have been written."""
    def find_nonzero(
        self, offset: int, data: Buffer
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """[blocks] As `write_nonzero`, but nothing is written."""
    def hold(self, offset: int, data: Buffer) -> bool:
        """From now on these bytes of the file are read from memory, where their blocks are absent.

        `data` must not change until `unhold`.  False: too many ranges are held.  ValueError: it is empty,
        or goes beyond the end."""
    def unhold(self, offset: int, length: int) -> bool:
        """Let go of what `hold` was given as just this range; nobody reads it any more then."""
    def held_left(self, offset: int, length: int) -> int:
        """How many bytes of just this range, if it is held, nobody has read yet."""
    def punch(self, offset: int, length: int) -> None:
        """[blocks] Give the range's disk space back.  Raises OSError as fallocate(2) does: a device's
        range must be whole sectors."""
    def attach_sums(
        self, fd: int, key: int, name: str, closed: str, trust: int, writable: bool, /
    ) -> None:
        """From now on what is read of this whole store is compared once with its sums, which are in
        this file (dupped); reading, writing or punching a part of a block that disagrees raises
        CorruptSnapshot.  What is written has no sum until `seal`.

        `name` is the store's file for people; while there is no file `closed` another process may be
        writing it; `trust` as imgfs.overlays.sums.  Without this the methods below do nothing."""
    def verify(self, offset: int, length: int) -> None:
        """[blocks] Compare all of the range that was not compared before.  Raises CorruptSnapshot, OSError."""
    def seal(self, age_ms: int, regions: int) -> int:
        """[blocks] Give sums to what was written, and not for that long, of so many regions of 4 MiB; returns
        how many blocks got one.  Who writes does not wait for it.  OSError."""
    @property
    def is_sealed(self) -> bool:
        """Has all that was written its sums?"""
    def renew_sums(self, offset: int, length: int) -> None:
        """[blocks] After a crash: what of the range has no sum is to get one by `seal`; where the machine went down,
        what disagrees, too.  OSError."""
    @property
    def accepted(self) -> int:
        """How many blocks disagreed, since the machine went down."""
    def before_cut(self, size: int) -> None:
        """[blocks] Call this before a smaller size is recorded anywhere; `cut_sums` when all agrees with it.  Nothing is
        sealed in between.  Raises CorruptSnapshot, OSError."""
    def cut_sums(self, size: int) -> None:
        """[blocks] OSError."""
    def sums_done(self) -> None:
        """All is sealed and we write no more: from now on it is read as what was closed."""
    def sync_sums(self) -> None:
        """[blocks] Force the sums out.  OSError."""
    def attach(self, fd: int) -> None:
        """From now on the blocks are in this file, dupped too; ValueError when some are present, or
        when a whole store is not detached."""
    def detach(self) -> bool:
        """Close the file for now; False where it is being read just now, or where there are blocks in
        it.  Until `attach` native readers ask Python, and `read` and `write` of a whole store raise
        OSError ENOTCONN."""
    def fileno(self) -> int:
        """The store's own descriptor; -1 while there is none."""
    def resize(self, size: int) -> None:
        """Of a whole store; ValueError for another.  The caller truncates the file: to grow, the file,
        then the store, then maps; to shrink, maps, `quiesce`, the store, then the file."""
    def watch(self, slot: int, start: int, end: int) -> None:
        """Tell of the first read from now on, by whatever map, that touches these bytes of the file, and
        free the slot by that.  start == end frees it now.  slot < WATCHES.  A read that must ask Python is
        not told of."""
    def watch_fd(self) -> int:
        """An eventfd, the store's own: readable when `take_seen` has something."""
    def take_seen(self) -> list[int]:
        """The slots whose ranges were read since this was asked last."""
    def quiesce(self) -> None:
        """[blocks] Return when every reader that began before this call has finished."""

class Log:
    """A layer's log, behind its last batch.  imgfs/overlays says what is in it.

    Whoever appends, cuts or replaces, does it alone: under `hold`, where native commits may come."""
    def __init__(
        self, fd: int, data: Store, state: SegmentMap, end: int, room: int, sequence: int, /
    ) -> None:
        """The fd is duplicated.  Its batches end at byte `end`, with the number `sequence`, and up to byte `room` it
        has blocks on disk.  `state` is what it says, of the bytes that are in `data`."""
    @property
    def size(self) -> int:
        """Of the disk, as the log says."""
    @property
    def end(self) -> int: ...
    @property
    def sequence(self) -> int:
        """The number of its last batch."""
    @property
    def native_commits(self) -> int: ...
    @property
    def is_lost(self) -> bool:
        """Something that was written may be gone, for good: so nothing may be called durable any more."""
    def mark_lost(self) -> None: ...
    def append(self, size: int, starts: array[int], ends: array[int], kinds: bytes) -> None:
        """[blocks] A batch of these ranges (STORE, ZERO or ASK), durable and in `state`.  OSError: nothing has
        changed, or `is_lost`."""
    def cut(self) -> None:
        """[blocks] Take away what is behind the last batch.  OSError."""
    def replace(self, fd: int, end: int) -> None:
        """The log is in this file now, as one batch."""
    def hold(self) -> None:
        """[blocks] Return when no native commit is under way; none begins until `release`."""
    def release(self) -> None: ...

class SegmentMap:
    """`size` bytes described by segments; at first all of it is (ASK, UNKNOWN)."""
    def __init__(self, size: int) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def reads(self) -> int:
        """Requests answered from this map by the native fast path so far; `read` does not count."""
    @property
    def reads_waited(self) -> int:
        """Those of them that waited for blocks on their way."""
    @property
    def bytes_served(self) -> int:
        """The bytes of those requests."""
    def __len__(self) -> int:
        """How many segments there are."""
    def load(self, ends: array[int], flags: bytes, store: Store | None) -> None:
        """Replace everything by an ExtentList's fields: an extent with the ZERO flag becomes
        (ZERO, HOLE), any other (STORE at its own offset, DATA), or (ASK, DATA) without a store."""
    def set_zero(self, start: int, end: int, *, data: bool = False) -> None:
        """data=True: reads as zeroes, but lseek calls it data."""
    def set_store(
        self, start: int, end: int, store: Store, store_offset: int, *, hole: bool = False
    ) -> None: ...
    def set_literal(self, start: int, data: bytes, *, hole: bool = False) -> None: ...
    def set_ask(self, start: int, end: int, kind: int = ...) -> None:
        """kind: DATA, HOLE or UNKNOWN.  Retracts whatever was published."""
    def copy(self, start: int, other: SegmentMap, other_start: int, length: int) -> None:
        """From `start` on, say what the other map says now of `length` bytes from `other_start` on:
        ASK too, where it says that."""
    def put(self, packed: Packed, files: list[SegmentMap]) -> None:
        """What a list of pieces says: ZERO is zeroes, DATA what the file's map says now, as `copy` does,
        and anything else (ASK, DATA).  LITERAL is left as it is: `set_literal` it.  Readers get in between."""
    def fill(
        self, starts: array[int], ends: array[int], kinds: bytes, store: Store | None = None
    ) -> None:
        """Like `fill_zero` and `fill_store` (at the range's own offset) of many ranges, each of
        its kind ZERO or STORE.  ValueError: another kind, or ends before it starts; OSError ENOMEM.
        Readers get in between, and see some of it."""
    def set_ranges(
        self, starts: array[int], ends: array[int], kinds: bytes, store: Store | None = None
    ) -> None:
        """[blocks] As `fill`, in this order, of ranges that may overlap, but replacing what is there; a
        kind may be ASK (UNKNOWN) too."""
    def ranges(self) -> tuple[array[int], array[int], bytes]:
        """[blocks] All that is not ASK, as `fill` takes it."""
    def replace_store(self, old: Store, new: Store) -> None:
        """[blocks] What is in one store is at the same places in the other: say so, and let go of the old one.

        Readers who have begun may read it still.  ValueError: the new one is too short, or the old one
        is the target.  OSError ENOMEM: nothing has changed."""
    def fill_zero(self, start: int, end: int, *, data: bool = False) -> None:
        """The fill_ methods are the set_ methods, but replace only what is ASK, so that what was written
        meanwhile stays; and leave out what lies beyond the end of the map."""
    def fill_store(
        self, start: int, end: int, store: Store, store_offset: int, *, hole: bool = False
    ) -> None: ...
    def fill_literal(self, start: int, data: bytes, *, hole: bool = False) -> None: ...
    def fill_copy(self, start: int, other: SegmentMap, other_start: int, length: int) -> None: ...
    @property
    def writable(self) -> bool:
        """Has it a target?"""
    @property
    def writes(self) -> int:
        """How often `write` wrote so far, natively or called by Python."""
    @property
    def bytes_written(self) -> int: ...
    @property
    def changes(self) -> int:
        """How often anything was changed so far by the methods that need a target, or `resize`."""
    def set_target(
        self, store: Store | None, dirty: SegmentMap | None = None, log: Log = ...
    ) -> None:
        """[blocks] From now on writes go to this whole store, at the map's own offsets, and mark `dirty`, a map
        of the same size and all ASK; None: nowhere.  No segment changes.  When it returns no write,
        `zero` or `copy_up` to the target so far is under way.  `log`, which is of that store: a native sync may
        commit to it what is in `dirty`.  ValueError: not whole, of another size."""
    def write(self, offset: int, data: Buffer) -> bool:
        """[blocks] The native writers' own code: write into the target's file, then mark the blocks as (STORE, DATA)
        in the map and in `dirty`.

        A block that is the target's already is marked no more, and may be written in part.  False: nothing
        was done, since there is no target, or a block would be written in part that is not the target's: `copy_up`
        it first.  ValueError: outside of the map.  OSError (ENOSPC …): not all was written, and nothing marked."""
    def copy_up(self, start: int, data: Buffer) -> bool:
        """[blocks] Write the old bytes of whole blocks into the target's file, and mark them as `write` does.

        What is the target's by now is left alone, and what is zero by now becomes zeroes, whatever data
        says: so it is enough that data was right once.  False: there is no target.  ValueError: outside of the
        map, or not whole blocks.  OSError: as of `write`."""
    def zero(self, start: int, end: int) -> bool:
        """[blocks] Mark whole blocks as (ZERO, HOLE) in the map and in `dirty`, and give back the target's disk space.

        What is (ZERO, HOLE) all over is left alone, and not in `dirty`.  False: there is no target.  ValueError:
        outside of the map, or not whole blocks."""
    def below(self, start: int, end: int, lower: SegmentMap) -> bool:
        """[blocks] Whole blocks are what `lower` says of them from now on, and BELOW in `dirty`.

        The target's bytes stay in its file until `reclaim`.  False: there is no target.  ValueError: outside
        of one of the maps, or not whole blocks.  OSError ENOMEM: a first part is done."""
    def reclaim(self, start: int, end: int, store: Store, dirty: SegmentMap) -> None:
        """[blocks] Of a range that was BELOW in `dirty`, and is so durably: give back the space that it has in
        the store's file, but for what `dirty` says has been written since.  OSError: it stays."""
    def stored(self, offset: int, length: int) -> int:
        """How many bytes, from the beginning of the range, are in stores now."""
    def move(self, offset: int, other: SegmentMap, other_offset: int, length: int) -> int | None:
        """[blocks] Copy to whole blocks, from file to file, as many bytes from the beginning of a range of the
        other map, which may be this one, as are in its stores; returns how many.

        None: there is no target.  ValueError: outside of a map, or not whole blocks.  OSError: as of `write`."""
    def resize(self, size: int) -> None:
        """[blocks] Cut, or grow by (ZERO, HOLE), as is `dirty`."""
    def sync(self) -> bool:
        """[blocks] The native fsync's own code: fdatasync the target's file, and append what `dirty` has to the log.

        False, and all is as it was: without a target and a `dirty`; when `dirty` has something and there is no
        log; when it was taken from or resized and not settled since; while the log is held or too long; or when
        something failed, of which the log tells whoever appends to it next.  OSError: only without a log."""
    def settle(self) -> None:
        """Called on `dirty`: what was taken, and the size, is safe now, or put back."""
    def take(self) -> tuple[array[int], array[int], bytes]:
        """All that is not ASK, as `fill` takes it, and make all ASK again, in one step.

        Called on `dirty`: what `write`, `copy_up` and `zero` marked.  A write to what was marked before marks
        nothing, so of two calls the second may find nothing while the first one's ranges are not safe yet: do what
        follows one at a time.  OSError ENOMEM: nothing was taken."""
    def segments(self, offset: int, length: int) -> list[tuple[int, int, int, int]]:
        """(start, end, ASK|ZERO|LITERAL|STORE, DATA|HOLE|UNKNOWN) clipped to the range."""
    def origins(self, offset: int, length: int, stores: list[Store]) -> list[tuple[int, int, int]]:
        """(start, end, whose) of a first part of the range: the number in `stores` of the one that has the
        bytes, at their own offset; ZEROES; or OTHER.  Of a thousand stores at most."""
    def next_unknown(self, start: int, end: int) -> int:
        """The first byte of the range that is UNKNOWN; else `end`."""
    def extents(self, offset: int, length: int) -> tuple[array[int], bytes]:
        """The range as an ExtentList's (ends, flags): what lseek calls a hole, and the rest."""
    def data_bytes(self) -> int:
        """How many bytes lseek calls data or does not know."""
    def read(self, offset: int, length: int, nowait: bool = False, /) -> bytes | None:
        """[blocks] The bytes if all of them are local, else None.  The native readers' own code.

        With `nowait` it does not block: None, too, where a disk would have to be waited for."""
    def seek(self, offset: int, whence: int, size: int = ..., /) -> int | None:
        """lseek's answer for os.SEEK_DATA or os.SEEK_HOLE: an offset, or None where only Python knows.
        OSError ENXIO at or past the end, or when no data follows.

        A block of BLOCK bytes is a hole only as a whole: the answer is `offset` itself, a multiple of
        BLOCK, or the end.  With `size` the file ends there, and what is unknown is data."""

def scan_file(fd: int, size: int) -> tuple[array[int], bytes]:
    """[blocks] `fd`'s extents by SEEK_DATA/SEEK_HOLE as an ExtentList's (ends, flags)."""
