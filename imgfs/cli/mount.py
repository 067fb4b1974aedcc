"""`imgfs mount SOURCE MOUNTPOINT`: returns when the mount is ready, or says why it is not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click

from imgfs.cli import background, parameters, terminal
from imgfs.cli.manual import OPTIONS
from imgfs.config.options import Options, parse_options
from imgfs.daemon.mounts import mounted_at, resolved
from imgfs.daemon.stop import hold_back
from imgfs.daemon.systemd import (
    log_to_stderr,
    notify_alive,
    notify_ready,
    notify_stopping,
    watchdog_s,
)
from imgfs.daemon.unmount import clear_dead
from imgfs.errors import ImgfsError, MountError
from imgfs.sources.ssh.settings import Prompt

_EPILOG = "\b\nOptions of -o:\n" + "\n".join(f"  {e.form}\n      {e.meaning}" for e in OPTIONS)


@click.command("mount", epilog=_EPILOG)
@parameters.source
@parameters.mountpoint
@parameters.options
@click.option("-f", "--foreground", is_flag=True, help="Do not go to the background.")
@click.option("-v", "--verbose", count=True, help="Log more (twice: every request).")
def command(
    source: str, mountpoint: str, options: tuple[str, ...], foreground: bool, verbose: int
) -> None:
    """Show SOURCE as files under MOUNTPOINT."""
    log_to_stderr(verbose)
    parsed = parse_options(options)
    where = resolved(mountpoint)
    if clear_dead(where):
        click.echo(f"imgfs: {where}: took away the mount of a process that has ended", err=True)
    with claimed(where) as release:
        check_mountpoint(mountpoint, where)
        hold_back()
        if foreground:
            _in_foreground(source, where, parsed, release)
            return

        def serve(prompt: Prompt | None, ready: Callable[[], None], parent: int) -> None:
            def is_ready() -> None:
                release()
                ready()

            _serve(source, where, replace(parsed, prompt=prompt), is_ready, parent)

        background.run(serve, where)


@contextlib.contextmanager
def claimed(where: str) -> Iterator[Callable[[], None]]:
    """Keep other imgfs processes from mounting at the same time at this absolute path.

    Yields what ends the claim early: a mount that is there keeps others away by itself.  The lock
    is inherited over a fork, and gone when all who have it have released it or ended.  Where the
    directory cannot be locked there is no claim.  Raises MountError when another has it.
    """
    fd = -1

    def release() -> None:
        nonlocal fd
        if fd >= 0:
            os.close(fd)
            fd = -1

    if mounted_at(where) is None:  # what is mounted there may not answer
        try:
            fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            release()
            raise MountError(f"{where}: another imgfs is mounting here at this moment") from None
        except OSError:
            pass  # not readable, or on a file system without locks
    try:
        yield release
    finally:
        release()


def check_mountpoint(text: str, where: str) -> None:
    """Raise MountError unless `where` can be mounted on; `text` is how the user names it."""
    path = Path(where)
    try:
        if not path.is_dir():
            what = "is not a directory" if path.exists() else "no such directory"
            raise MountError(f"{text}: {what}; a mount point must exist")
        on_top = mounted_at(where)
        if on_top is not None and on_top.fstype == "autofs":
            return  # systemd's automount waits there for us: to look inside is to wait for it
        # Not is_mount(): the kernel may answer that from what it has cached of a dead mount.
        os.statvfs(path)
        if path.is_mount():
            raise MountError(f"{text}: is a mount point already")
        if any(path.iterdir()):
            raise MountError(f"{text}: is not empty")
    except OSError as exc:
        if exc.errno == errno.ENOTCONN:
            said = f"{text}: a dead mount is in the way; run: fusermount3 -u {text}"
            raise MountError(said) from None
        raise MountError(f"{text}: {exc.strerror}") from None


def _in_foreground(
    source: str, mountpoint: str, options: Options, release: Callable[[], None]
) -> None:
    asking = terminal.Terminal()
    if terminal.is_there():
        options = replace(options, prompt=asking.ask)

    def is_ready() -> None:
        release()
        asking.close()

    try:
        _serve(source, mountpoint, options, is_ready, None)
    finally:
        asking.close()


def _serve(
    source: str,
    mountpoint: str,
    options: Options,
    ready: Callable[[], None],
    parent: int | None,
) -> None:
    """Serve until the end; without a word from us nothing outlives `parent` until `ready`."""
    import trio

    from imgfs.app import run_mount
    from imgfs.daemon.outcome import Outcome
    from imgfs.daemon.stop import Stop

    outcome = Outcome(mountpoint)

    async def work() -> None:
        stop = Stop()
        following = trio.CancelScope()

        def is_ready() -> None:
            following.cancel()
            notify_ready()
            ready()

        async def follow() -> None:
            if parent is not None:
                with following:
                    await stop.follow(parent)

        async def announce() -> None:
            await stop.asked.wait()
            notify_stopping()

        async def show_life() -> None:
            within_s = watchdog_s()
            while within_s is not None:
                notify_alive()
                await trio.sleep(within_s / 2)

        async with trio.open_nursery() as nursery:
            await nursery.start(stop.listen)
            nursery.start_soon(show_life)
            nursery.start_soon(follow)
            nursery.start_soon(announce)
            try:
                await run_mount(source, mountpoint, options, stop, is_ready, outcome)
            finally:
                nursery.cancel_scope.cancel()
                if not stop.asked.is_set():
                    notify_stopping()

    try:
        try:
            trio.run(work)
        except BaseExceptionGroup as group:
            ours, others = group.split(ImgfsError)
            if ours is None or others is not None:
                raise
            found: BaseException = ours
            while isinstance(found, BaseExceptionGroup):
                found = found.exceptions[0]
            raise found from None
    except BaseException as exc:
        outcome.say("lost", str(exc) or type(exc).__name__)
        raise
    outcome.say("durable")
