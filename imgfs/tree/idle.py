"""Of many images those that nobody has looked at for longest are closed, and forgotten.

Each image that was looked at takes memory, and some of them take descriptors, connections or
processes of their own.  So when there are many, the kernel is asked to forget the names in the
oldest one's directory.  When it has done so, nobody has a file of it open, and nobody knows an
inode: all is closed, and the next look finds an image that was never opened.

    unopened ---> looked at ---> to be forgotten ---> the kernel knows no name of it ---> unopened
                     ^                  |
                     +------------------+  a file is open, somebody's directory is in it, or it is
                                           being used again
"""

from __future__ import annotations

import logging
import math
import os
import resource
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

import trio

from imgfs.views.view import View

log = logging.getLogger(__name__)

MOST = 500  # images that may stay open while nobody uses them
BATCH = 100  # so many are closed together, and more are open than the limit until then
PAUSE_S = 0.05  # how long the kernel gets to forget
GONE_S = 5.0  # how often it is asked whether what has no name is still used
ROUNDS = 20  # how often it is asked whether it has
LEAST_FREE = 3  # of the descriptors this part is to be free


class Idle(Protocol):
    """An image that can be closed when it is not used."""

    def is_used(self) -> bool:
        """Does the kernel know a name of it, or is anything under way?"""

    def forget_names(self) -> None:
        """Ask the kernel to forget all of its names; does not wait for that."""

    async def rest(self) -> bool:
        """Close all of it, and forget it; False where it is used.  Raises nothing."""

    def needs(self) -> Collection[View]:
        """The views that are to stay open for it."""


class LookedAt:
    """The images that were looked at, the one used last at the end.

    `close_unused(needed)` closes all that only images needed that are closed by now.
    """

    def __init__(
        self, close_unused: Callable[[Collection[View]], Awaitable[None]], most: int = MOST
    ) -> None:
        self._close_unused = close_unused
        self._most = most
        self._images: dict[Idle, None] = {}
        self._gone: list[Idle] = []
        self._too_many = trio.Event()

    def __len__(self) -> int:
        return len(self._images)

    def used(self, image: Idle) -> None:
        """Somebody looks at it just now."""
        if image in self._images:
            del self._images[image]
        elif self._has_too_many(1):
            self._too_many.set()
        self._images[image] = None

    def forget(self, image: Idle) -> None:
        """It is closed for good."""
        self._images.pop(image, None)

    def gone(self, image: Idle) -> None:
        """It has no name any more: it is closed when nobody has a file of it open."""
        self._gone.append(image)
        self._too_many.set()

    def _has_too_many(self, more: int = 0) -> bool:
        count = len(self._images) + more
        return count >= self._most + BATCH or (count > BATCH and not has_free_descriptors())

    async def run(self) -> None:
        """Close what is too much, as it comes."""
        while True:
            with trio.move_on_after(GONE_S if self._gone else math.inf):
                await self._too_many.wait()
            self._too_many = trio.Event()
            await self._close_gone()
            while self._has_too_many():
                if not await self._close_some():
                    # All are in use: more of them will not be so soon.
                    await trio.sleep(1)

    async def _close_gone(self) -> None:
        for image in self._gone[:]:
            if not image.is_used() and await image.rest():
                self._gone.remove(image)
                await self._close_what_is_unused()

    async def _close_what_is_unused(self) -> None:
        images = [*self._images, *self._gone]
        await self._close_unused({view for image in images for view in image.needs()})

    async def _close_some(self) -> int:
        """Close some of the oldest; returns how many."""
        count = max(BATCH, len(self._images) - self._most)
        oldest = [image for image, _ in zip(list(self._images), range(count), strict=False)]
        for image in oldest:
            image.forget_names()
        closed = 0
        for _ in range(ROUNDS):
            await trio.sleep(PAUSE_S)
            for image in oldest:
                if image.is_used():
                    continue
                self._images.pop(image, None)
                if await image.rest():
                    closed += 1
                else:
                    self._images[image] = None
            oldest = [image for image in oldest if image in self._images]
            if not oldest:
                break
        for image in oldest:  # somebody has a file of it open, or is in one of its directories
            self._images.pop(image, None)
            self._images[image] = None
        if closed:
            await self._close_what_is_unused()
        return closed


def has_free_descriptors() -> bool:
    """Is a good part of those that the process may have free?"""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return True
    try:
        lowest = os.dup(0)
    except OSError:
        return False
    os.close(lowest)
    # A new one gets the lowest number that is free.
    return lowest < soft - soft // LEAST_FREE
