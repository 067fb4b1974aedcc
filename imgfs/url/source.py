"""What a person names as a SOURCE: a path, ssh://[user@]host[:port]/path, http(s):// or s3://.

NBD's URLs are in imgfs.url.nbd.

`ssh://host/~/x` is relative to the home directory on the server, as in git; a path that really
begins with /~ is written /%7E.  Names may hold any bytes but NUL: those that are not UTF-8 are
surrogates in text (os.fsencode undoes it) and %XX in a URL.

A URL of http or https goes to the server as it was written, query and all; only what no URL may
hold is encoded.  A query may be a signature, so it is never shown.  `s3://bucket/key` is as
`ssh://host/path`: %XX is decoded, and ? and # belong to the key.
"""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass
from urllib.parse import quote_from_bytes, unquote_to_bytes

from imgfs.errors import UsageError
from imgfs.url.nbd import COMMAND, SCHEMES, NbdCommand, NbdUrl, parse_command, parse_nbd
from imgfs.url.text import one_line as _line
from imgfs.url.text import port_number as _port
from imgfs.url.text import shown as _shown

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_AUTHORITY = re.compile(r"(?:(?P<user>[^@]*)@)?(?P<host>\[[^\]]*\]|[^:\[\]]*)(?::(?P<port>.*))?")
_SCP_LIKE = re.compile(r"(?:[^\s/:@]+@)?[^\s/:@]{2,}:.*", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_FORM = "write it as ssh://[user@]host[:port]/path"
#: What of http's URLs stays as it was written.
_KEPT = "".join(chr(c) for c in range(0x21, 0x7F) if chr(c) not in '"<>\\^`{|}#')


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


@dataclass(frozen=True, slots=True)
class ObjectUrl:
    """A file at a web server (`http`, `https`), or an object in a bucket (`s3`).

    `host` is the bucket for s3.  `path` begins with a slash; for http it is percent-encoded, for s3
    it is not.  `query` is without its ?, and secret.
    """

    scheme: str
    host: str
    port: int | None
    path: str
    query: str | None = None

    @property
    def text(self) -> str:
        """One printable line without a secret; what there is of a query is only hinted at."""
        path = _shown(os.fsencode(self.path)) if self.scheme == "s3" else self.path
        return self._before_path + path + ("?..." if self.query is not None else "")

    @property
    def address(self) -> str:
        """For http: the whole URL as the server gets it, secrets and all."""
        query = "" if self.query is None else f"?{self.query}"
        return self._before_path + self.path + query

    @property
    def is_directory(self) -> bool:
        """Does it name a prefix, all images under which are meant?"""
        return self.scheme == "s3" and self.path.endswith("/")

    @property
    def key(self) -> str:
        """For s3: the object's name in its bucket."""
        return self.path[1:]

    @property
    def basename(self) -> str:
        """The last component's name, decoded; empty for a directory."""
        if self.scheme == "s3":
            return posixpath.basename(self.path)
        return os.fsdecode(posixpath.basename(unquote_to_bytes(self.path)))

    @property
    def _before_path(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + (f":{self.port}" if self.port else "")


def parse(text: str) -> SshUrl | ObjectUrl | NbdUrl | NbdCommand | str:
    """What the text means; a local path stays as it is.

    Raises UsageError with what to write instead.
    """
    if text.startswith(COMMAND + ":"):
        return parse_command(text[len(COMMAND) + 1 :])
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
    if name in ("http", "https"):
        return _parse_http(name, text[scheme.end() :])
    if name == "s3":
        return _parse_s3(text, text[scheme.end() :])
    if name in SCHEMES:
        return parse_nbd(name, text, text[scheme.end() :])
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


def _parse_http(scheme: str, rest: str) -> ObjectUrl:
    # Nothing of the text is repeated in an error: there may be a secret in it.
    form = f"write it as {scheme}://host[:port]/path"
    # As in every browser; and only before the query may there be a host.
    authority = re.match(r"[^/?#]*", rest.replace("\\", "/"))
    assert authority is not None
    if "@" in authority[0]:
        raise UsageError(
            "a user or password does not belong into a URL; "
            "an Authorization header can be given in IMGFS_HTTP_AUTHORIZATION"
        )
    found = _AUTHORITY.fullmatch(authority[0])
    if found is None or not found["host"].strip("[]") or not _is_plain(authority[0]):
        raise UsageError(f"{scheme}://: not a host; {form}")
    path, question, query = rest[authority.end() :].partition("?")
    if "#" in path or "#" in query:
        raise UsageError(f"{scheme}://: a # in a name is written %23")
    decoded = unquote_to_bytes(os.fsencode(path))
    if not path.startswith("/"):
        raise UsageError(f"{scheme}://: names no file; {form}")
    if b"\0" in decoded or posixpath.basename(decoded) in (b"", b".", b".."):
        raise UsageError(f"{scheme}://: names no file; {form}")
    return ObjectUrl(
        scheme,
        found["host"].strip("[]"),
        _port(f"{scheme}://", found["port"]),
        quote_from_bytes(os.fsencode(path), safe=_KEPT),
        quote_from_bytes(os.fsencode(query), safe=_KEPT) if question else None,
    )


def _parse_s3(text: str, rest: str) -> ObjectUrl:
    bucket, _, key = rest.partition("/")
    if "@" in bucket or ":" in bucket:
        raise UsageError(
            "credentials and endpoints do not belong into a URL; they are taken from "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL in the environment"
        )
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"{_line(text)}: not a bucket; write it as s3://bucket/key")
    try:
        name = unquote_to_bytes(os.fsencode(key)).decode()
    except UnicodeDecodeError:
        raise UsageError(f"{_line(text)}: a key in S3 is in UTF-8") from None
    parts = name.removesuffix("/").split("/") if name else []
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise UsageError(f"{_line(text)}: keys with // or a part . or .. are not supported")
    return ObjectUrl("s3", bucket, None, "/" + name)


def _is_plain(host: str) -> bool:
    return all(c.isprintable() and c not in ' "<>\\^`{|}%' for c in host)
