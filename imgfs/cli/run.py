"""What the commands that look at one source share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import trio

from imgfs.app import open_source
from imgfs.cli.terminal import Terminal, is_there
from imgfs.config import Options
from imgfs.sources.base import Source

Result = TypeVar("Result")


def with_source(text: str, options: Options, look: Callable[[Source], Awaitable[Result]]) -> Result:
    """Open the source that a person named, and return what `look` finds in it."""

    async def work() -> Result:
        async with open_source(text, options) as source:
            return await look(source)

    asking = Terminal()
    if is_there():
        options = replace(options, prompt=asking.ask)
    try:
        return trio.run(work)
    finally:
        asking.close()
