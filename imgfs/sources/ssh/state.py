"""The state of a file behind ssh, and which states are certainly not the same."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import Any

from imgfs.errors import ProtocolViolation
from imgfs.sources.base import Identity, SourceStat
from imgfs.sources.ssh.helper import Token

NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class State:
    """What the server says of the file: SFTP's attributes and the helper's token."""

    size: int  # as SFTP has it: 0 for a device
    mtime_s: int
    mode: int
    token: Token | None

    def is_another(self, other: State) -> bool:
        """Are these certainly states of different files, whatever was written to them?"""
        ours, theirs = self.token, other.token
        if ours is None or theirs is None or not (ours.exact and theirs.exact):
            return False
        return ours.file != theirs.file

    def differs(self, other: State) -> bool:
        """Are these certainly states of different files, or of different times?"""
        if (self.size, self.mtime_s) != (other.size, other.mtime_s):
            return True
        ours, theirs = self.token, other.token
        if ours is None or theirs is None or ours.exact != theirs.exact:
            return False
        return ours != theirs

    @property
    def is_told_alike(self) -> bool:
        """Does the helper's token say what SFTP says?"""
        token = self.token
        if token is None or not token.exact:
            return False
        return (token.size, token.mtime_ns // NS) == (self.size, self.mtime_s)

    def as_stat(self) -> SourceStat:
        mode, token = stat.S_IMODE(self.mode) & 0o777, self.token
        if token is not None and token.exact:
            identity = Identity("stat", token.text)
            return SourceStat(token.size, token.mtime_ns, mode, identity, token.ctime_ns)
        identity = Identity("sftp", f"{self.size}:{self.mtime_s}")
        return SourceStat(self.size, self.mtime_s * NS, mode, identity)


def state_of(attrs: Any, token: Token | None) -> State:
    if attrs.size is None or attrs.mtime is None:
        raise ProtocolViolation("the server does not tell the file's size and mtime")
    return State(attrs.size, attrs.mtime, attrs.permissions or 0, token)
