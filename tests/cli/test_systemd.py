"""Word to the service manager, and where log lines go."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgfs.daemon.mounts import mounted_at
from tests.mounts import IMGFS, imgfs

LOGGING = """
import logging, sys
from imgfs.daemon import systemd
{first}
log = logging.getLogger("x")
log.info("not shown")
log.warning("one")
try:
    raise ValueError("bad")
except ValueError:
    log.exception("two")
"""


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "point"
    path.mkdir()
    yield path
    subprocess.run(["fusermount3", "-uzq", path], timeout=20, check=False, capture_output=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


def manager(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(address)
    sock.settimeout(20)
    return sock


@pytest.mark.parametrize("abstract", [False, True])
def test_ready_and_stopping(point: Path, source: Path, tmp_path: Path, abstract: bool) -> None:
    name = f"imgfs-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with manager("\0" + name if abstract else name) as sock:
        env = {**os.environ, "NOTIFY_SOCKET": ("@" if abstract else "") + name}
        command = [*IMGFS, "-f", str(source), str(point)]
        with subprocess.Popen(command, env=env) as process:
            assert sock.recv(999).decode().split("\n") == ["READY=1", f"MAINPID={process.pid}"]
            assert (point / "disk.raw").stat().st_size == 4096
            fd = os.open(point / "disk.raw", os.O_RDONLY)
            process.send_signal(signal.SIGTERM)
            assert sock.recv(999) == b"STOPPING=1"
            assert process.poll() is None  # the file is still open
            os.close(fd)
        assert process.returncode == 0
        assert mounted_at(str(point)) is None


def test_stopping_when_it_is_unmounted(point: Path, source: Path, tmp_path: Path) -> None:
    """And the main process is the one in the background."""
    with manager(str(tmp_path / "notify")) as sock:
        env = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        subprocess.run([*IMGFS, str(source), str(point)], env=env, check=True, timeout=20)
        ready, main = sock.recv(999).decode().split("\n")
        assert ready == "READY=1"
        assert f'"pid": {main.removeprefix("MAINPID=")},' in (
            (point / ".imgfs/status.json").read_text()
        )
        assert imgfs("umount", point).returncode == 0
        assert sock.recv(999) == b"STOPPING=1"


def test_not_ready_when_it_fails(point: Path, source: Path, tmp_path: Path) -> None:
    with manager(str(tmp_path / "notify")) as sock:
        env = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        command = [*IMGFS, "-f", str(source) + "x", str(point)]
        subprocess.run(command, env=env, timeout=20, check=False, capture_output=True)
        assert sock.recv(999) == b"STOPPING=1"


def test_shows_that_it_lives(point: Path, source: Path, tmp_path: Path) -> None:
    with manager(str(tmp_path / "notify")) as sock:
        env = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
        with subprocess.Popen([*IMGFS, "-f", str(source), str(point)], env=env) as process:
            said = [sock.recv(999).decode().split("\n")[0] for _ in range(4)]
            assert sorted(said) == ["READY=1"] + ["WATCHDOG=1"] * 3
            process.terminate()
    assert process.returncode == 0


def test_another_process_is_watched(point: Path, source: Path, tmp_path: Path) -> None:
    with manager(str(tmp_path / "notify")) as sock:
        env = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        env |= {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
        with subprocess.Popen([*IMGFS, "-f", str(source), str(point)], env=env) as process:
            assert sock.recv(999).startswith(b"READY=1")
            process.terminate()
            assert sock.recv(999) == b"STOPPING=1"


def logged(first: str, tmp_path: Path, journal: bool) -> str:
    with (tmp_path / "log").open("w+") as file:
        found = os.fstat(file.fileno())
        stream = f"{found.st_dev}:{found.st_ino if journal else found.st_ino + 1}"
        env = {**os.environ, "JOURNAL_STREAM": stream}
        code = LOGGING.format(first=first)
        subprocess.run([sys.executable, "-c", code], stderr=file, env=env, check=True, timeout=20)
        file.seek(0)
        return file.read()


def test_journal_lines_have_levels(tmp_path: Path) -> None:
    said = logged("systemd.log_to_stderr(0)", tmp_path, journal=True)
    one, two, *trace = said.splitlines()
    assert (one, two) == ("<4>imgfs: one", "<3>imgfs: two")
    assert trace[-1] == "<3>ValueError: bad"
    assert all(line.startswith("<3>") for line in trace)


def test_other_stderr_has_no_levels(tmp_path: Path) -> None:
    said = logged("systemd.log_to_stderr(0)", tmp_path, journal=False)
    assert said.startswith("imgfs: one\nimgfs: two\nTraceback")
    said = logged("systemd.log_to_stderr(1)", tmp_path, journal=False)
    assert "imgfs: x: one\n" in said  # who looks for a fault wants to know


def test_syslog_gets_the_lines(tmp_path: Path) -> None:
    address = str(tmp_path / "syslog")
    with manager(address) as sock:
        first = f"systemd.log_to_stderr(0); systemd.log_to_syslog({address!r})"
        assert logged(first, tmp_path, journal=False) == ""
        said = sock.recv(9999).decode()
        assert said.startswith("<28>imgfs[")  # daemon.warning
        assert said.rstrip("\0").endswith("]: one")
        assert sock.recv(9999).startswith(b"<27>")  # daemon.err


def test_without_syslog_nobody_gets_them(tmp_path: Path) -> None:
    first = f"systemd.log_to_stderr(0); systemd.log_to_syslog({str(tmp_path / 'none')!r})"
    assert logged(first, tmp_path, journal=False) == ""
