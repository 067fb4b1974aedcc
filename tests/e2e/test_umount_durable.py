"""What was written to a snapshot and cannot be made durable: the mount stays until it can be, or it
is given up, and that is said."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgfs.daemon.mounts import mounted_at
from tests.mounts import IMGFS, MIB, Mount, imgfs
from tests.small import BLOCK, holds, resize, scatter, tmpfs

from .test_mount_signals import wait_until

Mounter = Callable[..., Mount]
SCATTERED = range(0, 4096, 2)  # so many ranges that the log needs a block of its own
CANNOT = r"disk/X: its last (\d+) bytes cannot be made durable: No space left on device; "


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "state"
    with tmpfs(path, "1200k"):
        yield path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    return path


def outcomes(pid: int) -> list[Path]:
    """The files in which processes say how they end, of those that this one has open."""
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if "/memfd:imgfs-" in str(each.readlink()):
                found.append(each)
    return found


class Full:
    """A mount whose snapshot X has been written until the state's disk was full."""

    def __init__(self, m: Mount, state: Path) -> None:
        self.m, self.point, self.state = m, m.point, state
        (m.point / "snapshots/X").mkdir()
        self.raw = m.point / "snapshots/X/X.raw"
        self.written = scatter(self.raw, SCATTERED)
        assert len(self.written) > 200

    def place(self) -> Path:
        return next((self.state / "imgfs").iterdir())

    def make_room(self) -> None:
        resize(self.state, "8m")

    def has_ended(self, within_s: float = 0) -> bool:
        return bool(select.select([self.m.process], [], [], within_s)[0])

    def is_mounted(self) -> bool:
        return mounted_at(str(self.point)) is not None

    def outcome(self) -> dict[str, object]:
        """What the process says of its end."""
        (file,) = outcomes(self.m.pid)
        found: dict[str, object] = json.loads(file.read_text() or "{}")
        return found

    def until_it_holds(self) -> None:
        wait_until(lambda: self.outcome().get("state") == "holding", 20)

    def is_there_after_a_remount(self, mount: Mounter, disk: Path) -> bool:
        m = mount(disk)
        found = holds(m.point / "snapshots/X/X.raw", self.written)
        assert imgfs("umount", m.point).returncode == 0
        return found


@pytest.fixture
def full(mount: Mounter, disk: Path, state: Path) -> Iterator[Full]:
    found = Full(mount(disk), state)
    yield found
    found.make_room()
    subprocess.run(["fusermount3", "-uzq", found.point], timeout=20, check=False)
    if not found.has_ended(20):
        signal.pidfd_send_signal(found.m.process, signal.SIGKILL)


def test_the_mount_stays(full: Full, mount: Mounter, disk: Path) -> None:
    done = imgfs("umount", full.point)
    wanted = (
        f"imgfs: {CANNOT}free space in {re.escape(str(full.place()))} and unmount again, or "
        "--force gives them up\n"
    )
    match = re.fullmatch(wanted, done.stderr)
    assert done.returncode == 1, done.stderr
    assert match is not None, done.stderr
    assert int(match[1]) == len(full.written) * BLOCK
    assert full.is_mounted()
    assert holds(full.raw, full.written)
    image = full.m.status()["images"]["disk"]  # type: ignore[index]
    assert image["errors"] >= 1  # the write that found no room
    assert "No space left on device" in image["last_error"]
    full.make_room()
    assert imgfs("umount", full.point).returncode == 0
    assert full.has_ended(5)
    assert full.is_there_after_a_remount(mount, disk)


def test_force_says_what_is_lost(full: Full, mount: Mounter, disk: Path) -> None:
    done = imgfs("umount", "--force", full.point)
    lost = f"disk/X: its last {len(full.written) * BLOCK} bytes are lost: No space left on device"
    assert (done.returncode, done.stderr) == (1, f"imgfs: {lost}\n")
    assert full.has_ended(5)
    assert not full.is_mounted()
    full.make_room()
    m = mount(disk)
    assert (m.point / "snapshots/X/X.raw").read_bytes() == disk.read_bytes()
    assert imgfs("umount", m.point).returncode == 0


def test_force_of_what_is_durable(mount: Mounter, disk: Path) -> None:
    m = mount(disk)
    (m.point / "snapshots/X").mkdir()
    scatter(m.point / "snapshots/X/X.raw", range(4))
    done = imgfs("umount", "--force", m.point)
    assert (done.returncode, done.stderr) == (0, "")
    m = mount(disk)
    assert holds(m.point / "snapshots/X/X.raw", [0, 1, 2, 3])


