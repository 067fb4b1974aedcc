"""Waiting for a source that is away, as hard mounts of NFS do."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from imgfs.errors import ImgfsError

log = logging.getLogger(__name__)

PAUSE_S = 1.0

Result = TypeVar("Result")


async def patiently(action: Callable[[], Awaitable[Result]], goes_on: Callable[[], bool]) -> Result:
    """The action's result; it is tried again after temporary errors while `goes_on` is true.

    Raises what the action raises otherwise.
    """
    while True:
        try:
            return await action()
        except ImgfsError as exc:
            if not (exc.temporary and goes_on()):
                raise
            log.warning("%s; trying again", exc)
        await trio.sleep(PAUSE_S)
