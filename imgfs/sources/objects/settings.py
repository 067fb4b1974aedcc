"""How to reach web servers and S3; apart, so that the options need no obstore.

Secrets come from the environment only: what is on a command line is in ps for everybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from imgfs.errors import UsageError

#: Credentials that the library fetches by itself, as AWS's own tools do where these are set.
FETCHED = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
KEY, SECRET = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"


@dataclass(frozen=True, slots=True)
class ObjectSettings:
    """What one source needs to know beyond its URL.

    `timeout_s` is how long an absent or silent server is waited for.
    """

    timeout_s: float = 30.0
    depth: int = 64  #: requests in flight for one source, at most
    endpoint: str | None = None  #: of S3, as a URL; None: AWS's own
    region: str | None = None  #: None: us-east-1
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    fetched: bool = False  #: without keys: leave it to the library to fetch some
    path_style: bool | None = None  #: None: where there is an endpoint
    allow_http: bool = False  #: let https:// lead to a redirect without TLS
    ca_file: str | None = None  #: PEM; certificates to trust besides the system's
    #: the value of an Authorization header, sent over https only
    authorization: str | None = field(default=None, repr=False)
    profile: str | None = None  #: is not read; for the advice when access is denied


def from_environment(environment: Mapping[str, str], **changes: Any) -> ObjectSettings:
    """The settings that AWS's own tools would take from there.

    Raises UsageError when one half of a key pair is missing.
    """

    def first(*names: str) -> str | None:
        return next((environment[name] for name in names if environment.get(name)), None)

    key, secret = first(KEY), first(SECRET)
    if (key is None) != (secret is None):
        there, missing = (KEY, SECRET) if key else (SECRET, KEY)
        raise UsageError(f"{there} is set in the environment, but {missing} is not")
    values: dict[str, Any] = {
        "endpoint": first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "region": first("AWS_REGION", "AWS_DEFAULT_REGION"),
        "access_key_id": key,
        "secret_access_key": secret,
        "session_token": first("AWS_SESSION_TOKEN") if key else None,
        "fetched": first(*FETCHED) is not None,
        "ca_file": first("AWS_CA_BUNDLE"),
        "authorization": first("IMGFS_HTTP_AUTHORIZATION"),
        "profile": first("AWS_PROFILE"),
    }
    return ObjectSettings(**{**values, **changes})
