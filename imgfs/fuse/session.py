"""One mounted session: mount, serve, stop with requests in flight, leave nothing behind.

The end comes in one of two ways.  The kernel says the connection is gone (umount, abort):
the request threads see ENODEV.  A stop is asked for (a signal): when all is durable the mount is
detached, open files are served until they close or 10 s have passed, and then the connection is cut
by closing the device.  Either way the request threads are joined before the device closes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import quote

import trio

from imgfs.budget import shared
from imgfs.config.options import Options
from imgfs.daemon.mounts import mounted_at, now_serves, serves
from imgfs.daemon.stop import Stop
from imgfs.daemon.unmount import clear_dead, detach_device
from imgfs.errors import MountError
from imgfs.fuse.boundary import native, serve_interrupts, serve_killed
from imgfs.fuse.operations import Operations

# Only now: it binds to the interposer's functions, which the boundary has loaded.
import pyfuse3  # isort: skip

log = logging.getLogger(__name__)

DRAIN_S = 10.0
MAX_TASKS = 10000  # a task is held until its reply: a dead server must not use them up
READ_AHEAD_KIB = 1024
MAX_BACKGROUND = 1024


def _threads(options: Options) -> int:
    # One more than cores was fastest; many more only contend (two cores, 8 readers: 3 threads
    # 129,000 IOPS, 8 threads 91,000).
    return options.threads or max(3, min(8, (os.cpu_count() or 1) + 1))


def mount(operations: Operations, mountpoint: str, source: str, options: Options) -> int:
    """Mount, and start the request threads; return the st_dev of the mount's files.

    Raises MountError with nothing left mounted.
    """
    # pyfuse3 takes ASCII only, and libfuse splits at commas and reads backslashes.
    shown = quote(os.fsencode(source), safe="/:@[]-._~+=%")
    words = {f"fsname={shown}", "subtype=imgfs", "default_permissions"}
    words |= {"nosuid", "nodev", *options.kernel}
    if options.allow_other:
        words.add("allow_other")
    if options.read_only:
        words.add("ro")
    try:
        native.arm(MAX_BACKGROUND, shared().limit // 4)
    except OSError as exc:
        raise MountError(f"{mountpoint}: cannot be mounted: {exc.strerror}") from None
    try:
        # libfuse says why on stderr; the child's stderr is the person's until we are ready.
        pyfuse3.init(operations, mountpoint, words)
    except RuntimeError as exc:
        native.disarm()
        # A fusermount3 that was killed half-way (^C reaches it too) may have mounted.
        clear_dead(mountpoint)
        raise MountError(f"{mountpoint}: cannot be mounted: {exc}") from None
    try:
        entry = mounted_at(mountpoint)
        if entry is None:
            raise MountError(f"{mountpoint}: was unmounted before the mount was ready")
        now_serves(entry.device)
        if not native.hooked():
            said = "pyfuse3 calls a libfuse that was loaded before imgfs; is it in LD_PRELOAD?"
            raise MountError(f"{mountpoint}: cannot be mounted: {said}")
        native.start(_threads(options))
        return entry.device
    except OSError as exc:
        pyfuse3.close(unmount=True)
        native.disarm()
        why = "no thread can be started" if exc.errno == errno.EAGAIN else exc.strerror
        raise MountError(f"{mountpoint}: cannot be mounted: {why}") from None
    except BaseException:
        pyfuse3.close(unmount=True)
        native.disarm()
        raise


def raise_read_ahead(mountpoint: str) -> None:
    """The kernel reads ahead 128 KiB by default, and INIT cannot ask for more; root can."""
    entry = mounted_at(mountpoint)
    if entry is None or not serves(entry.device):
        return  # unmounted already: the device there is another's
    knob = Path(f"/sys/class/bdi/{os.major(entry.device)}:{os.minor(entry.device)}/read_ahead_kb")
    with contextlib.suppress(OSError):
        knob.write_text(str(READ_AHEAD_KIB))


async def serve(
    operations: Operations,
    mountpoint: str,
    device: int,
    background: Callable[[], Awaitable[None]],
    stop: Stop,
    may_detach: Callable[[], Awaitable[None]],
) -> None:
    """Answer requests until the end; then the connection is closed and the threads are gone.

    When a stop is asked for the mount stays until `may_detach` has returned.
    """
    try:
        async with trio.open_nursery() as nursery:
            native.set_extra_handler(operations.extra(nursery))
            nursery.start_soon(_end_when_asked, device, stop, may_detach, nursery.cancel_scope)
            nursery.start_soon(background)
            nursery.start_soon(serve_killed)
            # Its workers end when the connection does, but for those that still wait for a
            # source: nobody waits for their answer any more.
            nursery.start_soon(_serve_until_end, nursery.cancel_scope)
            await pyfuse3.main(min_tasks=8, max_tasks=MAX_TASKS)
            nursery.cancel_scope.cancel()
    finally:
        error = native.status()["error"]
        native.stop()
        # This cuts the connection.  libfuse is not to unmount: it would take whatever is on top at
        # the mount point by now, though ours was moved elsewhere or another was mounted over it.
        pyfuse3.close(unmount=False)
        native.disarm()
        detach_device(device, only_dead=True)
    if error:
        raise MountError(f"{mountpoint}: the FUSE device failed: {os.strerror(error)}")


async def _serve_until_end(scope: trio.CancelScope) -> None:
    await serve_interrupts()
    scope.cancel()


async def _end_when_asked(
    device: int,
    stop: Stop,
    may_detach: Callable[[], Awaitable[None]],
    scope: trio.CancelScope,
) -> None:
    await stop.asked.wait()
    log.info("%s", stop.why)
    await may_detach()
    if not native.status()["ended"]:
        await trio.to_thread.run_sync(detach_device, device)
    with trio.move_on_after(DRAIN_S):
        await stop.at_once.wait()
    scope.cancel()
