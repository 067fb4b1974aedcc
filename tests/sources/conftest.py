"""An image, and images opened through a real sshd."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from imgfs.sources.ssh.source import SshHosts, SshSource
from imgfs.url.source import SshUrl, parse
from tests.servers.ssh import Sshd

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """8 MiB and 1000 bytes: data at 0, 1 MiB (2 MiB of it) and in the last bytes; synced."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(8 * MIB + 1000)
        for offset, length in ((0, 8192), (MIB, 2 * MIB), (8 * MIB, 1000)):
            file.seek(offset)
            file.write(os.urandom(length))
        os.fsync(file.fileno())
    return path


def url_of(server: Sshd, path: Path) -> SshUrl:
    url = parse(server.url(path))
    assert isinstance(url, SshUrl)
    return url


@asynccontextmanager
async def opened(server: Sshd, path: Path, **settings: Any) -> AsyncIterator[SshSource]:
    """The path through the server, with connections of its own."""
    hosts = SshHosts()
    try:
        source = await hosts.open(url_of(server, path), server.settings(**settings))
        yield source
        await source.aclose()
    finally:
        with trio.CancelScope(shield=True):
            await hosts.aclose()


def run(function: Callable[[], Awaitable[Any]], limit_s: float = 30) -> Any:
    """trio.run with a limit; what was left over after it is a failure."""

    async def limited() -> Any:
        with trio.fail_after(limit_s):
            return await function()

    return trio.run(limited)
