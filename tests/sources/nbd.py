"""What the tests of the NBD source share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from imgfs.errors import ImgfsError, sole
from imgfs.sources.nbd.settings import NbdSettings
from imgfs.sources.nbd.source import NbdSource, open_nbd
from imgfs.url.nbd import NbdUrl
from imgfs.url.source import parse

from .conftest import run


@asynccontextmanager
async def opened(text: str, **settings: Any) -> AsyncIterator[NbdSource]:
    """The URL, with connections of its own; raises what happens, not a group of it."""
    url = parse(text)
    assert isinstance(url, NbdUrl)
    try:
        async with trio.open_nursery() as nursery:
            source = await open_nbd(url, NbdSettings(**settings), nursery)
            try:
                yield source
            finally:
                await source.aclose()
    except BaseExceptionGroup as group:
        raise sole(group) from None


def refused(text: str, error: type[ImgfsError], **settings: Any) -> str:
    """The one line that opening it is refused with."""

    async def main() -> str:
        with pytest.raises(error) as caught:
            async with opened(text, **settings):
                pass
        assert type(caught.value) is error
        return str(caught.value)

    said: str = run(main)
    assert "\n" not in said
    return said
