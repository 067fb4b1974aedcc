"""What an answer says of the object that it is of, and whether two answers are of the same."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from imgfs.sources.base import Identity


@dataclass(frozen=True, slots=True)
class State:
    """The size in bytes, and validators (RFC 9110, section 8.8); `modified` has whole seconds.

    `address` is where the answer came from, without its query; "" where there is only one place.
    `is_redirected`: that is another host than the one that was asked.
    """

    size: int
    etag: str | None
    modified: datetime | None
    address: str = ""
    is_redirected: bool = False

    @property
    def is_weak(self) -> bool:
        return self.etag is not None and self.etag.startswith("W/")

    @property
    def strong(self) -> str | None:
        """What If-Match may be sent with."""
        etag = self.etag
        if etag is None or not etag.isascii() or not etag.isprintable():
            return None
        return etag if len(etag) > 2 and etag[0] == etag[-1] == '"' else None

    def differs(self, other: State) -> bool:
        """Are these states of different objects, or of different times?

        Mirrors have ETags of their own: between two addresses an equal one is proof, and another
        one is none.
        """
        if self.size != other.size:
            return True
        same_tag = self.etag == other.etag
        if self.address != other.address and not same_tag:
            return self.modified is None or self.modified != other.modified
        if not same_tag:
            return True
        # Equal weak ETags promise no equal bytes.
        return (self.etag is None or self.is_weak) and self.modified != other.modified

    def identity(self, where: str) -> Identity | None:
        """None where the server gives neither an ETag nor a date; `where` becomes part of it."""
        when = "" if self.modified is None else f"{self.modified:%Y-%m-%dT%H:%M:%SZ}"
        if self.is_redirected and self.modified is not None:
            # The next mount may be led to another mirror, with an ETag of its own.
            return Identity("modified", f"{when}:{self.size}{where}")
        if self.is_weak:
            return Identity("weak-etag", f"{self.etag}:{when}:{self.size}{where}")
        if self.etag is not None:
            return Identity("etag", f"{self.etag}:{self.size}{where}")
        if self.modified is not None:
            return Identity("modified", f"{when}:{self.size}{where}")
        return None
