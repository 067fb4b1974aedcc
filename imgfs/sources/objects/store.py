"""obstore's store for an s3:// URL, and how it is set up.

Nothing is retried inside of obstore: it would not know what was read before, nor whose timeout it
is.  Its read timeout is ours: no byte for so long is silence.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, TypeAlias

import obstore.store

from imgfs import __version__
from imgfs.errors import UsageError
from imgfs.sources.objects.client import PIECE, longest_s
from imgfs.sources.objects.settings import KEY, SECRET, ObjectSettings
from imgfs.url.source import ObjectUrl

Store: TypeAlias = obstore.store.S3Store


def looked_for(settings: ObjectSettings) -> str:
    """For the message when access is denied: which credentials there were, without them."""
    if settings.access_key_id is not None:
        return f"with the access key {settings.access_key_id}"
    if settings.fetched:
        return "with the credentials that the environment leads to"
    said = f"without credentials, as the environment has no {KEY} and {SECRET}"
    return f"{said}; AWS_PROFILE is not supported" if settings.profile else said


def make_store(
    url: ObjectUrl, settings: ObjectSettings, *, written: int | None = None
) -> tuple[Store, str]:
    """A store, and the path in it that the URL means.  Raises UsageError.

    `written` is for one that is written to, in requests of so many bytes: those are tried again.
    """
    try:
        return _s3(url, settings, written), url.key
    except (obstore.exceptions.BaseError, ValueError) as exc:
        # The text of it may have the query in it.
        raise UsageError(f"{url.text}: not a URL that can be used") from exc


def _s3(url: ObjectUrl, settings: ObjectSettings, written: int | None) -> obstore.store.S3Store:
    endpoint = settings.endpoint
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise UsageError(f"{endpoint}: an endpoint of S3 begins with https:// or http://")
    path_style = endpoint is not None if settings.path_style is None else settings.path_style
    config: dict[str, Any] = {
        "region": settings.region or "us-east-1",
        "virtual_hosted_style_request": not path_style,
    }
    if endpoint is not None:
        if not path_style:
            scheme, _, host = endpoint.partition("://")
            endpoint = f"{scheme}://{url.host}.{host}"
        # Both, or one from the environment would have the last word.
        config |= {"endpoint": endpoint.rstrip("/"), "aws_endpoint_url_s3": endpoint.rstrip("/")}
    more: dict[str, Any] = {}
    if settings.access_key_id is not None:
        # Not as config: then a session token from the environment would be added to any key.
        more["credential_provider"] = lambda: {
            "access_key_id": settings.access_key_id,
            "secret_access_key": settings.secret_access_key,
            "token": settings.session_token,
            "expires_at": None,
        }
    elif not settings.fetched:
        # The library would ask the address of a cloud's metadata service for some.
        config["skip_signature"] = True
    http = settings.allow_http or (endpoint or "").startswith("http://")
    return obstore.store.S3Store(
        url.host,
        config=config,  # type: ignore[arg-type]
        client_options=_client(settings, http=http, longest=written or PIECE),
        retry_config=_never() if written is None else _patiently(settings),
        **more,
    )


def _client(settings: ObjectSettings, *, http: bool, longest: int = PIECE) -> Any:
    patience = datetime.timedelta(seconds=settings.timeout_s)
    options = {
        "allow_http": http,
        "connect_timeout": patience,
        "read_timeout": patience,
        "timeout": datetime.timedelta(seconds=longest_s(longest, settings)),
        "user_agent": f"imgfs/{__version__}",
    }
    if settings.ca_file is not None:
        try:
            options["root_certificate"] = Path(settings.ca_file).read_bytes()
        except OSError as exc:
            raise UsageError(f"{settings.ca_file}: {exc.strerror}") from exc
    return options


def _never() -> Any:
    return {"max_retries": 0, "retry_timeout": datetime.timedelta(seconds=1)}


def _patiently(settings: ObjectSettings) -> Any:
    return {"max_retries": 10, "retry_timeout": datetime.timedelta(seconds=settings.timeout_s)}
