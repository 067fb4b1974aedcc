"""How to reach an ssh server; apart, so that the options need no asyncssh."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SshSettings:
    """What overrides ~/.ssh; `timeout_s` is how long an absent server is waited for."""

    timeout_s: float = 30.0
    known_hosts: str | None = None
    identity: str | None = None
    extents: bool = True
