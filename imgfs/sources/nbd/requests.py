"""Commands that an NBD server was sent, and what makes a reply to each of them a good one."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from imgfs.errors import ProtocolViolation
from imgfs.sources.nbd.errors import (
    REPLIES,
    STATUS_REPLIES,
    WRITE_REPLIES,
    Replies,
    reply_error,
)

ALLOCATION = "base:allocation"

#: Told once, with None or with what went wrong: an ImgfsError, or Broken.
Done = Callable[[Exception | None], None]


class Issuer(Protocol):
    """The connection, as a request knows it."""

    where: str

    def answered(self, request: Request) -> None:
        """It has its answer, and is about to tell."""


class Request:
    """A command that was issued.  Its methods are libnbd's callbacks, and raise nothing."""

    __slots__ = ("_connection", "_done", "problem", "what")
    replies: ClassVar[Replies] = REPLIES

    def __init__(self, connection: Issuer, what: str, done: Done) -> None:
        self.what = what
        self.problem: str | None = None  # what the server did wrong
        self._connection = connection
        self._done: Done | None = done

    def completed(self, error: Any) -> int:
        """libnbd's completion callback.  1: the command can be forgotten."""
        where, number = self._connection.where, error.value
        if number == errno.ENOTCONN:
            pass  # the connection is lost, and why is known in a moment: then `end` is called
        elif self.is_error(number):
            self.end(reply_error(where, self.what, number, self.replies))
        else:
            problem = self.problem or self.missing()
            self.end(ProtocolViolation(f"{where}: {self.what}: {problem}") if problem else None)
        return 1

    def is_error(self, number: int) -> bool:
        """Does this errno, 0 for none, say that the command failed?"""
        return bool(number)

    def missing(self) -> str | None:
        """What the reply should have had and has not."""
        return None

    def end(self, error: Exception | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            self._connection.answered(self)
            done(error)


class Read(Request):
    """A read, which proves that the server sent each byte once.

    libnbd itself counts bytes only where it is not asked through a callback, and never notices that
    some came twice and others not at all: those would be zeroes.
    """

    __slots__ = ("_got", "_left", "_offset")

    def __init__(self, connection: Issuer, offset: int, length: int, done: Done) -> None:
        super().__init__(connection, f"read of {length} bytes at {offset}", done)
        self._offset = offset
        self._left = length
        self._got: list[tuple[int, int]] = []

    def chunk(self, data: Any, offset: int, status: int, error: Any) -> int:
        length = len(data)
        if status == 3 or self.problem:  # READ_ERROR: the completion has its number
            return 0
        if not length or length > self._left:
            self.problem = "the server sent bytes twice" if length else "the server sent nothing"
        else:
            self._left -= length
            if self._left or self._got:  # most replies are one piece, and need no list
                self._got.append((offset, offset + length))
        return 0

    def missing(self) -> str | None:
        if self._left:
            return f"the server left {self._left} bytes out"
        at = self._offset
        for start, end in sorted(self._got):
            if start != at:
                return "the server sent bytes twice, and left others out"
            at = end
        return None


class Status(Request):
    """A block status; `entries` are base:allocation's lengths and flags by turns, unchecked.

    The last extent may go beyond the end of the export.  libnbd 1.18 and later cut it there, and
    give it with an EPROTO, which is the command's error, too.
    """

    __slots__ = ("_is_cut", "_left", "entries")
    replies = STATUS_REPLIES

    def __init__(self, connection: Issuer, offset: int, length: int, left: int, done: Done) -> None:
        """`left`: bytes from `offset` to the end of the export."""
        super().__init__(connection, f"block status of {length} bytes at {offset}", done)
        self.entries: list[int] | None = None
        self._left = left
        self._is_cut = False

    def extent(self, context: str, offset: int, entries: list[int], error: Any) -> int:
        if context == ALLOCATION:
            if self.entries is not None:
                self.problem = "the server answered twice"
            self.entries = entries
            lengths = entries[::2]
            is_to_the_end = 0 not in lengths and sum(lengths) == self._left
            self._is_cut = error.value == errno.EPROTO and is_to_the_end
        return 0

    def is_error(self, number: int) -> bool:
        return bool(number) and not (number == errno.EPROTO and self._is_cut)

    def missing(self) -> str | None:
        return None if self.entries else "the server described nothing"


class Change(Request):
    """A write, a write of zeroes, or a flush: its reply has nothing but the errno."""

    __slots__ = ()
    replies = WRITE_REPLIES
