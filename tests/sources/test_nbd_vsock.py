"""NBD over vsock, through the kernel's loopback where there is one (module vsock_loopback)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import trio

from imgfs.errors import SourceUnreachable
from tests.servers.nbd import Nbdkit

from .conftest import run
from .nbd import opened, refused

LOCAL = 1  # VMADDR_CID_LOCAL
SIZE = 300_000


def loops_back() -> bool:
    """Can two processes of this machine talk over vsock?"""
    try:
        with (
            socket.socket(socket.AF_VSOCK) as listener,
            socket.socket(socket.AF_VSOCK) as client,
        ):
            listener.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
            listener.listen()
            client.settimeout(1)
            client.connect((LOCAL, listener.getsockname()[1]))
            return True
    except OSError:
        return False


class OverVsock(Nbdkit):
    """nbdkit on a vsock port of its own."""

    vsock_port = 20_000 + os.getpid() % 40_000

    def command(self, pid: Path) -> Sequence[object]:
        where = ["--vsock", "-p", self.vsock_port]
        return ["nbdkit", "-f", "-r", "-P", pid, *where, *self.words]


def test_vsock(tmp_path: Path) -> None:
    url = f"nbd+vsock://{LOCAL}:{OverVsock.vsock_port}/"
    if not loops_back():
        begun = time.monotonic()
        said = refused(url, SourceUnreachable, timeout_s=20)
        assert said.startswith(f"{url}: ")
        assert time.monotonic() - begun < 25
        return
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(SIZE))
    server = OverVsock(tmp_path / "nbd", "file", disk)

    async def main() -> None:
        with trio.fail_after(20):
            async with opened(url, timeout_s=10) as source:
                assert source.size == SIZE
                assert bytes(await source.read(0, SIZE)) == disk.read_bytes()

    try:
        run(main)
    finally:
        server.stop()
