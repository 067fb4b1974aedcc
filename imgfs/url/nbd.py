"""NBD's URLs, and the words of a command that serves NBD.

The forms are those of the NBD URI specification (doc/uri.md of the NetworkBlockDevice project)
with libnbd's additions: nbd+vsock, and the parameters tls-certificates and tls-psk-file.  What
would be silently without effect is refused: a parameter nobody knows, or one about TLS without TLS.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, quote_from_bytes, unquote_to_bytes

from imgfs.errors import UsageError
from imgfs.url.text import one_line, port_number, shown

COMMAND = "nbd+command"
SCHEMES = frozenset({"nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock"})

MOST_NAME = 4096  # bytes of an export's name: proto.md, "String values"
MOST_SOCKET = 107  # bytes of a path in a sockaddr_un
MOST_CID = (1 << 32) - 1
MOST_VSOCK_PORT = (1 << 31) - 1  # libxml2 keeps it in an int

_AUTHORITY = re.compile(r"(?:(?P<user>[^@]*)@)?(?P<host>\[[^\]]*\]|[^:\[\]@]*)(?::(?P<port>.*))?")
_TLS = ("tls-certificates", "tls-psk-file", "tls-hostname", "tls-verify-peer", "tls-type")
_TYPES = ("x509", "psk")
#: What an export's name shows as it is.  ? and # would end it.
_PLAIN = "/:@!$&'()*+,;=-._~"


@dataclass(frozen=True, slots=True)
class NbdUrl:
    """An export of an NBD server.  Paths of local files are absolute.

    `transport` is `tcp`, `unix` or `vsock`.  `host` is a name or an address, for vsock a number or
    empty (the hypervisor).  `verify_peer` is None where it was not said.
    """

    transport: str
    tls: bool
    user: str | None
    host: str
    port: int | None
    export: bytes
    socket: bytes | None = None
    certificates: str | None = None
    psk_file: str | None = None
    tls_hostname: str | None = None
    verify_peer: bool | None = None

    @property
    def text(self) -> str:
        """The URL; one printable line, and `parse` gives this object for it."""
        more: list[str] = []
        if self.socket is not None:
            more.append(f"socket={quote_from_bytes(self.socket)}")
        for name, value in (
            ("tls-certificates", self.certificates),
            ("tls-psk-file", self.psk_file),
            ("tls-hostname", self.tls_hostname),
            ("tls-verify-peer", None if self.verify_peer is None else str(int(self.verify_peer))),
        ):
            if value is not None:
                more.append(f"{name}={quote_from_bytes(os.fsencode(value))}")
        query = "?" + "&".join(more) if more else ""
        return f"{self._start}/{shown(self.export, _PLAIN)}{query}"

    @property
    def uri(self) -> str:
        """As libnbd is given it: in ASCII, and without what it does not know."""
        more: list[str] = []
        for name, value in (
            ("socket", self.socket),
            ("tls-certificates", self.certificates and os.fsencode(self.certificates)),
            ("tls-psk-file", self.psk_file and os.fsencode(self.psk_file)),
        ):
            if value:
                more.append(f"{name}={quote_from_bytes(value)}")
        query = "?" + "&".join(more) if more else ""
        return f"{self._start}/{quote_from_bytes(self.export)}{query}"

    @property
    def where(self) -> str:
        """The server, for messages."""
        if self.socket is not None:
            return one_line(os.fsdecode(self.socket))
        return self._start.rpartition("//")[2].rpartition("@")[2] or "vsock"

    @property
    def basename(self) -> str:
        """The export's name, of one with slashes the last part; `disk` when there is none."""
        name = os.fsdecode(self.export.rstrip(b"/").rpartition(b"/")[2])
        return "disk" if name in ("", ".", "..") else name

    @property
    def _start(self) -> str:
        scheme = "nbds" if self.tls else "nbd"
        scheme += "" if self.transport == "tcp" else "+" + self.transport
        host = f"[{quote(self.host, safe=':')}]" if ":" in self.host else quote(self.host)
        user = quote_from_bytes(os.fsencode(self.user), safe="") + "@" if self.user else ""
        port = f":{self.port}" if self.port else ""
        return f"{scheme}://{user}{host}{port}"


@dataclass(frozen=True, slots=True)
class NbdCommand:
    """A server to be started: its words are executed as they are, by no shell."""

    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """What `parse` gives this object for."""
        return f"{COMMAND}:{shlex.join(self.words)}"

    @property
    def name(self) -> str:
        """For messages: without the arguments, which may hold secrets."""
        return one_line(f"{COMMAND}:{Path(self.words[0]).name}")

    @property
    def basename(self) -> str:
        return "disk"


def parse_command(text: str) -> NbdCommand:
    """The part behind `nbd+command:`, quoted as in a shell.  Raises UsageError."""
    try:
        words = tuple(shlex.split(text))
    except ValueError as exc:
        raise UsageError(f"{COMMAND}: {str(exc).lower()}") from None
    if not words or not words[0] or "\0" in text:
        raise UsageError(f"{COMMAND}: no command; write it as {COMMAND}:'nbdkit file disk.img'")
    return NbdCommand(words)


