"""What goes wrong with a request for a part of an object, and what a status means."""

from __future__ import annotations

from imgfs.errors import (
    AccessDenied,
    ImgfsError,
    ProtocolViolation,
    SourceNotFound,
    SourceUnreachable,
    UnsupportedFeature,
)


class Again(Exception):
    """A failure that may pass.

    `answered`: the server did, only not with what was asked for.  `pause_s`: it wants to be left
    alone for so long.
    """

    def __init__(
        self, error: SourceUnreachable, *, answered: bool = False, pause_s: float = 0.0
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.answered = answered
        self.pause_s = pause_s


class Mismatch(Exception):
    """412: by the server's word If-Match does not hold."""


class NoSuchRange(Exception):
    """416, or all of the file where a range was asked for."""


#: Statuses after which the same request may succeed.  501 and 505 are not among them.
TEMPORARY = {408, 425, 429, 500, 502, 503, 504}

STATUS: dict[int, tuple[type[ImgfsError], str]] = {
    301: (UnsupportedFeature, "is elsewhere (301); a bucket's region belongs in AWS_REGION"),
    304: (ProtocolViolation, "answers 304 to a request that had no condition for it"),
    401: (AccessDenied, "the server wants a login"),
    403: (AccessDenied, "the server denies access"),
    404: (SourceNotFound, "no such file"),
    405: (UnsupportedFeature, "the server does not let it be read (405)"),
    407: (AccessDenied, "the proxy wants a login"),
    410: (SourceNotFound, "no such file (410 Gone)"),
}

CERTIFICATE = "the server's certificate is not trusted ({}); "
CERTIFICATE += "the file of its CA can be named in SSL_CERT_FILE or AWS_CA_BUNDLE"
NO_RANGES = "the server does not serve ranges of a file, so it cannot be read piece by piece"


def by_status(
    name: str,
    status: int,
    looked_for: str,
    *,
    better: tuple[type[ImgfsError], str] | None = None,
    pause_s: float = 0.0,
) -> Exception:
    """What an answer with this status is.  `better` says more than the status does."""
    if status == 412:
        return Mismatch()
    if status == 416:
        return NoSuchRange(f"{name}: the server refuses a range that should be there (416)")
    own, said = better or STATUS.get(status, (ImgfsError, f"the server refuses ({status})"))
    if own is ImgfsError and status in TEMPORARY:
        error = SourceUnreachable(f"{name}: the server fails ({status})")
        return Again(error, answered=True, pause_s=pause_s)
    if own is AccessDenied and looked_for:
        said = f"{said}; {looked_for}"
    return own(f"{name}: {said}")
