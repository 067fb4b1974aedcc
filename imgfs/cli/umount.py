"""`imgfs umount MOUNTPOINT`: returns when the process behind the mount has ended.

    1. ask the process to make all durable; if it cannot the mount stays, and this says why
    2. let the kernel detach the mount; if files are open in it it stays, too
    3. wait for the process, which makes durable what was written between 1 and 2, and says in its
       outcome (daemon/outcome.py) how that went

Where nothing is mounted any more, and a process that was mounted there has something to save yet,
there is only the third step.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import time
from typing import NoReturn

import click

from imgfs.cli import parameters
from imgfs.cli.asking import PATIENCE_S, Asking
from imgfs.daemon.mounts import MountEntry, mounted_at, resolved
from imgfs.daemon.outcome import Ending, holding
from imgfs.daemon.processes import Watched
from imgfs.daemon.stop import GIVE_UP
from imgfs.daemon.unmount import clear_dead, holders, unmount
from imgfs.errors import DeadMount, MountError
from imgfs.status.durable import SyncStatus, Unsaved, at_umount

SOON_S = 3.0  # in which a process ends that has nothing more to write
WAIT_S = 60.0  # for what is being made durable, and for the end of the process
HOLD_S = 10.0  # for a process that cannot make something durable
POLL_S = 0.1


@click.command("umount")
@parameters.mountpoint
@click.option("--force", is_flag=True, help="Give up what cannot be made durable.")
def command(mountpoint: str, force: bool) -> None:
    """Unmount MOUNTPOINT and wait until everything is released.

    If something that was written to it cannot be made durable it stays mounted, and the status is
    1.  With --force it is unmounted all the same: the status is 1, too, and what is lost is said.

    A mount that a killed process has left is taken away; the status is 1, since nobody can say that
    all that was written to it is durable.
    """
    path = resolved(mountpoint)
    entry = mounted_at(path)
    left = holding(path) if entry is None else None
    if left is not None:
        _finish(mountpoint, left, None, force=force)
        return
    pid = _pid(mountpoint, path)
    ending, unsaved = _make_durable(mountpoint, pid)
    if unsaved and not force:
        raise MountError("; ".join(map(at_umount, unsaved)))
    _detach(mountpoint, path)
    if ending is None:
        _wait_for_another_version(mountpoint, pid)
    else:
        _finish(mountpoint, ending, entry, force=force)


def _pid(mountpoint: str, path: str) -> int:
    """Of the process behind the mount.  Raises MountError; a dead mount is taken away first."""
    asking = Asking(mountpoint)
    try:
        return int(asking.wait().status["pid"])
    except DeadMount:
        if not clear_dead(path):
            raise
        raise MountError(
            f"{mountpoint}: took away the mount of a process that has ended; "
            "what was written and not synced by then may be lost"
        ) from None
    except (ValueError, KeyError):
        raise MountError(f"{mountpoint}: is not a live imgfs mount") from None
    finally:
        asking.close()


def _make_durable(mountpoint: str, pid: int) -> tuple[Ending | None, list[Unsaved]]:
    """Ask for it; returns what is not.  None: it is a version that cannot be asked."""
    asking = Asking(mountpoint, "sync.json")
    try:
        asking.ask()
        if not select.select(asking.fds, [], [], WAIT_S)[0]:
            raise MountError(
                f"{mountpoint}: what was written is not durable yet; it stays mounted, unmount it "
                "again later"
            )
        number, text = asking.take_text()
    finally:
        asking.close()
    if number == errno.ENOENT:
        return None, []
    try:
        if number:
            raise OSError(number, os.strerror(number))
        told: SyncStatus = json.loads(text)
        return Ending(pid, told["outcome"]), told["unsaved"]
    except OSError as exc:
        raise MountError(f"{mountpoint}: cannot be asked to make all durable: {exc}") from None
    except (ValueError, KeyError, TypeError):
        raise MountError(f"{mountpoint}: is not a live imgfs mount") from None


def _detach(mountpoint: str, path: str) -> None:
    try:
        why = unmount(path, PATIENCE_S)
    except TimeoutError:
        raise MountError(f"{mountpoint}: cannot be unmounted yet; it may be later") from None
    if why is not None:
        raise MountError(f"{mountpoint}: {why}")


def _finish(mountpoint: str, ending: Ending, entry: MountEntry | None, *, force: bool) -> None:
    """Wait for the end of a process that is not mounted any more, as it was by `entry`.

    Raises MountError.
    """
    try:
        if force:
            ending.process.send(GIVE_UP)
        begun = time.monotonic()
        while not ending.process.wait_for(POLL_S):
            state, lines = ending.said()
            took = time.monotonic() - begun
            if state == "serving" and took > SOON_S and entry is not None:
                _refuse_holders(mountpoint, ending.pid, entry)
                entry = None
            if state == "holding" and took > HOLD_S:
                _still_there(mountpoint, ending.pid, "; ".join(lines))
            if took > WAIT_S:
                _still_there(mountpoint, ending.pid, "it makes durable what was written")
        state, lines = ending.said()
    finally:
        ending.close()
    if state == "lost":
        raise MountError("; ".join(lines))
    if state != "durable":
        raise MountError(
            f"{mountpoint}: process {ending.pid} was killed; what was written and not synced by "
            "then may be lost"
        )


def _refuse_holders(mountpoint: str, pid: int, entry: MountEntry) -> None:
    """Raises MountError where somebody else has the mount, and may keep it for ever."""
    if others := holders(entry.device):
        raise MountError(
            f"{mountpoint}: unmounted here, but {', '.join(map(str, others))} has it in a mount "
            f"namespace of its own; imgfs ends when that does; to end it now run: kill {pid}"
        )


def _still_there(mountpoint: str, pid: int, why: str) -> NoReturn:
    raise MountError(f"{mountpoint}: unmounted, but process {pid} has not ended yet: {why}")


def _wait_for_another_version(mountpoint: str, pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process = Watched(pid)
        try:
            if not process.wait_for(WAIT_S):
                _still_there(mountpoint, pid, "it makes durable what was written")
        finally:
            process.close()
