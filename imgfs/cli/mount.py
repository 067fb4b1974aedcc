"""`imgfs mount SOURCE MOUNTPOINT`: returns when the mount is ready, or says why it is not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from imgfs.cli import background, parameters, terminal
from imgfs.cli.manual import OPTIONS
from imgfs.config.options import Options, parse_options
from imgfs.daemon.mounts import clear_dead, mounted_at
from imgfs.daemon.stop import hold_back
from imgfs.daemon.systemd import (
    log_to_stderr,
    notify_alive,
    notify_ready,
    notify_stopping,
    watchdog_s,
)
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
    mountpoint = checked_mountpoint(mountpoint)
    hold_back()
    if foreground:
        _in_foreground(source, mountpoint, parsed)
        return

    def serve(prompt: Prompt | None, ready: Callable[[], None], parent: int) -> None:
        _serve(source, mountpoint, replace(parsed, prompt=prompt), ready, parent)

    background.run(serve, mountpoint)


def checked_mountpoint(text: str) -> str:
    """The mount point's absolute path, free of a dead mount of ours.  Raises MountError."""
    # The name itself is kept: a dead mount cannot be looked at, and is no symbolic link.
    parent, name = os.path.split(os.path.realpath(text))
    where = str(Path(parent) / name)
    if clear_dead(where):
        click.echo(f"imgfs: {where}: took away the mount of a process that has ended", err=True)
    path = Path(where)
    try:
        if not path.is_dir():
            what = "is not a directory" if path.exists() else "no such directory"
            raise MountError(f"{text}: {what}; a mount point must exist")
        on_top = mounted_at(where)
        if on_top is not None and on_top.fstype == "autofs":
            return where  # systemd's automount waits there for us: to look inside is to wait for it
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
    return where


def _in_foreground(source: str, mountpoint: str, options: Options) -> None:
    asking = terminal.Terminal()
    if terminal.is_there():
        options = replace(options, prompt=asking.ask)
    try:
        _serve(source, mountpoint, options, asking.close, None)
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
    from imgfs.daemon.stop import Stop

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
                await run_mount(source, mountpoint, options, stop, is_ready)
            finally:
                nursery.cancel_scope.cancel()
                if not stop.asked.is_set():
                    notify_stopping()

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
