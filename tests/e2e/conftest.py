"""A real mount for each test, always taken down again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

IMGFS = [sys.executable, "-m", "imgfs.cli.main"]
MIB = 1 << 20


def imgfs(*words: object, timeout: float = 20) -> subprocess.CompletedProcess[str]:
    command = [*IMGFS, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


class Mount:
    """A mount under way; `pid` is its process."""

    def __init__(self, source: Path | str, point: Path, *options: str, says: str = "") -> None:
        self.point = point
        done = imgfs(source, point, *options)
        assert done.returncode == 0
        assert says in done.stderr if says else not done.stderr
        self.pid = int(self.status()["pid"])  # type: ignore[call-overload]
        self.process = os.pidfd_open(self.pid)

    def status(self) -> dict[str, object]:
        text = (self.point / ".imgfs/status.json").read_text()
        result: dict[str, object] = json.loads(text)
        return result

    def take_down(self) -> None:
        subprocess.run(
            ["fusermount3", "-uzq", str(self.point)], timeout=20, check=False, capture_output=True
        )
        os.close(self.process)


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cache", "state"):
        monkeypatch.setenv(f"XDG_{name.upper()}_HOME", str(tmp_path / name))


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Mount]]:
    mounts: list[Mount] = []

    def make(source: Path | str, *options: str, says: str = "") -> Mount:
        point = tmp_path / f"mnt{len(mounts)}"
        point.mkdir()
        mounts.append(Mount(source, point, *options, says=says))
        return mounts[-1]

    yield make
    for each in mounts:
        each.take_down()


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """An image of 64 MiB and 1000 bytes: data at 0, 5 MiB, 20 MiB and the last bytes; synced."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(64 * MIB + 1000)
        for offset, size in ((0, 8192), (5 * MIB, 3 * MIB), (20 * MIB, 4096), (64 * MIB, 1000)):
            file.seek(offset)
            file.write(os.urandom(size))
        os.fsync(file.fileno())
    return path


def kill_readers_of(raw: Path, send: Callable[[int], None]) -> None:
    """What reads from a server that is frozen, which `send` sends signals to, can be killed."""
    send(signal.SIGSTOP)
    try:
        dd = ["dd", f"if={raw}", "of=/dev/null", "bs=64k", "status=none"]
        readers = [subprocess.Popen([*dd, *more]) for more in ([], ["iflag=direct"])]
        time.sleep(0.5)
        for process in readers:
            process.kill()
            process.wait(1.5)
    finally:
        send(signal.SIGCONT)
