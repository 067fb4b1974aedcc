"""Real servers for tests and benches, on loopback, with everything they need in one directory.

    with Sshd(tmp_path) as server:
        source = await hosts.open(parse(server.url(path)), server.settings())
        server.freeze()

Only processes that were started here are ever signalled, by their ids.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_from_bytes

if TYPE_CHECKING:
    from imgfs.sources.ssh_settings import SshSettings

SSHD = "/usr/sbin/sshd"
START_S = 10.0


def free_port() -> int:
    """A loopback port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, itself not included."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The command's name, in brackets, may hold anything; what follows it does not.
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    todo = [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def make_key(path: Path) -> Path:
    """A key pair without a passphrase: `path` and `path`.pub."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(command, check=True, timeout=30)
    return path


class Sshd:
    """An OpenSSH server that lets the present user in with a key of its own.

    `config` is more lines of sshd_config, for instance "ForceCommand internal-sftp" or
    "SetEnv PATH=/nowhere"; it takes effect at the next `start`.  As root it needs
    /run/sshd, which it makes.
    """

    def __init__(self, directory: Path, *config: str) -> None:
        self.directory = directory / f"sshd{free_port()}"
        self.directory.mkdir(parents=True)
        self.host = "127.0.0.1"
        self.port = free_port()
        self.user = getpass.getuser()
        self.config = list(config)
        self.host_key = make_key(self.directory / "host_key")
        self.identity = make_key(self.directory / "user_key")
        self.known_hosts = self.directory / "known_hosts"
        self.authorized_keys = self.directory / "authorized_keys"
        self.log = self.directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self.trust(self.host_key)
        self.authorized_keys.write_bytes(self.identity.with_suffix(".pub").read_bytes())

    def trust(self, host_key: Path) -> None:
        """Make known_hosts say that the server's key is this one."""
        public = host_key.with_suffix(".pub").read_text()
        self.known_hosts.write_text(f"[{self.host}]:{self.port} {public}")

    # What a client needs

    def url(self, path: str | os.PathLike[str]) -> str:
        """The ssh:// URL of a path on the server, percent-encoded."""
        return f"ssh://{self.user}@{self.host}:{self.port}{quote_from_bytes(os.fsencode(path))}"

    def settings(self, **changes: Any) -> SshSettings:
        """imgfs's settings for this server; `changes` are its fields."""
        from imgfs.sources.ssh_settings import SshSettings

        fields = {"known_hosts": str(self.known_hosts), "identity": str(self.identity)}
        return SshSettings(**{**fields, **changes})

    def mount_options(self) -> str:
        """The same for `imgfs mount -o`."""
        return f"known_hosts={self.known_hosts},identity={self.identity}"

    def ssh_arguments(self) -> list[str]:
        """The same for ssh, scp, sftp and sshfs, all as -o options."""
        options = [
            f"Port={self.port}",
            f"User={self.user}",
            f"IdentityFile={self.identity}",
            f"UserKnownHostsFile={self.known_hosts}",
            "IdentitiesOnly=yes",
            "BatchMode=yes",
        ]
        return [word for option in options for word in ("-o", option)]

    # Its life

    def start(self) -> Sshd:
        """Start it, again on the same port if it ran before; returns when it answers."""
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        path = self.directory / "sshd_config"
        path.write_text("\n".join(self._lines()) + "\n")
        self._process = subprocess.Popen([SSHD, "-D", "-f", str(path), "-E", str(self.log)])
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"sshd did not start: {self.log.read_text()}")
            time.sleep(0.02)
        return self

    def kill(self) -> None:
        """SIGKILL for the server and every session of it; returns when they are gone."""
        if self._process is None:
            return
        # Stopped first, so that nothing forks while we look.
        for pid in self.pids():
            self._signal(pid, signal.SIGSTOP)
        pids = self.pids()
        for pid in pids:
            self._signal(pid, signal.SIGKILL)
        self._process.wait(timeout=10)
        deadline = time.monotonic() + 10
        while any(self._alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._process = None

    stop = kill

    def kill_sessions(self) -> None:
        """SIGKILL for the sessions only: connections break, new ones are taken."""
        if self._process is not None:
            for pid in descendants(self._process.pid):
                self._signal(pid, signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP for all of it: connections stay, nothing is answered."""
        for pid in self.pids():
            self._signal(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo `freeze`."""
        for pid in self.pids():
            self._signal(pid, signal.SIGCONT)

    def pids(self) -> list[int]:
        """The server's process and those of its sessions."""
        if self._process is None:
            return []
        return [self._process.pid, *descendants(self._process.pid)]

    def __enter__(self) -> Sshd:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _lines(self) -> list[str]:
        return [
            f"ListenAddress {self.host}:{self.port}",
            f"HostKey {self.host_key}",
            f"AuthorizedKeysFile {self.authorized_keys}",
            f"PidFile {self.directory / 'pid'}",
            "StrictModes no",
            "UsePAM no",
            "PermitRootLogin prohibit-password",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "MaxStartups 100",
            "MaxSessions 100",
            "LogLevel VERBOSE",
            *self.config,
            *([] if any("Subsystem" in line for line in self.config) else [_subsystem()]),
        ]

    def _answers(self) -> bool:
        try:
            with socket.create_connection((self.host, self.port), timeout=1) as link:
                return link.recv(4) == b"SSH-"
        except OSError:
            return False

    @staticmethod
    def _signal(pid: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    @staticmethod
    def _alive(pid: int) -> bool:
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return False
        return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")


def _subsystem() -> str:
    """The server's sftp as a program of its own where there is one, as distributions have it."""
    for program in ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server"):
        if Path(program).exists():
            return f"Subsystem sftp {program}"
    return "Subsystem sftp internal-sftp"
