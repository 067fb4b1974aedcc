"""A dead mount in the way: ours is taken away, any other is an error."""

from __future__ import annotations

import ctypes
import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgfs.daemon.mounts import is_dead, is_ours_and_dead, mounted_at
from tests.mounts import Mount, imgfs

Mounter = Callable[..., Mount]


def killed(m: Mount) -> None:
    os.kill(m.pid, signal.SIGKILL)
    assert select.select([m.process], [], [], 5)[0]


def test_dead_mount_of_ours_is_taken_away(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse)
    inside = os.open(m.point / "original", os.O_RDONLY)  # keeps it busy
    killed(m)
    assert is_ours_and_dead(str(m.point))
    done = imgfs(sparse, m.point)
    assert done.returncode == 0
    assert done.stderr == f"imgfs: {m.point}: took away the mount of a process that has ended\n"
    assert (m.point / "disk.raw").read_bytes() == sparse.read_bytes()
    os.close(inside)
    assert imgfs("umount", m.point).returncode == 0
    assert mounted_at(str(m.point)) is None  # nothing was below


def test_live_mount_of_ours_stays(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse)
    done = imgfs(sparse, m.point)
    assert (done.returncode, done.stderr) == (1, f"imgfs: {m.point}: is a mount point already\n")
    assert (m.point / "disk.raw").read_bytes() == sparse.read_bytes()


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """Makes mounts whose FUSE device was closed before anything was answered; root only."""
    libc = ctypes.CDLL(None, use_errno=True)
    made: list[bytes] = []

    def make(fstype: str, uid: int) -> Path:
        point = tmp_path / f"dead{len(made)}"
        point.mkdir()
        device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={device},rootmode=40000,user_id={uid},group_id=0"
        path = os.fsencode(point)
        if libc.mount(b"test", path, fstype.encode(), 0, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), "mount")
        made.append(path)
        os.close(device)
        assert uid or is_dead(str(point))  # of another user's mount the kernel tells us nothing
        return point

    yield make
    for path in made:
        libc.umount2(path, 2)


@pytest.mark.parametrize(("fstype", "uid"), [("fuse.other", 0), ("fuse.imgfs", 1234)])
def test_dead_mount_of_another_stays(
    dead: Callable[[str, int], Path], sparse: Path, fstype: str, uid: int
) -> None:
    point = dead(fstype, uid)
    done = imgfs(sparse, point)
    assert done.returncode == 1
    said = f"a dead mount is in the way; run: fusermount3 -u {point}"
    assert done.stderr == f"imgfs: {point}: {'Permission denied' if uid else said}\n"
    entry = mounted_at(str(point))
    assert entry is not None
    assert entry.fstype == fstype


def test_mount_point_with_an_odd_name(tmp_path: Path, sparse: Path) -> None:
    """mountinfo writes blanks and backslashes as octal numbers."""
    point = tmp_path / "a b\\040\tc\n"
    point.mkdir()
    assert imgfs(sparse, point).returncode == 0
    entry = mounted_at(str(point))
    assert entry is not None
    assert entry.fstype == "fuse.imgfs"
    assert entry.device == point.stat().st_dev
    assert imgfs("umount", point).returncode == 0
    assert mounted_at(str(point)) is None
