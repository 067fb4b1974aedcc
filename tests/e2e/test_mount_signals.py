"""A signal at any moment ends in nothing mounted and nothing running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgfs.daemon.mounts import mounted_at
from tests.mounts import IMGFS, Mount
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]
STEPS = 60 if os.environ.get("IMGFS_TEST_LONG") else 8


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "point"
    path.mkdir()
    yield path
    subprocess.run(["fusermount3", "-uzq", path], timeout=20, check=False, capture_output=True)


def start(*words: object) -> subprocess.Popen[str]:
    command = [*IMGFS, *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def processes(point: Path) -> list[int]:
    """Those that have the mount point among their words."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(point) in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def wait_until(true: Callable[[], bool], within_s: float = 10) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def nothing_left(point: Path) -> None:
    wait_until(lambda: not processes(point))
    assert mounted_at(str(point)) is None


@pytest.mark.parametrize("words", [["-f"], []], ids=["foreground", "background"])
def test_signal_at_any_moment(point: Path, sparse: Path, words: list[str]) -> None:
    """From the fork to after the mount, which takes a third of a second or so to be there."""
    begun = time.monotonic()
    process = start(sparse, point, *words)
    wait_until(lambda: mounted_at(str(point)) is not None)
    took = time.monotonic() - begun
    for pid in processes(point):
        os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=20)
    nothing_left(point)
    for step in range(STEPS):
        process = start(sparse, point, *words)
        time.sleep(took * 1.3 * step / STEPS)
        process.send_signal(signal.SIGTERM if step % 2 else signal.SIGINT)
        with process:
            process.communicate(timeout=20)
        if process.returncode == 0 and not words:  # was ready before the signal came
            for pid in processes(point):
                os.kill(pid, signal.SIGTERM)
        nothing_left(point)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_as_soon_as_it_is_mounted(point: Path, sparse: Path, number: signal.Signals) -> None:
    """Before INIT is answered, as like as not."""
    process = start("-f", sparse, point)
    wait_until(lambda: mounted_at(str(point)) is not None)
    process.send_signal(number)
    said = process.communicate(timeout=20)[1]
    assert process.returncode in (0, 1)
    assert said in ("", f"imgfs: stopped by {number.name} before the mount was ready\n")
    nothing_left(point)


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Sshd]:
    """A server that takes connections and never says a word."""
    directory = tmp_path / "sshd"
    directory.mkdir()
    server = Sshd(directory)
    server.send(signal.SIGSTOP)
    yield server
    server.stop()


def is_connected(server: Sshd) -> bool:
    """The kernel takes the connection; field 1 is the local address, field 3 the state."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(
        local.endswith(f":{server.port:04X}") and state == "01"
        for _, local, _, state, *_ in map(str.split, lines)
    )


@pytest.mark.parametrize("words", [["-f"], []], ids=["foreground", "background"])
def test_signal_while_connecting(point: Path, frozen: Sshd, words: list[str]) -> None:
    process = start(frozen.url(point.parent / "x.img"), point, "-o", frozen.options, *words)
    wait_until(lambda: is_connected(frozen), 20)
    assert process.poll() is None
    process.terminate()
    said = process.communicate(timeout=5)[1]
    assert process.returncode == 1
    assert said == "imgfs: stopped by SIGTERM before the mount was ready\n"
    nothing_left(point)


def test_nothing_outlives_a_command_that_is_killed(point: Path, frozen: Sshd) -> None:
    process = start(frozen.url(point.parent / "x.img"), point, "-o", frozen.options)
    wait_until(lambda: is_connected(frozen), 20)
    assert len(processes(point)) == 2
    process.kill()
    process.communicate(timeout=5)
    nothing_left(point)


def test_second_signal_does_not_wait_for_open_files(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse)
    fd = os.open(m.point / "disk.raw", os.O_RDONLY)
    os.kill(m.pid, signal.SIGTERM)
    wait_until(lambda: mounted_at(str(m.point)) is None)
    assert os.pread(fd, 10, 0) == sparse.read_bytes()[:10]
    begun = time.monotonic()
    os.kill(m.pid, signal.SIGTERM)
    wait_until(lambda: not processes(m.point))
    assert time.monotonic() - begun < 5
    with contextlib.suppress(OSError):  # the connection is cut
        os.close(fd)
