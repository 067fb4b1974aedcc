"""How to use an NBD server; apart, so that the options need no libnbd."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NbdSettings:
    """`timeout_s` is how long an absent or silent server is waited for.

    `pin` is the person's word that the export is the same image for as long as it is given, also
    after a new connection: NBD itself has nothing to tell one state of an image from another.
    """

    timeout_s: float = 30.0
    extents: bool = True  #: ask for base:allocation
    pin: str | None = None
    write: bool = False
    connections: int = 4  #: at most, where the server allows several
    depth: int = 64  #: requests in flight on all of them
