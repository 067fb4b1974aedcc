"""A real sshd, and images opened through it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from imgfs.sources.ssh.source import SshHosts, SshSource
from imgfs.url.source import SshUrl, parse
from tests.servers.ssh import Sshd
from tests.servers.web import Nginx

MIB = 1 << 20


@pytest.fixture
def make_sshd(tmp_path: Path) -> Iterator[Callable[..., Sshd]]:
    made: list[Sshd] = []

    def make(**config: str) -> Sshd:
        directory = tmp_path / f"sshd{len(made)}"
        directory.mkdir()
        made.append(Sshd(directory, **config))
        return made[-1]

    yield make
    for server in made:
        server.stop()


@pytest.fixture
def sshd(make_sshd: Callable[..., Sshd]) -> Sshd:
    return make_sshd()


@pytest.fixture
def make_nginx(tmp_path: Path) -> Iterator[Callable[..., Nginx]]:
    """`make_nginx(more="", certificate=None)` serves tmp_path / "www"."""
    made: list[Nginx] = []

    def make(**config: Any) -> Nginx:
        directory, root = tmp_path / f"nginx{len(made)}", tmp_path / "www"
        directory.mkdir()
        root.mkdir(exist_ok=True)
        made.append(Nginx(directory, root, **config))
        return made[-1]

    yield make
    for server in made:
        server.stop()


@pytest.fixture
def nginx(make_nginx: Callable[..., Nginx]) -> Nginx:
    return make_nginx()


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


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes a server of the given class in a directory of its own."""
    made: list[Any] = []

    def make(kind: type[Any], *words: object, **more: Any) -> Any:
        made.append(kind(tmp_path / f"server{len(made)}", *words, **more))
        return made[-1]

    yield make
    for server in made:
        server.stop()


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
