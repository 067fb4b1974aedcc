"""What every source is: an image whose bytes come from outside of imgfs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from imgfs.errors import SourceUnreachable, UnsupportedFeature
from imgfs.image import Image, WritableImage


class Broken(Exception):
    """The connection is of no use any more; another one may be.  `error` is what to say of it.

    It never leaves a source.
    """

    def __init__(self, error: SourceUnreachable) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one state of a source from another; compared, never interpreted.

    `kind` says how it was learnt (`stat`, `sftp`, `etag` …): two of different kinds say nothing
    about each other.  `token` is the text that is compared and stored.
    """

    kind: str
    token: str


@dataclass(frozen=True, slots=True)
class SourceStat:
    """What a source says of itself when it is opened."""

    size: int  #: bytes
    mtime_ns: int
    mode: int  #: permission bits of the source, 0 to 0o777
    identity: Identity | None
    ctime_ns: int | None = None  #: where it is known


HEAD, TAIL = 1024, 512  # bytes of a glimpse


@dataclass(frozen=True, slots=True)
class Glimpse:
    """The first and the last bytes of a source, in the state in which it was opened."""

    size: int  #: of the source
    head: bytes
    tail: bytes

    @property
    def is_right(self) -> bool:
        """Is it of a source of this size?"""
        ends = len(self.head), len(self.tail)
        return ends == (min(HEAD, self.size), min(TAIL, self.size))

    def read(self, offset: int, length: int) -> bytes | None:
        """None when they do not hold all of the range."""
        if offset + length <= len(self.head):
            return self.head[offset : offset + length]
        start = offset - (self.size - len(self.tail))
        if start >= 0 and start + length <= len(self.tail):
            return self.tail[start : start + length]
        return None


class Source(Image):
    """An open source.  `stat` is what it was when it was opened, and stays but for own writes.

    Reads that fail for good raise an ImgfsError; `temporary` ones have already been
    tried again until the source's timeout.  `glimpse` is what came with opening it.
    """

    glimpse: Glimpse | None = None

    def __init__(self, name: str, url: str, stat: SourceStat) -> None:
        super().__init__(name, stat.size)
        self.url = url  #: shown to people; holds no secret
        self.stat = stat

    @property
    def identity_anywhere(self) -> Identity | None:
        """`stat.identity` in words that are the same on every machine that sees this source."""
        return self.stat.identity

    @property
    def round_trip_s(self) -> float:
        """Seconds that the smallest request takes, as far as is known; else 0."""
        return 0.0

    async def peek(self, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Some short ranges (offset, length), where that is quicker than reading them is when the
        source is not to be read otherwise; None: it is not.

        Raises as `read` does.
        """
        for offset, length in ranges:
            self._check_range("peek", offset, length)
        found = await self._peek(ranges)
        if found is not None:
            with self.counters.counted(sum(length for _, length in ranges)):
                return found
        return None

    async def _peek(self, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        return None

    @abstractmethod
    async def check_identity(self) -> None:
        """Ask, by path, whether the source is still the one that was opened.

        Returns when it is, or when it has no identity.  Raises SourceChanged when it is
        certainly not (deleted counts), SourceUnreachable when that could not be found out.
        """


class WritableSource(Source, WritableImage):
    """A source that may have been opened for writing.

    Own writes change what it is told by, so they stand between `begin_writing` and `pin`.  In
    between `check_identity` raises SourceChanged for another file only, not for another state.

    After `outlive_name` it stays the file that was opened, whatever happens to its name: when
    there is another file under that, or none, it `is_nameless`, which is no change.
    """

    @property
    def file_token(self) -> str:
        """Tells which file is written, in whatever state; empty: nothing does."""
        return ""

    @property
    def takes_several(self) -> bool:
        """May several processes write to it at a time, each its own ranges?"""
        return False

    is_nameless = False  #: its name is gone, or is another file's

    async def keep(self) -> None:
        """See to it that it is open in a way that needs no name.  Raises as opening does."""

    def outlive_name(self) -> None:
        """From now on another file under its name is no change."""

    async def moved(self, url: str) -> None:
        """The file has this name now, which `open_source` takes."""

    async def lost_name(self) -> None:
        """The file has no name any more: from now on it is what is open."""

    @property
    def keeps_mtime(self) -> bool:
        """Has it an mtime that can be set?"""
        return False

    async def set_mtime(self, mtime_ns: int | None) -> None:
        """None: the time now.  Only where it `keeps_mtime`, and as a write: it is told by that.

        Raises NotPermitted where the source refuses, and as `write` does.
        """
        raise UnsupportedFeature(f"{self.url}: has no mtime")

    @abstractmethod
    async def begin_writing(self) -> None:
        """Before own writes: raises as `check_identity` does."""

    @abstractmethod
    async def pin(self) -> None:
        """After own writes, none of which is on its way: what it is now it is to be from now on.

        Sets `stat`, and `size` where it was not known.  Raises SourceChanged when it is certainly
        not what was written: another file, or of another size; SourceUnreachable when that could
        not be found out.
        """
