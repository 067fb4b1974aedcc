"""What a partition, a logical volume or a disk without a table holds."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

from imgfs.guest.space import Filesystem


@dataclass(frozen=True, slots=True)
class Cover:
    """Something that depends on all blocks of a filesystem, also on those that this calls free.

    `size` is of its data device in bytes, or `roots` how many hashes its tree has at the top.
    Neither: it is not known what it covers.
    """

    kind: str  #: what a person calls it: `dm-verity`
    size: int | None = None
    roots: int | None = None


@dataclass(frozen=True, slots=True)
class Content:
    """What a range holds: the names of all signatures, and the filesystem if there is one.

    `left_whole` says why none of it is free, or nothing.  `covers` are what is in here and covers
    the blocks of something else.  `is_empty`: all that was read of it is zero.
    """

    holds: tuple[str, ...] = ()
    filesystem: Filesystem | None = None
    left_whole: str = ""
    covers: tuple[Cover, ...] = ()
    is_empty: bool = False

    def kept(self, why: str) -> Content:
        """The same, left whole."""
        found = self.filesystem
        if found is not None:
            found = replace(found, free=array("Q"), left_whole=why)
        return replace(self, filesystem=found, left_whole=why)
