"""The disk that snapshots are kept on is full, or fails, in the middle of writing."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgfs.daemon.mounts import mounted_at
from tests.mounts import MIB, Mount, imgfs
from tests.small import BLOCK, ext4, faults, fill, holds, resize, scatter, tmpfs

from .test_mount_signals import wait_until
from .test_state_gone import failed

Mounter = Callable[..., Mount]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    return path


@pytest.fixture(params=["tmpfs", "ext4"])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "state"
    if request.param == "tmpfs":
        with tmpfs(path, "16m"):
            yield path
    else:
        with ext4(path, tmp_path / "state.ext4", 24):
            yield path


@pytest.mark.parametrize("size", [BLOCK, MIB])
def test_writing_goes_on_when_there_is_room(
    mount: Mounter, disk: Path, state: Path, size: int
) -> None:
    """What was written before the error, and what was synced, is all there; now and later."""
    m = mount(disk)
    (m.point / "snapshots/X").mkdir()
    raw = m.point / "snapshots/X/X.raw"
    blocks = list(range(64 * MIB // size))
    random.Random(size).shuffle(blocks)
    content: dict[int, bytes] = {}
    ballast = state / "ballast"
    with raw.open("r+b", buffering=0) as file:
        fd, turn = file.fileno(), 0

        def put(block: int) -> None:
            if os.pwrite(fd, bytes([turn]) * size, block * size) < size:
                raise OSError(errno.ENOSPC, "some of it was written")
            content[block] = bytes([turn]) * size

        for turn in range(1, 4):
            for block in blocks[turn * 2 : turn * 2 + 2]:
                put(block)
            os.fsync(fd)
            fill(ballast)
            unsure = None
            for block in blocks[turn * 10 :]:
                number = failed(lambda at=block: put(at))
                if number is not None:
                    assert number == errno.ENOSPC
                    unsure = block  # a part of it may be there
                    break
            assert unsure is not None
            number = failed(lambda: os.fsync(fd))  # the log may need a block, too
            assert number in (None, errno.ENOSPC)
            ballast.unlink()
            wait_until(lambda: failed(lambda: os.fsync(fd)) is None, 20)
            put(unsure)
            os.fsync(fd)
            for block, wanted in content.items():
                assert os.pread(fd, size, block * size) == wanted
    os.kill(m.pid, signal.SIGKILL)
    assert imgfs("umount", m.point).returncode == 1
    m = mount(disk)
    with (m.point / "snapshots/X/X.raw").open("rb") as file:
        for block, wanted in content.items():
            assert os.pread(file.fileno(), size, block * size) == wanted


def test_a_snapshot_can_be_deleted_to_make_room(mount: Mounter, disk: Path, state: Path) -> None:
    """Also one that cannot be made durable any more."""
    m = mount(disk)
    for name in "AB":
        (m.point / "snapshots" / name).mkdir()
    a, b = (m.point / f"snapshots/{name}/{name}.raw" for name in "AB")
    assert scatter(b, range(4)) == [0, 1, 2, 3]
    written = scatter(a, range(16384))
    assert len(written) < 16384
    fill(state / "ballast")
    (m.point / "snapshots/A").rmdir()
    assert len(scatter(b, range(0, 400, 2))) == 200
    assert imgfs("umount", m.point).returncode == 0
    m = mount(disk)
    assert [path.name for path in (m.point / "snapshots").iterdir()] == ["B"]
    assert holds(m.point / "snapshots/B/B.raw", list(range(0, 400, 2)))


def test_other_snapshots_are_saved(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    """What is lost of one is no reason to lose another."""
    with tmpfs(tmp_path / "state", "1200k"):
        m = mount(disk)
        for name in "AB":
            (m.point / "snapshots" / name).mkdir()
        a, b = (m.point / f"snapshots/{name}/{name}.raw" for name in "AB")
        assert scatter(b, range(8), byte=b"b") == list(range(8))
        scatter(a, range(0, 4096, 2))
        done = imgfs("umount", "--force", m.point)
        assert done.returncode == 1
        assert "disk/A: its last" in done.stderr
        assert "disk/B" not in done.stderr
        resize(tmp_path / "state", "8m")
        m = mount(disk)
        assert holds(m.point / "snapshots/B/B.raw", list(range(8)), b"b")
        assert imgfs("umount", m.point).returncode == 0


def test_a_disk_that_fails(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    """Linux tells once that something is lost: so it stays lost, is said, and nothing waits."""
    m = mount(disk)
    (m.point / "snapshots/X").mkdir()
    raw = m.point / "snapshots/X/X.raw"
    with raw.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"a" * BLOCK, 0)
        os.fsync(file.fileno())
        os.pwrite(file.fileno(), b"b" * BLOCK, BLOCK)
        data = next((tmp_path / "state/imgfs").glob("*/layers/*/data"))
        with faults(m.pid, data, "fdatasync:error=EIO:when=1"):
            assert failed(lambda: os.fsync(file.fileno())) == errno.EIO
        assert failed(lambda: os.fsync(file.fileno())) == errno.EIO
    done = imgfs("umount", m.point)
    assert done.returncode == 1
    assert "disk/X: its last 4096 bytes may be lost: " in done.stderr
    assert "; copy what can still be read and unmount again, or --force gives" in done.stderr
    assert raw.read_bytes()[: 2 * BLOCK] == b"a" * BLOCK + b"b" * BLOCK
    subprocess.run(["fusermount3", "-u", m.point], check=True, timeout=20)
    wait_until(lambda: not Path(f"/proc/{m.pid}").exists(), 20)
    assert mounted_at(str(m.point)) is None
    m = mount(disk)
    assert (m.point / "snapshots/X/X.raw").read_bytes()[:BLOCK] == b"a" * BLOCK
