"""Real NBD servers for the tests, ended by their own pids."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

from imgfs.sources.nbd.settings import NbdSettings
from tests.servers.ports import free_port


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while not path.exists() or not path.stat().st_size:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no server: {process.args!r}")
        time.sleep(0.005)


class NbdServer:
    """nbdkit or qemu-nbd on a unix socket, or with `tcp` on a port of 127.0.0.1."""

    def __init__(
        self, directory: Path, *words: object, tcp: bool = False, write: bool = False
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.read_only = [] if write else ["-r"]
        self.directory = directory
        self.socket = directory / "socket"
        self.port = free_port() if tcp else None
        self.words = words
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def command(self, pid: Path) -> Sequence[object]:
        raise NotImplementedError

    def start(self) -> None:
        pid = self.directory / "pid"
        pid.unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)
        with (self.directory / "log").open("ab") as log:
            command = [str(word) for word in self.command(pid)]
            self._process = subprocess.Popen(command, stderr=log, stdout=log)
        wait_for(pid, self._process)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def has_ended(self) -> bool:
        """By itself."""
        return self._process is not None and self._process.poll() is not None

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def url(self, export: bytes = b"", *, tls: bool = False, **parameters: object) -> str:
        """`tls_psk_file=` is the parameter tls-psk-file; `user=` is not a parameter."""
        scheme = "nbds" if tls else "nbd"
        user = f"{parameters.pop('user')}@" if "user" in parameters else ""
        items = {name.replace("_", "-"): value for name, value in parameters.items()}
        if self.port is None:
            items["socket"] = self.socket
        query = "&".join(f"{name}={value}" for name, value in items.items())
        start = f"{scheme}+unix://{user}" if self.port is None else ""
        start = start or f"{scheme}://{user}127.0.0.1:{self.port}"
        return f"{start}/{quote_from_bytes(export)}" + (f"?{query}" if query else "")

    def settings(self, **changes: Any) -> NbdSettings:
        return NbdSettings(**changes)

    def log(self) -> str:
        return (self.directory / "log").read_text()


class Nbdkit(NbdServer):
    """`words` are nbdkit's: options, filters, the plugin and their parameters."""

    def command(self, pid: Path) -> Sequence[object]:
        where = ["-U", self.socket]
        if self.port is not None:
            where = ["-i", "127.0.0.1", "-p", self.port]  # type: ignore[list-item]
        return ["nbdkit", "-f", *self.read_only, "-P", pid, *where, *self.words]


class QemuNbd(NbdServer):
    """`words` are qemu-nbd's: options and the image."""

    def command(self, pid: Path) -> Sequence[object]:
        where = ["-k", self.socket]
        if self.port is not None:
            where = ["-b", "127.0.0.1", "-p", self.port]  # type: ignore[list-item]
        return ["qemu-nbd", *self.read_only, "-t", "-e", 8, "--pid-file", pid, *where, *self.words]


def make_psk(directory: Path, user: str) -> Path:
    path = directory / f"psk-{user}"
    subprocess.run(["psktool", "-u", user, "-p", path], check=True, capture_output=True)
    return path


def make_certificates(directory: Path, *names: str) -> Path:
    """A directory with a new authority's certificate, and a server's and a client's for `names`."""
    directory.mkdir()

    def openssl(*words: object) -> None:
        command = ["openssl", *map(str, words)]
        subprocess.run(command, check=True, capture_output=True, cwd=directory)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(*new, "-x509", "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-subj", "/CN=tests")
    (directory / "names").write_text("subjectAltName=" + ",".join(names))
    for role in ("server", "client"):
        key, request, cert = f"{role}-key.pem", f"{role}.csr", f"{role}-cert.pem"
        openssl(*new, "-keyout", key, "-out", request, "-subj", f"/CN={role}")
        sign = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-extfile", "names")
        openssl("x509", "-req", "-in", request, "-out", cert, *sign, "-days", 2, "-CAcreateserial")
    with contextlib.suppress(FileNotFoundError):
        (directory / "ca-cert.srl").unlink()
    return directory
