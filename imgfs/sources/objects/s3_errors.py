"""obstore's exceptions as imgfs's: literal tables, used where they enter.

obstore puts status, transport error and cause into one text, which also has the URL with its
query, and the server's own words: of it only what the patterns here pick out is ever shown.  The
first line is `Generic HTTP error: Error performing GET URL in 1ms - Server returned non-2xx status
code: 404 Not Found: BODY` or another error's own words; the rest is Rust's debug text, in which a
URL has no space.  obstore is told never to retry: file.py does that.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import obstore.exceptions as foreign

from imgfs.errors import (
    AccessDenied,
    HostKeyError,
    ImgfsError,
    ProtocolViolation,
    SourceNotFound,
    SourceTimeout,
    SourceUnreachable,
    UnsupportedFeature,
    UsageError,
)
from imgfs.sources.objects.errors import (
    CERTIFICATE,
    NO_RANGES,
    STATUS,
    Again,
    Mismatch,
    NoSuchRange,
    by_status,
)


class Undecodable(Exception):
    """A refusal whose text is not UTF-8: then obstore does not tell the status."""


#: Codes in the body of an S3 error, where they say more than the status.
S3_CODES: dict[str, tuple[type[ImgfsError], str]] = {
    "NoSuchBucket": (SourceNotFound, "no such bucket"),
    "InvalidAccessKeyId": (AccessDenied, "the server does not know the access key"),
    "SignatureDoesNotMatch": (AccessDenied, "the secret key is not the access key's"),
    "ExpiredToken": (AccessDenied, "the session token has expired"),
    "RequestTimeTooSkewed": (AccessDenied, "the clocks here and at the server differ too much"),
    "InvalidObjectState": (AccessDenied, "the object is archived and must be restored first"),
    "AuthorizationHeaderMalformed": (AccessDenied, "the region is another; set AWS_REGION"),
}

#: What is wrong with an answer, by what is in the text; the first that is found counts.
ANSWERS: tuple[tuple[str, type[ImgfsError], str], ...] = (
    ("MissingContentLength", ProtocolViolation, "the server does not tell the answer's length"),
    ("InvalidContentLength", ProtocolViolation, "the server's Content-Length is no number"),
    ("UnexpectedRange", ProtocolViolation, "the server sent another range than was asked for"),
    ("NoContentRange", ProtocolViolation, "the server sent a range without saying which"),
    ("ContentRange", ProtocolViolation, "the server's Content-Range makes no sense"),
    ("InvalidGetRange", ProtocolViolation, "the server's Content-Range makes no sense"),
    ("InvalidRangeRequest", ProtocolViolation, "the server's Content-Range makes no sense"),
    ("InvalidLastModified", ProtocolViolation, "the server's Last-Modified is no date"),
    ("MissingEtag", ProtocolViolation, "the server sent no ETag, which S3 requires"),
    ("MissingLastModified", ProtocolViolation, "the server sent no Last-Modified"),
    ("InvalidUri", UsageError, "not a URL"),
)

_STATUS = re.compile(
    r"[^\n]*?: Error performing [A-Z]+ \S+ in \S+ - Server returned non-2xx status code: (\d{3})"
)
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_KIND = re.compile(r"\bHttpError \{\s+kind: (\w+)")
_TLS = re.compile(r"\b(?:InvalidCertificate|AlertReceived)\(\s*(\w+)")
_SYSTEM = re.compile(r'message: "([\w ]{1,60})"')
_NAME = re.compile(r"lookup address information: ([\w ]{1,60})")


@contextlib.contextmanager
def object_errors(name: str, looked_for: str = "") -> Iterator[None]:
    """For requests about an object, whose name is for messages.

    Raises ImgfsError for good, or Again, Mismatch, NoSuchRange, Undecodable.  `looked_for` says
    which credentials there were.
    """
    try:
        yield
    except foreign.PreconditionError as exc:
        raise Mismatch from exc
    except (foreign.BaseError, FileNotFoundError, NotImplementedError, ValueError) as exc:
        raise _translated(name, str(exc), looked_for) from exc
    except BaseException as exc:
        # A panic in the library is a BaseException and would end the mount.
        if type(exc).__name__ != "PanicException":
            raise
        raise ProtocolViolation(f"{name}: the server's answer makes no sense") from exc


def _translated(name: str, text: str, looked_for: str) -> Exception:
    status = _STATUS.match(text)
    if status is not None:
        code = _CODE.search(text)
        better = None if code is None else S3_CODES.get(code[1])
        return by_status(name, int(status[1]), looked_for, better=better)
    if "RangeNotSupported" in text or "NotPartial" in text:
        return NoSuchRange(f"{name}: {NO_RANGES}")
    if "BareRedirect" in text:
        return UnsupportedFeature(f"{name}: {STATUS[301][1]}")
    kind = _KIND.search(text)
    if kind is not None:
        return _by_transport(name, kind[1], text)
    for word, own, said in ANSWERS:
        if word in text:
            return own(f"{name}: {said}")
    return ProtocolViolation(f"{name}: the server's answer makes no sense")


def _by_transport(name: str, kind: str, text: str) -> Exception:
    if kind == "Timeout":
        return Again(SourceTimeout(f"{name}: the server does not answer"))
    if kind == "Decode":
        return Undecodable(f"{name}: the server refuses, in words that cannot be read")
    certificate = _TLS.search(text)
    if certificate is not None:
        return HostKeyError(f"{name}: {CERTIFICATE.format(certificate[1])}")
    if "kind: Redirect" in text:
        return ProtocolViolation(f"{name}: redirects in circles, or from https to http")
    if "BadScheme" in text:
        return ProtocolViolation(f"{name}: leads to what is not https")
    if "InvalidMessage" in text:
        return ProtocolViolation(f"{name}: the server does not speak TLS there")
    if "Parse(" in text:
        return ProtocolViolation(f"{name}: the server does not speak HTTP there")
    why = _NAME.search(text) or _SYSTEM.search(text)
    if kind == "Connect":
        said = f"no connection ({why[1]})" if why else "no connection"
        return Again(SourceUnreachable(f"{name}: {said}"))
    return Again(SourceUnreachable(f"{name}: the connection was lost"), answered=True)
