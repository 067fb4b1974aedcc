"""The servers of a soak, in a process of their own.

A process that starts another closes in that child, before it becomes the other, all files that it
has open: in a mount that waits for a server this waits, too.  So who starts servers must have
nothing open that is behind one.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.nbd_servers import Nbdkit
from tests.servers import Sshd
from tests.webservers import Nginx


class Servers:
    """sshd, nginx, and an nbdkit for each of two images; used through `ServersProcess`."""

    def __init__(self, work: Path) -> None:
        self._work = work
        for name in ("sshd", "nginx"):
            (work / name).mkdir()
        self._all = {
            "sshd": Sshd(work / "sshd"),
            "nginx": Nginx(work / "nginx", work / "www"),
            "nbd": Nbdkit(work / "nbd", "file", work / "far/nbd.img"),
            "export": Nbdkit(work / "export", "file", work / "far/export.img", write=True),
        }

    def urls(self) -> dict[str, str]:
        """By the image's name."""
        work = self._work
        sshd, nginx, nbd, export = self._all.values()
        return {
            "here": str(work / "here.qcow2"),
            "far": sshd.url(work / "far/far.img"),
            "web": nginx.url("web.img"),
            "nbd": nbd.url(),
            "through": sshd.url(work / "far/through.img"),
            "export": export.url(),
        }

    def start(self, name: str) -> None:
        self._all[name].start()

    def stop(self, name: str) -> None:
        self._all[name].stop()

    def send(self, name: str, number: int) -> None:
        self._all[name].send(signal.Signals(number))

    def kill_sessions(self) -> None:
        self._all["sshd"].kill_sessions()

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
        for line in sys.stdin:
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

    def call(self, *words: str | int) -> Any:
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
