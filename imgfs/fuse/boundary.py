"""The one place where exceptions become errno, and interrupts become cancellation.

pyfuse3 lets only FUSEError out of a handler: anything else would end the mount.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import pyfuse3
import trio

from imgfs._native import load_fuse
from imgfs.errors import ImgfsError

log = logging.getLogger(__name__)
native = load_fuse()
Result = TypeVar("Result")
P = ParamSpec("P")

#: what each request in Python's hands is cancelled by, by the kernel's number of it
running: dict[int, trio.CancelScope] = {}


async def guard(what: str, handler: Callable[[], Awaitable[Result]]) -> Result:
    """Run one request's handler.  Raises FUSEError, or Cancelled at the end of the mount.

    Must be reached in the request's first synchronous step: the number is then its own.
    """
    unique = native.current_unique()
    with trio.CancelScope() as scope:
        running[unique] = scope
        try:
            return await handler()
        except pyfuse3.FUSEError:
            raise
        except ImgfsError as exc:
            log.warning("%s: %s", what, exc)
            raise pyfuse3.FUSEError(exc.errno) from None
        except Exception:
            log.exception("%s failed: this is a bug in imgfs", what)
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            if running.get(unique) is scope:
                del running[unique]
    raise pyfuse3.FUSEError(errno.EINTR)


def guarded(
    handler: Callable[Concatenate[Any, P], Awaitable[Result]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, Result]]:
    """`guard` for a method of the operations."""

    @functools.wraps(handler)
    async def wrapper(self: Any, *args: P.args, **kwargs: P.kwargs) -> Result:
        return await guard(handler.__name__, lambda: handler(self, *args, **kwargs))

    return cast(Callable[Concatenate[Any, P], Coroutine[Any, Any, Result]], wrapper)


async def serve_interrupts() -> None:
    """Cancel what the kernel interrupts, until the connection ends."""
    fd = native.interrupt_fd()
    while not native.status()["ended"]:
        await trio.lowlevel.wait_readable(fd)
        for target, unique in native.take_interrupts():
            scope = running.get(target)
            if scope is None:
                native.retry_interrupt(unique)
            else:
                scope.cancel()
