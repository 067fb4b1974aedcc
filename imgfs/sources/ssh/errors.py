"""asyncssh's exceptions as imgfs's: one literal table, used where they enter."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import asyncssh

from imgfs.errors import (
    AccessDenied,
    AlreadyThere,
    HostKeyError,
    ImgfsError,
    LoginRefused,
    NoSpace,
    NotAnImage,
    ProtocolViolation,
    ReadOnlyView,
    SourceNotFound,
    SourceTimeout,
    SourceUnreachable,
    UnsupportedFeature,
    UsageError,
)
from imgfs.sources.base import Broken

#: What an exception means.  The first that fits counts; {} is its own text.
Table = tuple[tuple[type[Exception], type[ImgfsError], str], ...]

#: What a server says of a file.
FILE_ERRORS: Table = (
    (asyncssh.SFTPNoSuchFile, SourceNotFound, "no such file"),
    (asyncssh.SFTPNoSuchPath, SourceNotFound, "no such file"),
    (asyncssh.SFTPNotADirectory, SourceNotFound, "no such file"),
    (asyncssh.SFTPPermissionDenied, AccessDenied, "permission denied"),
    (
        asyncssh.SFTPFileIsADirectory,
        NotAnImage,
        "is a directory; for all images in it write a / at its end",
    ),
    (asyncssh.SFTPNoSpaceOnFilesystem, NoSpace, "no space is left on the server's disk"),
    (asyncssh.SFTPQuotaExceeded, NoSpace, "the quota on the server is used up"),
    (asyncssh.SFTPWriteProtect, ReadOnlyView, "lies on a read-only filesystem"),
    (asyncssh.SFTPFileAlreadyExists, AlreadyThere, "is there already"),
    (asyncssh.SFTPOpUnsupported, UnsupportedFeature, "the server cannot do that ({})"),
    (asyncssh.SFTPBadMessage, ProtocolViolation, "the server broke the SFTP protocol ({})"),
    (asyncssh.SFTPError, ImgfsError, "the server failed ({})"),
)

REFUSED = "the server refused the login; load the key into the agent, "
REFUSED += "or name it with -o key="

#: Where known hosts have another key for it, which is no reason to connect by another way.
ANOTHER_KEY = "the host key is ANOTHER ONE than is known of this host: somebody may be in between, "
ANOTHER_KEY += "or the host was set up anew; ask who runs it before `ssh-keygen -R`"

#: What ends a login for good: trying again would give the same answer.
LOGIN_ERRORS: Table = (
    (
        asyncssh.HostKeyNotVerifiable,
        HostKeyError,
        "the host key is not trusted ({}); connect once with ssh, "
        "or name a file with -o known_hosts=",
    ),
    (asyncssh.PermissionDenied, LoginRefused, REFUSED),
    (asyncssh.KeyExchangeFailed, UnsupportedFeature, "no algorithm in common with the server ({})"),
    (asyncssh.ProtocolNotSupported, ProtocolViolation, "does not speak SSH 2 ({})"),
    (asyncssh.ProtocolError, ProtocolViolation, "the server broke the SSH protocol ({})"),
    (asyncssh.IllegalUserName, UsageError, "not a user name ({})"),
    (asyncssh.ChannelOpenError, UnsupportedFeature, "the server has no SFTP ({})"),
    (asyncssh.KeyImportError, UsageError, "a key cannot be used ({})"),
    (asyncssh.KeyEncryptionError, UsageError, "a key's passphrase is missing or wrong ({})"),
    (asyncssh.ConfigParseError, UsageError, "the ssh configuration cannot be read ({})"),
)

_LOST = (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection)


def reason(exc: Exception) -> str:
    """The exception's own words, on one line."""
    text = str(getattr(exc, "reason", "") or getattr(exc, "strerror", "") or exc)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _meaning(table: Table, name: str, exc: Exception) -> ImgfsError | None:
    for foreign, own, text in table:
        if isinstance(exc, foreign):
            return own(f"{name}: {text.format(reason(exc))}")
    return None


@contextlib.contextmanager
def file_errors(name: str) -> Iterator[None]:
    """For requests about a file.  Raises ImgfsError, or Broken when the connection is gone."""
    try:
        yield
    except _LOST as exc:
        raise Broken(SourceUnreachable(f"{name}: the connection was lost")) from exc
    except asyncssh.SFTPError as exc:
        if (error := _meaning(FILE_ERRORS, name, exc)) is not None:
            raise error from exc
        raise
    except (asyncssh.Error, OSError) as exc:
        said = f"{name}: the connection was lost ({reason(exc)})"
        raise Broken(SourceUnreachable(said)) from exc
    except asyncssh.packet.PacketDecodeError as exc:
        raise ProtocolViolation(f"{name}: the server broke the SFTP protocol ({exc})") from exc


@contextlib.contextmanager
def login_errors(where: str) -> Iterator[None]:
    """For connecting.  Raises ImgfsError for good, or Broken when a later attempt may succeed."""
    try:
        yield
    except TimeoutError as exc:
        raise Broken(SourceTimeout(f"{where}: does not answer")) from exc
    except socket.gaierror as exc:
        raise Broken(SourceUnreachable(f"{where}: host not found ({reason(exc)})")) from exc
    except (asyncssh.Error, OSError, ValueError) as exc:
        if "authentication failures" in str(exc):  # OpenSSH says so with a protocol error
            raise LoginRefused(f"{where}: {REFUSED}") from exc
        if (error := _meaning(LOGIN_ERRORS, where, exc)) is not None:
            raise error from exc
        if isinstance(exc, FileNotFoundError | PermissionError) and exc.filename:
            raise UsageError(f"{exc.filename}: {reason(exc)}") from exc
        if isinstance(exc, ValueError):
            raise UsageError(f"{where}: {reason(exc)}") from exc
        raise Broken(SourceUnreachable(f"{where}: {reason(exc)}")) from exc
