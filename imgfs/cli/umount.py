"""`imgfs umount MOUNTPOINT`: returns when the process behind the mount has ended."""

from __future__ import annotations

import os
import select
import subprocess
from pathlib import Path

import click

from imgfs.cli import parameters
from imgfs.cli.asking import PATIENCE_S, Asking
from imgfs.daemon.mounts import clear_dead
from imgfs.errors import DeadMount, MountError

WAIT_S = 60.0


@click.command("umount")
@parameters.mountpoint
def command(mountpoint: str) -> None:
    """Unmount MOUNTPOINT and wait until everything is released.

    A mount that a killed process has left is taken away; the status is 1, since nobody can say that
    all that was written to it is durable.
    """
    path = Path(mountpoint).absolute()
    asking = Asking(mountpoint)
    try:
        pid = int(asking.wait().status["pid"])
        process = os.pidfd_open(pid)
    except DeadMount:
        # The name itself is kept: a dead mount cannot be looked at, and is no symbolic link.
        if not clear_dead(str(Path(os.path.realpath(path.parent)) / path.name)):
            raise
        raise MountError(
            f"{mountpoint}: took away the mount of a process that has ended; "
            "what was written and not synced by then may be lost"
        ) from None
    except (OSError, ValueError, KeyError):
        raise MountError(f"{mountpoint}: is not a live imgfs mount") from None
    finally:
        asking.close()
    command = ["fusermount3", "-u", "--", str(path)]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        raise MountError(f"{mountpoint}: fusermount3 does not end; it may unmount it yet") from None
    if done.returncode:
        raise MountError(f"{mountpoint}: {done.stderr.strip() or 'cannot be unmounted'}")
    ready, _, _ = select.select([process], [], [], WAIT_S)
    if not ready:
        raise MountError(f"{mountpoint}: unmounted, but process {pid} has not ended yet")
