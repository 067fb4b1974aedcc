"""How to reach an ssh server; apart, so that the options need no asyncssh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

#: What may tell extents and exact identity on the server, tried in this order.
HELPERS = ("python3", "perl", "qemu-img")

#: Given a question ("password of a@b: "), its answer; None: there is nobody to ask.
Prompt = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class SshSettings:
    """What overrides ~/.ssh; `timeout_s` is how long an absent or silent server is waited for."""

    timeout_s: float = 30.0
    known_hosts: str | None = None
    identity: str | tuple[str, ...] | None = None  #: private key files, instead of the default ones
    config: str | None = None  #: instead of ~/.ssh/config
    extents: bool = True  #: ask the server for extents and exact identity
    helpers: tuple[str, ...] = HELPERS
    depth: int = 512  #: requests in flight on one connection, at most
    prompt: Prompt | None = field(default=None, compare=False, repr=False)
