"""The command line, and mounts made by it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

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
        # One that has something to save, and nowhere to, stays by itself.
        if not select.select([self.process], [], [], 10)[0]:
            signal.pidfd_send_signal(self.process, signal.SIGKILL)
        os.close(self.process)


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
