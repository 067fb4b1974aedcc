"""The kernel tells of a close later: who comes right after is not told that a file is open."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts import MIB, Mount, imgfs

from .test_state_gone import failed

Mounter = Callable[..., Mount]
ROUNDS = 300 if os.environ.get("IMGFS_TEST_LONG") else 40


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MIB))
    return path


@pytest.mark.parametrize("name", ["X.raw", "X.qcow2", "sparse/X.vdi"])
def test_rmdir_and_others(mount: Mounter, disk: Path, name: str) -> None:
    m = mount(disk)
    snapshots = m.point / "snapshots"
    for turn in range(ROUNDS):
        (snapshots / "X").mkdir()
        path = snapshots / "X" / name
        fds = [os.open(path, os.O_RDONLY) for _ in range(4)]
        if name == "X.raw":
            fds.append(os.open(path, os.O_RDWR))
            os.pwrite(fds[-1], bytes([turn % 256]) * 8192, 4096)
        for fd in fds:
            os.pread(fd, 4096, 0)
            os.close(fd)
        match turn % 4:
            case 0:
                (snapshots / "X/snapshots/Y").mkdir()
                (snapshots / "X/snapshots/Y").rmdir()
            case 1:
                (snapshots / "X").rename(snapshots / "Z")
                (snapshots / "Z").rename(snapshots / "X")
            case 2:
                other = os.open(path, os.O_RDONLY)
                os.close(os.dup(other))
                os.close(other)
        (snapshots / "X").rmdir()
    assert imgfs("umount", m.point).returncode == 0


def test_a_snapshot_of_what_was_just_written_through(mount: Mounter, disk: Path) -> None:
    m = mount(disk, "-o", "write=through")
    for turn in range(ROUNDS):
        fd = os.open(m.point / "disk.raw", os.O_RDWR)
        os.pwrite(fd, bytes([turn % 256]) * 8192, 4096)
        os.close(fd)
        (m.point / "snapshots/X").mkdir()
        (m.point / "snapshots/X").rmdir()
    assert imgfs("umount", m.point).returncode == 0


def test_what_is_open_is_busy(mount: Mounter, disk: Path) -> None:
    m = mount(disk, "-o", "write=through")
    (m.point / "snapshots/X").mkdir()
    raw = m.point / "snapshots/X/X.raw"
    with raw.open("rb") as file:
        os.close(os.dup(file.fileno()))  # which looks as if that had been the last
        assert failed((m.point / "snapshots/X").rmdir) == errno.EBUSY
    with raw.open("rb") as file:
        process = subprocess.Popen(["sleep", "60"], stdin=file)
    with process:
        assert failed((m.point / "snapshots/X").rmdir) == errno.EBUSY
        process.kill()
    (m.point / "snapshots/X").rmdir()
    with (m.point / "disk.raw").open("r+b"):
        assert failed((m.point / "snapshots/X").mkdir) == errno.EBUSY
    (m.point / "snapshots/X").mkdir()
