"""Directories of images: what is in one, and whether that is still so."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from imgfs.errors import (
    ReadOnlyView,
)


@dataclass(frozen=True, slots=True)
class Listed:
    """A file in a directory; `name` has surrogates for what is not UTF-8."""

    name: str
    url: str  #: as `open_source` takes it
    mtime_ns: int = field(compare=False)


class Listing(ABC):
    """A directory whose files are images, or plain files.  `url` is shown."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    async def files(self) -> list[Listed]:
        """Its regular files and block devices, in no order.

        Raises SourceNotFound, AccessDenied, NotAnImage (it is no directory), SourceUnreachable.
        """

    @abstractmethod
    async def token(self) -> str | None:
        """Something that differs when the directory changed; None: not known.  Raises as above."""

    # Changing it.  Names are as in `Listed`, and none of these follows a link.

    is_writable = False

    def url_of(self, name: str) -> str:
        """Of a file in it, as in `Listed`."""
        return self.url + name

    async def create(self, name: str) -> None:
        """A new empty file.  Raises AlreadyThere, NoSpace, and as `files` does."""
        raise ReadOnlyView(f"{self.url}{name}: cannot be created")

    async def unlink(self, name: str) -> None:
        """Raises SourceNotFound, and as `files` does."""
        raise ReadOnlyView(f"{self.url}{name}: cannot be removed")

    async def rename(self, name: str, new_name: str, *, replace: bool) -> None:
        """Raises SourceNotFound; AlreadyThere without `replace`; and as `files` does."""
        raise ReadOnlyView(f"{self.url}{name}: cannot be renamed")
