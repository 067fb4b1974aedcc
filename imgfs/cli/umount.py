"""`imgfs umount MOUNTPOINT`: returns when the process behind the mount has ended."""

from __future__ import annotations

import json
import os
import select
import subprocess
from pathlib import Path

import click

from imgfs.errors import MountError

WAIT_S = 60.0


@click.command("umount")
@click.argument("mountpoint", type=click.Path())
def command(mountpoint: str) -> None:
    """Unmount MOUNTPOINT and wait until everything is released."""
    path = Path(mountpoint).absolute()
    try:
        pid = int(json.loads((path / ".imgfs/status.json").read_bytes())["pid"])
        process = os.pidfd_open(pid)
    except (OSError, ValueError, KeyError):
        raise MountError(f"{mountpoint}: is not a live imgfs mount") from None
    done = subprocess.run(
        ["fusermount3", "-u", "--", str(path)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise MountError(f"{mountpoint}: {done.stderr.strip() or 'cannot be unmounted'}")
    ready, _, _ = select.select([process], [], [], WAIT_S)
    if not ready:
        raise MountError(f"{mountpoint}: unmounted, but process {pid} has not ended yet")
