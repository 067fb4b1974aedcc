"""Opening images behind http and S3 in tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from imgfs.sources.bridge import Bridge
from imgfs.sources.objects.settings import ObjectSettings
from imgfs.sources.objects.source import ObjectSource, open_object
from imgfs.url.source import ObjectUrl, parse

from .conftest import run


def url_of(text: str) -> ObjectUrl:
    url = parse(text)
    assert isinstance(url, ObjectUrl)
    return url


@asynccontextmanager
async def opened(text: str, **settings: Any) -> AsyncIterator[ObjectSource]:
    """The image, with a bridge of its own."""
    bridge = Bridge()
    try:
        url = url_of(text)
        source = await open_object(url, ObjectSettings(**{"timeout_s": 5, **settings}), bridge)
        yield source
        await source.aclose()
    finally:
        with trio.CancelScope(shield=True):
            await bridge.aclose()


def use(text: str, function: Callable[[ObjectSource], Awaitable[Any]], **settings: Any) -> Any:
    """Open it, and run the function on it."""

    async def main() -> Any:
        async with opened(text, **settings) as source:
            return await function(source)

    return run(main)
