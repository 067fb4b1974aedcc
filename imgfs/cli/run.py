"""What the commands that look at one source share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import trio

from imgfs.cli.terminal import Terminal, is_there
from imgfs.config.options import Options
from imgfs.opener.disks import open_disk
from imgfs.views.opening import Chain

Result = TypeVar("Result")


def with_disk(
    text: str, options: Options, look: Callable[[str, Chain], Awaitable[Result]]
) -> Result:
    """Open the source that a person named, and return what `look` finds in its disk.

    `look` also gets the source as it is shown.
    """

    async def work(options: Options) -> Result:
        async with open_disk(text, options) as (url, chain):
            return await look(url, chain)

    return run(work, options)


def run(work: Callable[[Options], Awaitable[Result]], options: Options) -> Result:
    """Run it under trio; at a terminal it may ask questions."""
    asking = Terminal()
    if is_there():
        options = replace(options, prompt=asking.ask)
    try:
        return trio.run(work, options)
    finally:
        asking.close()
