"""The one place where exceptions become errno, and interrupts become cancellation.

pyfuse3 lets only FUSEError out of a handler: anything else would end the mount.
"""

from __future__ import annotations

import errno
import functools
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import pyfuse3
import trio

from imgfs._native import load_fuse
from imgfs.errors import ImgfsError, system_error

log = logging.getLogger(__name__)
native = load_fuse()
Result = TypeVar("Result")
P = ParamSpec("P")

KILL_POLL_S = 0.25
SILENT_S = 600.0  # a line that was logged is not logged again so long
MOST_SILENT = 256  # lines of which that is known
SIGNAL_S = 2.0  # who has waited so long after a signal gets EINTR for it
#: What the system does not say of a file, but of how it was asked.
_BUGS = (errno.EBADF, errno.EFAULT, errno.EINVAL, None)
_SIGKILL_PENDING = 1 << (signal.SIGKILL - 1)
_PF_SIGNALED = 0x400  # linux/sched.h: ends because of a signal


@dataclass(frozen=True, slots=True)
class Request:
    """A request in Python's hands: what cancels it, and the thread that it is for."""

    scope: trio.CancelScope
    pid: int
    since: float  #: trio's clock, in seconds


#: by the kernel's number of it
running: dict[int, Request] = {}
#: requests whose thread got a signal, and when the kernel said so
interrupted: dict[int, float] = {}
#: until when a line is not to be logged again, in the order in which they were
_silent: dict[str, float] = {}


async def guard(
    what: str,
    handler: Callable[[], Awaitable[Result]],
    number: tuple[int, int] | None = None,
    note: Callable[[str], None] = lambda error: None,
) -> Result:
    """Run one request's handler.  Raises FUSEError, or Cancelled at the end of the mount.

    Must be reached in the request's first synchronous step, or be given the request's number and
    thread, as they were in that.  `note` hears of each error that is told.
    """
    unique, pid = number or (native.current_unique(), native.current_pid())
    with trio.CancelScope() as scope:
        request = running[unique] = Request(scope, pid, trio.current_time())
        try:
            return await handler()
        except pyfuse3.FUSEError:
            raise
        except ImgfsError as exc:
            log.log(_level(f"{what}: {exc}"), "%s: %s", what, exc)
            note(str(exc))
            raise pyfuse3.FUSEError(exc.errno) from None
        except OSError as exc:
            if exc.errno in _BUGS:
                log.exception("%s failed: this is a bug in imgfs", what)
                note(f"{what} failed: this is a bug in imgfs")
                raise pyfuse3.FUSEError(errno.EIO) from None
            error = system_error(str(exc.filename or "imgfs"), exc)
            log.log(_level(f"{what}: {error}"), "%s: %s", what, error)
            note(str(error))
            raise pyfuse3.FUSEError(error.errno) from None
        except MemoryError:
            said = "there is no memory for it; the limits in force are too low"
            log.log(_level(f"{what}: memory"), "%s: %s", what, said)
            note(said)
            raise pyfuse3.FUSEError(errno.ENOMEM) from None
        except Exception:
            log.exception("%s failed: this is a bug in imgfs", what)
            note(f"{what} failed: this is a bug in imgfs")
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            if running.get(unique) is request:
                del running[unique]
    raise pyfuse3.FUSEError(errno.EINTR)


def _level(line: str) -> int:
    return logging.WARNING if _is_news(line) else logging.DEBUG


def _is_news(line: str) -> bool:
    """Was it not logged for a while?  Of a bad image every lookup has the same to say."""
    now = trio.current_time()
    if line in _silent and now < _silent[line]:
        return False
    _silent.pop(line, None)
    _silent[line] = now + SILENT_S
    if len(_silent) > MOST_SILENT:
        del _silent[next(iter(_silent))]
    return True


def guarded(
    handler: Callable[Concatenate[Any, P], Awaitable[Result]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, Result]]:
    """`guard` for a method of the operations, whose first argument is an inode or a handle."""

    @functools.wraps(handler)
    async def wrapper(self: Any, *args: P.args, **kwargs: P.kwargs) -> Result:
        def note(error: str) -> None:
            self.note_failure(next(iter(args), None), error)

        return await guard(handler.__name__, lambda: handler(self, *args, **kwargs), note=note)

    return cast(Callable[Concatenate[Any, P], Coroutine[Any, Any, Result]], wrapper)


async def serve_interrupts() -> None:
    """Note what the kernel interrupts, until the connection ends.

    The kernel interrupts for any signal.  Programs do not expect EINTR from a file, and get
    signals all the time (Go's threads, qemu's): so only who is killed is let go at once, and who
    has another signal when he has waited for long.
    """
    fd = native.interrupt_fd()
    while not native.status()["ended"]:
        await trio.lowlevel.wait_readable(fd)
        for target, unique in native.take_interrupts():
            request = running.get(target)
            if request is not None:
                if _is_killed(request.pid):
                    request.scope.cancel()
                else:
                    interrupted.setdefault(target, trio.current_time())
            elif target in native.parked():
                interrupted.setdefault(target, trio.current_time())
            else:
                native.retry_interrupt(unique)


async def serve_killed() -> None:
    """Cancel what a killed thread waits for; runs until it is cancelled.

    The kernel sends no INTERRUPT for an O_DIRECT read: it makes it asynchronous requests and
    waits for them uninterruptibly.  Without asynchronous direct reads there would be one, but
    also only one request at a time for io_submit(2).
    """
    while True:
        await trio.sleep(KILL_POLL_S)
        now = trio.current_time()
        parked = native.parked()
        old = {
            unique: request.pid
            for unique, request in running.items()
            if request.pid and request.since < now - KILL_POLL_S
        }
        killed = {pid for pid in {*old.values(), *parked.values()} if pid and _is_killed(pid)}
        ended = {unique for unique, pid in (old | parked).items() if pid in killed}
        for unique, since in list(interrupted.items()):
            if unique not in running and unique not in parked:
                del interrupted[unique]
            elif since < now - SIGNAL_S:
                ended.add(unique)
        for unique in ended:
            if not native.interrupt_parked(unique) and unique in running:
                running[unique].scope.cancel()


def _is_killed(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False  # it has gone, and others may wait for what it began
    # proc(5) counts from 1, and the third is the first behind the name.
    fields = text[text.rindex(b")") + 2 :].split()
    flags, pending = int(fields[9 - 3]), int(fields[31 - 3])
    return bool(pending & _SIGKILL_PENDING or flags & _PF_SIGNALED)
