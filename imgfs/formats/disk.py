"""What every format that holds a disk is once its header has been read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from imgfs.pieces import PieceList
from imgfs.steps import Read, Steps


@dataclass(frozen=True, slots=True)
class Backing:
    """The file that has what this one leaves out, as the header names it."""

    name: str
    format: str | None = None  #: None: the header does not say
    #: what `Disk.own_id` of it must be, one of these; None: the format does not record that
    wanted_ids: tuple[str, ...] | None = None
    #: other names of it, to be tried in this order where the first one leads to no such file
    other_names: tuple[str, ...] = ()


class Disk(ABC):
    """A disk inside of a file: `size` bytes, mapped piece by piece.

    Nothing in it changes; two maps may be under way at once.
    """

    format: ClassVar[str]  #: as qemu calls it
    size: int  #: bytes of the disk
    backing: Backing | None = None
    #: by which an overlay on it recognises it
    own_id: str | None = None

    @abstractmethod
    def map(self, offset: int, length: int) -> Steps[PieceList]:
        """Where the bytes of `[offset, offset + length)` are; the list may reach further on both
        sides, as far as the tables say that were read for it, but never past the disk.

        Raises CorruptImage naming the field, its value and its offset in the file.
        """

    def tables(self, offset: int, length: int, most: int) -> tuple[list[Read], int]:
        """Of file 0 what maps of the range will read, as far as that is known without reading:
        about `most` bytes, and up to where of the disk those are for.  Empty: few, or not known.
        """
        return [], offset + length

    def facts(self) -> list[tuple[str, str]]:
        """What a person wants to know of it: names and values, in the format's own terms."""
        return []
