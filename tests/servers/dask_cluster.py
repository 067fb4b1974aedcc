"""A real Dask scheduler and real workers for the tests, ended by their own pids."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

DASK = [sys.executable, "-m", "dask"]
#: Small shares; what is copied where; and, while there is a file `slow`, as many seconds as are in
#: it for each piece.
PRELOAD = """\
import os, pathlib, trio
from imgfs.copying import engine, shares

here = pathlib.Path.cwd()
if shares.SHARE != 4 << 20:  # or dask has loaded this before
    share, piece = shares.Work.share, engine.Move._piece
shares.SHARE = 4 << 20

async def told(self):
    with (here / "shares").open("a") as file:
        print(os.getpid(), self._task.share.start, file=file)
    await share(self)

async def slowly(self, *rest):
    if (here / "slow").exists():
        end = trio.current_time() + float((here / "slow").read_text())
        while trio.current_time() < end and (here / "slow").exists():
            await trio.sleep(0.1)
    await piece(self, *rest)

shares.Work.share, engine.Move._piece = told, slowly
"""
LEASE = "3s"


class Cluster:
    """A scheduler in a directory of its own, and its workers."""

    def __init__(self, directory: Path, **environment: str) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.file = directory / "scheduler.json"
        self._processes: list[subprocess.Popen[bytes]] = []
        (directory / "preload.py").write_text(PRELOAD)
        words = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
        self.scheduler = self.start(
            [*DASK, *words, "--scheduler-file", str(self.file)], **environment
        )
        self.wait_for(lambda: self.file.exists() and b"}" in self.file.read_bytes())

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        locks = "DASK_DISTRIBUTED__SCHEDULER__LOCKS__LEASE_"
        leases = {f"{locks}TIMEOUT": LEASE, f"{locks}VALIDATION_INTERVAL": "0.2s"}
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **leases, **environment},
                cwd=self.directory,
            )
        self._processes.append(process)
        return process

    @property
    def workers(self) -> list[subprocess.Popen[bytes]]:
        return [p for p in self._processes if p is not self.scheduler and p.poll() is None]

    def worker(
        self, *words: str, before: tuple[str, ...] = (), preload: str = "", **environment: str
    ) -> subprocess.Popen[bytes]:
        """One with a thread, when the scheduler knows it; `before` is a command that runs it."""
        known = self.log.count("Register worker")
        command = [*before, *DASK, "worker", "--scheduler-file", str(self.file), "--nthreads", "1"]
        command += ["--no-dashboard", "--host", "127.0.0.1", "--death-timeout", "60"]
        command += words or ("--no-nanny", "--preload", str(self.directory / "preload.py"))
        if preload:
            path = self.directory / f"preload{known}.py"
            path.write_text(preload)
            command += ["--preload", str(path)]
        process = self.start(command, **environment)
        self.wait_for(lambda: self.log.count("Register worker") > known)
        return process

    def wait_for(self, is_so: object, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():  # type: ignore[operator]
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited in vain:\n{self.log}")
            time.sleep(0.02)

    def end(self, process: subprocess.Popen[bytes], how: int = signal.SIGKILL) -> None:
        if process in self._processes:
            self._processes.remove(process)
            process.send_signal(how)
            process.wait(20)

    def stop(self) -> None:
        for process in reversed([*self._processes]):
            self.end(process)

    # What the preloaded file does.

    @property
    def shares(self) -> list[tuple[int, int]]:
        """The process that copied each, and where it begins."""
        path = self.directory / "shares"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(pid), int(start)) for pid, start in map(str.split, lines)]

    def shares_of(self, pid: int) -> list[int]:
        return [start for each, start in self.shares if each == pid]

    def forget(self) -> None:
        (self.directory / "shares").unlink(missing_ok=True)
        (self.directory / "slow").unlink(missing_ok=True)

    def be_slow(self, seconds: float = 1) -> None:
        """Of each piece, until `forget`."""
        (self.directory / "slow").write_text(str(seconds))
