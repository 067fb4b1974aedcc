"""What a person names as a SOURCE: a path, or ssh://[user@]host[:port]/path."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes, urlsplit

from imgfs.errors import UsageError


@dataclass(frozen=True, slots=True)
class SshUrl:
    """A file behind ssh: an absolute path of any bytes; None is ssh's own default."""

    user: str | None
    host: str
    port: int | None
    path: bytes

    @property
    def text(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        port = f":{self.port}" if self.port else ""
        return f"ssh://{user}{host}{port}{self.path.decode('utf-8', 'surrogateescape')}"

    @property
    def basename(self) -> str:
        return posixpath.basename(self.path).decode("utf-8", "surrogateescape")


def parse(text: str) -> SshUrl | str:
    """An SshUrl, or the local path as it is.  Raises UsageError with what to write instead."""
    if "://" not in text:
        return text
    scheme = text.partition("://")[0]
    if scheme != "ssh":
        raise UsageError(f"{text}: {scheme}:// sources are not supported yet; use ssh:// or a path")
    try:
        parts = urlsplit(text)
        port, host = parts.port, parts.hostname
    except ValueError as exc:
        raise UsageError(f"{text}: not a URL ({exc})") from None
    if parts.password is not None:
        raise UsageError("a password does not belong into a URL; use a key or the ssh agent")
    # A file name may hold ? and #; nothing else is meant by them here.
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    path += f"#{parts.fragment}" if parts.fragment else ""
    if not host or path in ("", "/"):
        raise UsageError(f"{text}: write it as ssh://[user@]host[:port]/path")
    return SshUrl(
        parts.username, host, port, unquote_to_bytes(path.encode("utf-8", "surrogateescape"))
    )
