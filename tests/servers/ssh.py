"""A real sshd for the tests, on loopback, ended by its own pids."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

from imgfs.sources.ssh.settings import SshSettings
from tests.servers.ports import free_port


class Sshd:
    """OpenSSH's sshd with keys of its own in `directory`; `config` is more of sshd_config.

    `prefix` is a command that executes the one that follows.
    """

    def __init__(self, directory: Path, prefix: Sequence[str] = (), **config: str) -> None:
        self.directory = directory
        self.prefix = prefix
        self.config = config
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        for name in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True
            )
        (directory / "authorized").write_bytes((directory / "user.pub").read_bytes())
        self._key = " ".join((directory / "host.pub").read_text().split()[:2])
        self.trust(self.port)
        Path("/run/sshd").mkdir(exist_ok=True)
        self.start()

    def start(self) -> None:
        settings = {
            "Port": self.port,
            "ListenAddress": "127.0.0.1",
            "HostKey": self.directory / "host",
            "AuthorizedKeysFile": self.directory / "authorized",
            "StrictModes": "no",
            "UsePAM": "no",
            "PidFile": "none",
            "Subsystem": "sftp /usr/lib/openssh/sftp-server",
            # A person's start-up files may do anything, and leave a lock when they are killed.
            "SetEnv": f"HOME={self.directory}",
            **self.config,
        }
        words = [w for name, value in settings.items() for w in ("-o", f"{name}={value}")]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self.prefix, "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", *words], stderr=log
            )
        for _ in range(200):
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError((self.directory / "log").read_text())

    def pids(self) -> list[int]:
        """The listener and everything below it."""
        assert self._process is not None
        found, queue = [], [self._process.pid]
        while queue:
            pid = queue.pop()
            found.append(pid)
            try:
                tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            except OSError:
                continue
            queue += [int(word) for word in tasks.split()]
        return found

    def send(self, number: signal.Signals) -> None:
        """To the listener and every session."""
        for pid in self.pids():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def stop(self) -> None:
        if self._process is not None:
            self.send(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def trust(self, port: int) -> None:
        """Make the host key known for one more port (a proxy's)."""
        with (self.directory / "known").open("a") as file:
            file.write(f"[127.0.0.1]:{port} {self._key}\n")

    def url(self, path: Path, port: int | None = None) -> str:
        return f"ssh://root@127.0.0.1:{port or self.port}{quote_from_bytes(os.fsencode(path))}"

    def kill_sessions(self) -> None:
        """Connections break; the listener goes on."""
        for pid in self.pids()[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def settings(self, **changes: Any) -> SshSettings:
        """How imgfs gets in."""
        known, identity = str(self.directory / "known"), str(self.directory / "user")
        return SshSettings(**{"known_hosts": known, "identity": identity, **changes})

    @property
    def options(self) -> str:
        return f"known_hosts={self.directory / 'known'},key={self.directory / 'user'}"
