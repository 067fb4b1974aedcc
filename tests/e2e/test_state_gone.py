"""The directory that snapshots are kept in is removed, moved or replaced under a mount."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts import MIB, Mount, imgfs

from .test_mount_signals import wait_until

Mounter = Callable[..., Mount]
BLOCK = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MIB))
    return path


def failed(action: Callable[[], object]) -> int | None:
    """The errno, or None where it succeeded."""
    try:
        action()
    except OSError as exc:
        return exc.errno
    return None


def write_and_sync(fd: int, data: bytes) -> None:
    os.pwrite(fd, data, 0)
    os.fsync(fd)


def remove(state: Path) -> None:
    shutil.rmtree(state)


def move(state: Path) -> None:
    state.rename(state.with_name("elsewhere"))


def replace(state: Path) -> None:
    move(state)
    shutil.copytree(state.with_name("elsewhere"), state)


def last_error(m: Mount) -> str:
    images = m.status()["images"]
    assert isinstance(images, dict)
    return str(images["disk"]["last_error"])


@pytest.mark.parametrize("harm", [remove, move, replace])
@pytest.mark.parametrize("what", ["imgfs", "imgfs/disk.img-*", "imgfs/disk.img-*/layers"])
def test_writes_fail(
    mount: Mounter, disk: Path, tmp_path: Path, harm: Callable[[Path], None], what: str
) -> None:
    content = disk.read_bytes()
    m = mount(disk)
    (m.point / "snapshots/X").mkdir()
    raw = m.point / "snapshots/X/X.raw"
    with raw.open("r+b", buffering=0) as file:
        fd = file.fileno()
        write_and_sync(fd, b"a" * BLOCK)
        harm(next((tmp_path / "state").glob(what)))
        wait_until(lambda: failed(lambda: write_and_sync(fd, b"b" * BLOCK)) == errno.EIO, 20)
        wait_until(lambda: failed(lambda: os.pwrite(fd, b"c" * BLOCK, 0)) == errno.EIO, 20)
        assert "when it was mounted; bring that one back" in last_error(m)
        assert os.pread(fd, BLOCK, BLOCK) == content[BLOCK : 2 * BLOCK]
        assert os.pread(fd, 1, 0) in (b"a", b"b")
    done = imgfs("umount", m.point)
    assert done.returncode == 1
    assert "disk/X: its last" in done.stderr
    assert (m.point / "disk.raw").read_bytes() == content
    done = imgfs("umount", "--force", m.point)
    assert done.returncode == 1
    assert "are lost: " in done.stderr
    assert disk.read_bytes() == content


@pytest.mark.parametrize("harm", [remove, move])
def test_no_other_state_takes_its_place(
    mount: Mounter, disk: Path, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    m = mount(disk)
    snapshots = m.point / "snapshots"
    (snapshots / "X").mkdir()
    harm(tmp_path / "state/imgfs")
    for action in (
        (snapshots / "Y").mkdir,
        (snapshots / "X").rmdir,
        lambda: (snapshots / "X").rename(snapshots / "Z"),
        lambda: list(snapshots.iterdir()),
    ):
        assert failed(action) == errno.EIO
        assert "bring that one back" in last_error(m)
    assert not (tmp_path / "state/imgfs").exists()
    assert imgfs("umount", m.point).returncode == 0  # nothing of it was open
    assert list(mount(disk).point.joinpath("snapshots").iterdir()) == []


def test_it_goes_on_when_it_is_back(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    m = mount(disk)
    (m.point / "snapshots/X").mkdir()
    raw, state = m.point / "snapshots/X/X.raw", tmp_path / "state/imgfs"
    with raw.open("r+b", buffering=0) as file:
        fd = file.fileno()
        os.pwrite(fd, b"a" * BLOCK, 0)
        state.rename(tmp_path / "elsewhere")
        wait_until(lambda: failed(lambda: os.fsync(fd)) == errno.EIO, 20)
        wait_until(lambda: failed(lambda: os.pwrite(fd, b"b" * BLOCK, 0)) == errno.EIO, 20)
        os.kill(m.pid, signal.SIGTERM)
        wait_until(lambda: "bring that one back" in str(m.status().get("last_error")), 20)
        (tmp_path / "elsewhere").rename(state)
    assert imgfs("umount", m.point).returncode in (0, 1)  # it may have ended just before
    m = mount(disk)
    assert (m.point / "snapshots/X/X.raw").read_bytes()[:BLOCK] in (b"a" * BLOCK, b"b" * BLOCK)


def test_state_without_snapshots_may_go(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    m = mount(disk)
    for name in ("X", "Y"):
        (m.point / "snapshots" / name).mkdir()
        (m.point / "snapshots" / name).rmdir()
        shutil.rmtree(tmp_path / "state")
    (m.point / "snapshots/X").mkdir()
    assert [path.name for path in (m.point / "snapshots").iterdir()] == ["X"]


@pytest.mark.parametrize("synced", [False, True])
def test_a_process_without_anything_to_save_ends(
    mount: Mounter, disk: Path, tmp_path: Path, synced: bool
) -> None:
    """Also when the snapshots that it has open are gone."""
    m = mount(disk)
    raw = m.point / "snapshots/X/X.raw"
    raw.parent.mkdir()
    if synced:
        with raw.open("r+b", buffering=0) as file:
            write_and_sync(file.fileno(), b"a" * BLOCK)
            os.fsync(file.fileno())
    assert len(raw.read_bytes()) == MIB
    if synced:  # a commit that Python knows of, whoever made the others
        (m.point / ".imgfs/sync.json").read_bytes()
    move(tmp_path / "state/imgfs")
    subprocess.run(["fusermount3", "-u", str(m.point)], check=True, timeout=20)
    assert select.select([m.process], [], [], 20)[0]
