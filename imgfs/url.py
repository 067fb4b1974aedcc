"""What a person names as a SOURCE: a path, or ssh://[user@]host[:port]/path.

`ssh://host/~/x` is relative to the home directory on the server, as in git; a path that really
begins with /~ is written /%7E.  Names may hold any bytes but NUL: those that are not UTF-8 are
surrogates in text (os.fsencode undoes it) and %XX in a URL.
"""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass
from urllib.parse import quote_from_bytes, unquote_to_bytes

from imgfs.errors import UsageError

_LATER = frozenset({"nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock"})
_LATER |= {"http", "https", "s3"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_AUTHORITY = re.compile(r"(?:(?P<user>[^@]*)@)?(?P<host>\[[^\]]*\]|[^:\[\]]*)(?::(?P<port>.*))?")
_SCP_LIKE = re.compile(r"(?:[^\s/:@]+@)?[^\s/:@]{2,}:.*", re.DOTALL)
_FORM = "write it as ssh://[user@]host[:port]/path"
#: What a URL shows as it is: everything printable in ASCII but %, which would be decoded again.
_PLAIN = "".join(chr(c) for c in range(0x21, 0x7F) if chr(c) != "%")


@dataclass(frozen=True, slots=True)
class SshUrl:
    """A file behind ssh.  `path` is absolute, or relative to the home directory there.

    `user` and `port` are None where ssh's own configuration decides.
    """

    user: str | None
    host: str
    port: int | None
    path: bytes

    @property
    def text(self) -> str:
        """The URL; one printable line without a secret, and `parse` gives this object for it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = quote_from_bytes(os.fsencode(self.user), safe="") + "@" if self.user else ""
        port = f":{self.port}" if self.port else ""
        if not self.path.startswith(b"/"):
            path = "/~/" + _shown(self.path)
        elif self.path.startswith(b"/~"):
            path = "/%7E" + _shown(self.path[2:])
        else:
            path = _shown(self.path)
        return f"ssh://{user}{host}{port}{path}"

    @property
    def is_directory(self) -> bool:
        """Does it name a directory, all images of which are meant?  Written with a / at the end."""
        return self.path.endswith(b"/")

    @property
    def basename(self) -> str:
        """The last component's name."""
        return os.fsdecode(posixpath.basename(self.path.rstrip(b"/")))


def parse(text: str) -> SshUrl | str:
    """An SshUrl, or the local path as it is.  Raises UsageError with what to write instead."""
    scheme = _SCHEME.match(text)
    if scheme is None:
        if _SCP_LIKE.fullmatch(text) and not os.path.lexists(text):
            host, _, path = text.partition(":")
            hint = f"ssh://{host}/{path.lstrip('/') if path.startswith('/') else '~/' + path}"
            raise UsageError(f"{_line(text)}: no such file; if it is on a server: {_line(hint)}")
        if not text or "\0" in text:
            raise UsageError("a source needs a name")
        return text
    name = scheme[1].lower()
    if name in _LATER:
        raise UsageError(f"{name}:// sources are not supported yet; use ssh:// or a path")
    if name != "ssh":
        raise UsageError(f"{name}:// sources are not supported; use ssh:// or a path")
    return _parse_ssh(text, text[scheme.end() :])


def _parse_ssh(text: str, rest: str) -> SshUrl:
    # Not urlsplit: it drops newlines and tabs, and a name may hold those, and ? and # as well.
    authority, slash, path = rest.partition("/")
    found = _AUTHORITY.fullmatch(authority)
    if found is None:
        raise UsageError(f"{_line(text)}: not a host; {_FORM}")
    user, host, port = found["user"], found["host"].strip("[]"), found["port"]
    if user is not None and ":" in user:
        raise UsageError("a password does not belong into a URL; use a key or the ssh agent")
    if not host or host.startswith("-") or not slash or path in ("", "~", "~/"):
        raise UsageError(f"{_line(text)}: no host or no path; {_FORM}")
    if path.startswith("~") and not path.startswith("~/"):
        raise UsageError(f"{_line(text)}: only ~/ is known; a name that begins with ~ is %7E…")
    raw = unquote_to_bytes(os.fsencode(path[2:] if path.startswith("~/") else "/" + path))
    if b"\0" in raw or (path.startswith("~/") and raw.startswith(b"/")):
        raise UsageError(f"{_line(text)}: no file can have that name")
    decoded = os.fsdecode(unquote_to_bytes(os.fsencode(user))) if user else None
    return SshUrl(decoded, host, _port(text, port), raw)


def _port(text: str, port: str | None) -> int | None:
    if not port:
        return None
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise UsageError(f"{_line(text)}: not a port number")
    return int(port[:6])


def _shown(path: bytes) -> str:
    """Percent-encoded where it must be; letters of all alphabets stay readable."""
    pieces = (
        c if c.isprintable() and c.isalnum() else quote_from_bytes(os.fsencode(c), safe=_PLAIN)
        for c in os.fsdecode(path)
    )
    return "".join(pieces)


def _line(text: str) -> str:
    """On one printable line."""
    return "".join(c if c.isprintable() else "?" for c in text)