def parse_nbd(scheme: str, text: str, rest: str) -> NbdUrl:
    """The URL `text`, of which `rest` comes after `scheme://`.  Raises UsageError."""
    tls, transport = scheme.startswith("nbds"), scheme.partition("+")[2] or "tcp"
    if "#" in rest:
        raise UsageError(f"{one_line(text)}: a # in an export's name is written %23")
    before, _, query = rest.partition("?")
    authority, _, path = before.partition("/")
    found = _AUTHORITY.fullmatch(authority)
    if ":" in authority.rpartition("@")[0]:
        raise UsageError("a password does not belong into a URL; use tls-psk-file=")
    if found is None:
        raise UsageError(f"{one_line(text)}: not a host; write it as {scheme}://host[:port]/export")
    user, host = found["user"], os.fsdecode(unquote_to_bytes(found["host"].strip("[]")))
    export = _bytes(text, path)
    if len(export) > MOST_NAME:
        raise UsageError(f"{scheme}: an export's name has at most {MOST_NAME} bytes")
    values = _parameters(text, query)
    if values and not tls and (extra := [name for name in values if name in _TLS]):
        form = scheme.replace("nbd", "nbds", 1)
        raise UsageError(f"{one_line(text)}: {extra[0]} needs TLS; write it as {form}://…")
    socket = _socket(text, scheme, transport, values.get("socket"), authority)
    most = MOST_VSOCK_PORT if transport == "vsock" else 65535
    port = port_number(text, found["port"], most)
    if transport == "vsock" and host and not (_is_number(host) and int(host) <= MOST_CID):
        raise UsageError(f"{one_line(text)}: a vsock host is a number (a CID), or left out")
    if transport == "tcp" and (not host or not host.isprintable() or " " in host):
        raise UsageError(f"{one_line(text)}: no host; write it as {scheme}://host[:port]/export")
    if user and not tls:
        raise UsageError(f"{one_line(text)}: a user name needs TLS")
    return NbdUrl(
        transport=transport,
        tls=tls,
        user=os.fsdecode(_bytes(text, user)) if user else None,
        host=host,
        port=port,
        export=export,
        socket=socket,
        certificates=_path(values.get("tls-certificates")),
        psk_file=_path(values.get("tls-psk-file")),
        tls_hostname=os.fsdecode(values["tls-hostname"]) if "tls-hostname" in values else None,
        verify_peer=_verify(text, values),
    )


def _parameters(text: str, query: str) -> dict[str, bytes]:
    values: dict[str, bytes] = {}
    for item in query.split("&") if query else ():
        name, _, value = item.partition("=")
        if name not in ("socket", *_TLS):
            # The specification wants them diagnosed.
            raise UsageError(f"{one_line(text)}: unknown parameter {one_line(name)!r}")
        if name in values:
            raise UsageError(f"{one_line(text)}: {name} is given twice")
        values[name] = _bytes(text, value)
        if not value:
            raise UsageError(f"{one_line(text)}: {name} has no value")
    kind = values.get("tls-type")
    if kind is not None and kind != (b"psk" if "tls-psk-file" in values else b"x509"):
        known = os.fsdecode(kind)
        hint = "needs tls-psk-file=" if known == "psk" else f"is one of {', '.join(_TYPES)}"
        if known == "x509":
            hint = "and tls-psk-file= exclude each other"
        raise UsageError(f"{one_line(text)}: tls-type={one_line(known)} {hint}")
    return values


def _socket(
    text: str, scheme: str, transport: str, path: bytes | None, authority: str
) -> bytes | None:
    if transport != "unix":
        if path is not None:
            form = scheme.partition("+")[0] + "+unix"
            raise UsageError(f"{one_line(text)}: with socket= it is written {form}:///…")
        return None
    if path is None:
        raise UsageError(f"{one_line(text)}: no socket; write {scheme}:///export?socket=PATH")
    if authority.rpartition("@")[2]:
        raise UsageError(f"{one_line(text)}: a host and a socket; write {scheme}:///…?socket=…")
    if not path.startswith(b"/"):
        path = os.fsencode(Path(os.fsdecode(path)).absolute())
    if len(path) > MOST_SOCKET:
        raise UsageError(f"{one_line(text)}: a socket's path has at most {MOST_SOCKET} bytes")
    return path


def _verify(text: str, values: dict[str, bytes]) -> bool | None:
    said = values.get("tls-verify-peer")
    if said is None:
        return None
    if said not in (b"0", b"1"):
        raise UsageError(f"{one_line(text)}: tls-verify-peer is 0 or 1")
    return said == b"1"


def _path(value: bytes | None) -> str | None:
    # Absolute, because the process leaves its directory.
    return None if value is None else str(Path(os.fsdecode(value)).absolute())


def _bytes(text: str, part: str) -> bytes:
    value = unquote_to_bytes(os.fsencode(part))
    if b"\0" in value:
        raise UsageError(f"{one_line(text)}: no name can hold %00, and no abstract socket is known")
    return value


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 12
