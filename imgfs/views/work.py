"""Work on maps: what is short is done at once, and what may be long in a thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

SHORT = 500  # items; some hundred microseconds, about what the way to a thread and back costs

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


async def work(items: int, job: Callable[[*Arguments], Result], *args: *Arguments) -> Result:
    """The job's result; it goes over so many items.  Raises what it raises."""
    if items <= SHORT:
        await trio.lowlevel.checkpoint()
        return job(*args)
    return await trio.to_thread.run_sync(job, *args)
