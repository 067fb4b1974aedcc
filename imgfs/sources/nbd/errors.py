"""libnbd's errors as imgfs's: literal tables, used where they enter.

libnbd has an errno and a text for what goes wrong with a connection, and of a reply only the errno,
which it made from NBD's own number (proto.md, "Error values").
"""

from __future__ import annotations

import errno
import os
from typing import Any

from imgfs.errors import (
    AccessDenied,
    ImgfsError,
    NoSpace,
    ProtocolViolation,
    SourceNotFound,
    SourceUnreachable,
    UnsupportedFeature,
)
from imgfs.sources.base import Broken
from imgfs.url.text import one_line

MISSING = "NBD needs the nbd module of libnbd: install the package python3-libnbd"


def library() -> Any:
    """libnbd's module.  Raises UnsupportedFeature when it is not installed."""
    try:
        import nbd
    except ImportError as exc:
        raise UnsupportedFeature(MISSING) from exc
    return nbd


Replies = dict[int, tuple[type[ImgfsError], str]]

#: What a request is refused with.  Neither EINVAL nor EOVERFLOW fits what imgfs sends: in bounds,
#: aligned, and no longer than the server allows.
REPLIES: Replies = {
    errno.EPERM: (AccessDenied, "the server does not permit it"),
    errno.EIO: (ImgfsError, "the server cannot read it"),
    errno.ENOMEM: (ImgfsError, "the server is out of memory"),
    errno.ENOSPC: (ImgfsError, "the server is out of space"),
    errno.EINVAL: (ProtocolViolation, "the server takes a good request for an invalid one"),
    errno.EOVERFLOW: (ProtocolViolation, "the server takes a good request for too long"),
    errno.ENOTSUP: (UnsupportedFeature, "the server cannot do that"),
    errno.EPROTO: (ProtocolViolation, "the server broke the NBD protocol"),
}

#: Of a block status alone: it may be as long as a number of 32 bits tells, but not every server
#: has heard of that.
STATUS_REPLIES: Replies = REPLIES | {
    errno.EINVAL: (UnsupportedFeature, "the server refuses it as invalid"),
    errno.EOVERFLOW: (UnsupportedFeature, "the server refuses it as too long"),
}

WRITE_REPLIES: Replies = REPLIES | {
    errno.EIO: (ImgfsError, "the server cannot write it"),
    errno.ENOSPC: (NoSpace, "the server is out of space"),
}

#: The connection is gone: by these another one may help.
_LOST = frozenset({errno.ENOTCONN, errno.ESHUTDOWN})


def reply_error(where: str, what: str, number: int, replies: Replies = REPLIES) -> Exception:
    """What a reply's errno means: an ImgfsError, or Broken."""
    if number in _LOST:
        why = "the connection was lost" if number == errno.ENOTCONN else "the server shuts down"
        return Broken(SourceUnreachable(f"{where}: {why}"))
    kind, text = replies.get(number, (ImgfsError, os.strerror(number)))
    return kind(f"{where}: {what}: {text}")


#: NBD_OPT_GO's refusals, by the errno that libnbd makes of them.
OPTIONS: dict[int, tuple[type[ImgfsError], str]] = {
    errno.ENOENT: (SourceNotFound, "the server has no such export"),
    errno.EINVAL: (ProtocolViolation, "the server takes a good option for an invalid one"),
}


def option_error(name: str, number: int, *, tls: bool) -> Exception:
    """Why the server does not let us use the export `name`: an ImgfsError, or Broken."""
    if number in _LOST:
        return Broken(SourceUnreachable(f"{name}: the server shuts down"))
    if number in OPTIONS:
        kind, text = OPTIONS[number]
        return kind(f"{name}: {text}")
    # libnbd tells NBD_REP_ERR_TLS_REQD and NBD_REP_ERR_POLICY apart only on stderr.
    text = "the server forbids it" if tls else "the server forbids it, or wants TLS (nbds://)"
    return AccessDenied(f"{name}: {text}")


#: Parts of libnbd's texts, and what they mean.  The first that fits counts.
_TEXTS: tuple[tuple[str, type[ImgfsError], str], ...] = (
    ("getaddrinfo:", SourceUnreachable, "host not found"),
    ("disconnected unexpectedly", SourceUnreachable, "the connection was lost"),
    ("gnutls_record_", SourceUnreachable, "the connection was lost"),
    ("gnutls_handshake:", AccessDenied, "TLS failed"),
    ("gnutls_", AccessDenied, "TLS cannot be used"),
    ("not found in PSK file", AccessDenied, "TLS cannot be used"),
    ("open:", AccessDenied, "a file for TLS cannot be used"),
    ("expected NBD magic", ProtocolViolation, "is not an NBD server"),
)
_ERRNOS: dict[int, type[ImgfsError]] = {
    errno.EACCES: AccessDenied,
    errno.EPERM: AccessDenied,
    errno.EPROTO: ProtocolViolation,
    errno.EOVERFLOW: ProtocolViolation,
}


def reason(exc: Any) -> str:
    """libnbd's own words, without the name of its function."""
    text = one_line(str(exc.string or exc))
    head, colon, rest = text.partition(": ")
    return rest if colon and head.startswith("nbd_") else text


def connection_error(where: str, exc: Any) -> Exception:
    """What an nbd.Error of a connection means: an ImgfsError for good, or Broken."""
    said = reason(exc)
    # libnbd has an errno where a system call failed; else it is the server's doing.
    kind = _ERRNOS.get(exc.errnum, SourceUnreachable if exc.errnum else ProtocolViolation)
    text = "the server broke the NBD protocol" if kind is ProtocolViolation else ""
    kind, text = next((row[1:] for row in _TEXTS if row[0] in said), (kind, text))
    error = kind(f"{where}: {text} ({said})" if text else f"{where}: {said}")
    return Broken(error) if isinstance(error, SourceUnreachable) else error