def test_force_does_not_unmount_what_is_open(full: Full) -> None:
    with full.raw.open("rb"):
        done = imgfs("umount", "--force", full.point)
        assert done.returncode == 1
        assert "busy" in done.stderr.lower()
    assert holds(full.raw, full.written)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_waits_for_space(
    full: Full, mount: Mounter, disk: Path, number: signal.Signals
) -> None:
    os.kill(full.m.pid, number)
    full.until_it_holds()
    assert full.is_mounted()
    assert re.match(CANNOT, str(full.m.status()["last_error"]))
    assert holds(full.raw, full.written)
    full.make_room()
    assert full.has_ended(20)
    assert not full.is_mounted()
    assert full.is_there_after_a_remount(mount, disk)


def foreground(disk: Path, point: Path, **more: str) -> subprocess.Popen[str]:
    command = [*IMGFS, "-f", str(disk), str(point)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **more}
    )
    wait_until(lambda: (point / "disk.raw").exists(), 20)
    return process


@pytest.mark.usefixtures("own_directories")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_gives_up(
    state: Path, disk: Path, tmp_path: Path, number: signal.Signals
) -> None:
    point = tmp_path / "point"
    point.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        process = foreground(disk, point, NOTIFY_SOCKET=str(tmp_path / "notify"))
        try:
            (point / "snapshots/X").mkdir()
            written = scatter(point / "snapshots/X/X.raw", SCATTERED)
            process.send_signal(number)
            said = ""
            while "EXTEND_TIMEOUT_USEC=" not in said:
                said = manager.recv(9999).decode()
            assert re.match(f"STATUS={CANNOT}", said)
            assert mounted_at(str(point)) is not None
            process.send_signal(number)
            log = process.communicate(timeout=30)[1]
        finally:
            process.kill()
            subprocess.run(["fusermount3", "-uzq", point], timeout=20, check=False)
    assert process.returncode == 1
    lines = log.splitlines()
    lost = f"disk/X: its last {len(written) * BLOCK} bytes are lost: No space left on device"
    assert lines[-1] == f"imgfs: {lost}"
    assert len([line for line in lines if "cannot be made durable" in line]) == 1
    assert mounted_at(str(point)) is None


def test_unmounted_by_the_kernel(full: Full, mount: Mounter, disk: Path) -> None:
    """Nothing can be kept up then, but the process stays; imgfs umount waits for it."""
    subprocess.run(["fusermount3", "-u", full.point], check=True, timeout=20)
    full.until_it_holds()
    waiting = subprocess.Popen(
        [*IMGFS, "umount", str(full.point)], stderr=subprocess.PIPE, text=True
    )
    with waiting:
        wait_until(lambda: bool(outcomes(waiting.pid)), 30)
        assert not full.has_ended(1.5)
        full.make_room()
        assert waiting.communicate(timeout=30)[1] == ""
    assert waiting.returncode == 0
    assert full.has_ended(5)
    assert full.is_there_after_a_remount(mount, disk)


def test_unmounted_by_the_kernel_and_given_up(full: Full) -> None:
    subprocess.run(["umount", "-i", full.point], check=True, timeout=20)
    full.until_it_holds()
    os.kill(full.m.pid, signal.SIGTERM)  # as systemd does it: asks, and gives nothing up
    assert not full.has_ended(2)
    done = imgfs("umount", full.point, timeout=40)
    assert done.returncode == 1
    assert f"process {full.m.pid} has not ended yet: disk/X: its last" in done.stderr
    done = imgfs("umount", "--force", full.point)
    assert done.returncode == 1
    assert re.fullmatch(r"imgfs: disk/X: its last \d+ bytes are lost: No space .*\n", done.stderr)
    assert full.has_ended(5)
    done = imgfs("umount", full.point)
    assert (done.returncode, done.stderr) == (
        1,
        f"imgfs: {full.point}: is not a live imgfs mount\n",
    )


def test_killed_while_it_is_waited_for(full: Full) -> None:
    subprocess.run(["fusermount3", "-u", full.point], check=True, timeout=20)
    full.until_it_holds()
    waiting = subprocess.Popen(
        [*IMGFS, "umount", str(full.point)], stderr=subprocess.PIPE, text=True
    )
    with waiting:
        wait_until(lambda: bool(outcomes(waiting.pid)), 30)
        os.kill(full.m.pid, signal.SIGKILL)
        said = waiting.communicate(timeout=30)[1]
    assert waiting.returncode == 1
    assert "was killed; what was written and not synced by then may be lost" in said
