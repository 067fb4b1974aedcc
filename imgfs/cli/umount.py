"""`imgfs umount MOUNTPOINT`: returns when the process behind the mount has ended."""

from __future__ import annotations

import click

from imgfs.cli import parameters
from imgfs.cli.asking import PATIENCE_S, Asking
from imgfs.daemon.mounts import mounted_at, resolved
from imgfs.daemon.processes import Watched
from imgfs.daemon.unmount import clear_dead, holders, unmount
from imgfs.errors import DeadMount, MountError

SOON_S = 3.0  # in which a process ends that has nothing more to write
WAIT_S = 60.0


@click.command("umount")
@parameters.mountpoint
def command(mountpoint: str) -> None:
    """Unmount MOUNTPOINT and wait until everything is released.

    A mount that a killed process has left is taken away; the status is 1, since nobody can say that
    all that was written to it is durable.
    """
    path = resolved(mountpoint)
    asking = Asking(mountpoint)
    try:
        pid = int(asking.wait().status["pid"])
        process = Watched(pid)
    except DeadMount:
        if not clear_dead(path):
            raise
        raise MountError(
            f"{mountpoint}: took away the mount of a process that has ended; "
            "what was written and not synced by then may be lost"
        ) from None
    except (OSError, ValueError, KeyError):
        raise MountError(f"{mountpoint}: is not a live imgfs mount") from None
    finally:
        asking.close()
    entry = mounted_at(path)
    try:
        why = unmount(path, PATIENCE_S)
    except TimeoutError:
        raise MountError(f"{mountpoint}: cannot be unmounted yet; it may be later") from None
    if why is not None:
        raise MountError(f"{mountpoint}: {why}")
    if process.wait_for(SOON_S):
        return
    # Who else has the mount may keep it for ever.
    others = [] if entry is None else holders(entry.device)
    if others:
        raise MountError(
            f"{mountpoint}: unmounted here, but {', '.join(map(str, others))} has it in a mount "
            f"namespace of its own; imgfs ends when that does; to end it now run: kill {pid}"
        )
    if not process.wait_for(WAIT_S):
        raise MountError(f"{mountpoint}: unmounted, but process {pid} has not ended yet")
