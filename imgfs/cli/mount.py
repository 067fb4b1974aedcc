"""`imgfs mount SOURCE MOUNTPOINT`: returns when the mount is ready, or says why it is not."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from imgfs.cli.main import set_up_logging
from imgfs.config import Options, parse_options
from imgfs.errors import ImgfsError, MountError
from imgfs.mountstate import is_dead


@click.command("mount", context_settings={"ignore_unknown_options": False})
@click.argument("source")
@click.argument("mountpoint", type=click.Path())
@click.option("-o", "options", multiple=True, metavar="OPT,OPT=VAL", help="Mount options.")
@click.option("-f", "--foreground", is_flag=True, help="Do not go to the background.")
@click.option("-v", "--verbose", count=True, help="Log more (twice: every request).")
def command(
    source: str, mountpoint: str, options: tuple[str, ...], foreground: bool, verbose: int
) -> None:
    """Show SOURCE as files under MOUNTPOINT."""
    set_up_logging(verbose)
    parsed = parse_options(options)
    mountpoint = checked_mountpoint(mountpoint)
    if foreground:
        _serve(source, mountpoint, parsed, lambda: None)
    else:
        _in_background(source, mountpoint, parsed)


def checked_mountpoint(text: str) -> str:
    """The mount point's absolute path.  Raises MountError when it cannot be one."""
    path = Path(text)
    dead = MountError(f"{text}: a dead mount is in the way; run: fusermount3 -u {text}")
    try:
        if not path.is_dir():
            what = "is not a directory" if path.exists() else "no such directory"
            raise MountError(f"{text}: {what}; a mount point must exist")
        if path.is_mount():
            raise dead if is_dead(text) else MountError(f"{text}: is a mount point already")
        if any(path.iterdir()):
            raise MountError(f"{text}: is not empty")
    except OSError as exc:
        if exc.errno == errno.ENOTCONN:
            raise dead from None
        raise MountError(f"{text}: {exc.strerror}") from None
    return str(path.resolve())


def _serve(source: str, mountpoint: str, options: Options, ready: Callable[[], None]) -> None:
    import trio

    from imgfs.app import run_mount

    try:
        trio.run(run_mount, source, mountpoint, options, ready)
    except BaseExceptionGroup as group:
        ours, others = group.split(ImgfsError)
        if ours is None or others is not None:
            raise
        found: BaseException = ours
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        raise found from None


def _in_background(source: str, mountpoint: str, options: Options) -> None:
    """Fork before any thread or loop is there; the parent waits for the child's word."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    if os.fork():
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            word = pipe.read()
        if word != b"ready":
            raise MountError(word.decode("utf-8", "replace") or f"{mountpoint}: imgfs died")
        return
    os.close(reading)
    status = 1
    try:
        _serve(source, mountpoint, options, lambda: _detach_from_terminal(writing))
        status = 0
    except ImgfsError as exc:
        if writing_is_open(writing):
            os.write(writing, str(exc).encode("utf-8", "surrogateescape"))
    except BaseException:
        logging.getLogger(__name__).exception("the mount ended by a bug in imgfs")
    finally:
        os._exit(status)


def writing_is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _detach_from_terminal(pipe: int) -> None:
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.write(pipe, b"ready")
    os.close(pipe)
