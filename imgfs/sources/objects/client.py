"""What reads an object at a server, request by request."""

from __future__ import annotations

from typing import Protocol

from imgfs.sources.objects.settings import ObjectSettings
from imgfs.sources.objects.state import State

PIECE = 2 << 20  # bytes of one request, at most
SLOWEST = 8 << 10  # bytes a second: what trickles more slowly is a server that does not answer

#: Bytes, and what their answer says of the object.
Got = tuple[bytes, State]


def longest_s(length: int, settings: ObjectSettings) -> float:
    """Seconds that an answer of so many bytes may take."""
    return settings.timeout_s + length / SLOWEST


class Client(Protocol):
    """All methods run on the bridge's loop; `by` is the loop's time when an answer must have begun.

    They raise ImgfsError for good, or Again, Mismatch, NoSuchRange, Undecodable (errors.py).
    """

    async def get(self, offset: int, length: int, by: float, if_match: State | None) -> Got:
        """The range, or its beginning if the server sends no more: one byte at least.

        With `if_match` the server is to answer only if the object's ETag is that state's.
        """

    async def probe(self, by: float) -> State:
        """The object's state, and the proof that it can be read piece by piece."""

    async def head(self, by: float) -> State:
        """The object's state without any of its bytes."""
