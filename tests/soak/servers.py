"""The servers of a soak, in a process of their own.

A process that starts another closes in that child, before it becomes the other, all files that it
has open: in a mount that waits for a server this waits, too, and Python's other threads with it.
So who is to bring servers back must have nothing open that is behind one.
"""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.servers.nbd import Nbdkit
from tests.servers.ssh import Sshd
from tests.servers.web import Nginx


class Servers:
    """sshd, nginx, and an nbdkit for each of two images; used through `ServersProcess`."""

    def __init__(self, work: Path) -> None:
        self._work = work
        for name in ("sshd", "nginx"):
            (work / name).mkdir()
        self._sshd = Sshd(work / "sshd")
        self._nginx = Nginx(work / "nginx", work / "www")
        self._nbd = Nbdkit(work / "nbd", "file", work / "far/nbd.img")
        self._export = Nbdkit(work / "export", "file", work / "far/export.img", write=True)
        self._all: dict[str, Sshd | Nginx | Nbdkit] = {
            "sshd": self._sshd,
            "nginx": self._nginx,
            "nbd": self._nbd,
            "export": self._export,
        }

    def urls(self) -> dict[str, str]:
        """By the image's name."""
        work = self._work
        return {
            "here": str(work / "here.qcow2"),
            "far": self._sshd.url(work / "far/far.img"),
            "web": self._nginx.url("web.img"),
            "nbd": self._nbd.url(),
            "through": self._sshd.url(work / "far/through.img"),
            "export": self._export.url(),
        }

    def restart(self, name: str, away_s: float) -> None:
        self._all[name].stop()
        time.sleep(away_s)
        self._all[name].start()

    def stall(self, name: str, away_s: float) -> None:
        server = self._all[name]
        assert not isinstance(server, Nginx)
        server.send(signal.SIGSTOP)
        time.sleep(away_s)
        server.send(signal.SIGCONT)

    def kill_sessions(self) -> None:
        self._sshd.kill_sessions()

    def revive(self) -> None:
        """nbdkit 1.32 now and then fails an assertion when a client goes away ("sock >= 0")."""
        for server in (self._nbd, self._export):
            if server.has_ended():
                print("  nbdkit ended by itself, and is started again", file=sys.stderr, flush=True)
                server.stop()
                server.start()

    def stop_all(self) -> None:
        for server in self._all.values():
            server.stop()


def main() -> None:
    """A line of JSON in, [method, arguments...]; another out, with what it returned.

    In the main thread: nbdkit ends with the thread that started it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    servers = Servers(Path(sys.argv[1]))
    try:
        while True:
            if not select.select([sys.stdin], [], [], 1)[0]:
                servers.revive()
                continue
            line = sys.stdin.readline()  # there is one at a time
            if not line:
                break
            name, *arguments = json.loads(line)
            print(json.dumps(getattr(servers, name)(*arguments)), flush=True)
    finally:
        servers.stop_all()


class ServersProcess:
    """Ends with who made it."""

    def __init__(self, work: Path) -> None:
        command = [sys.executable, "-m", "tests.soak.servers", str(work)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def call(self, *words: str | float) -> Any:
        """A method of `Servers` with its arguments.  Raises EOFError when that raised something."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(words)
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate(timeout=30)


if __name__ == "__main__":
    main()
