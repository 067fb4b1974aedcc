"""Real mounts and servers, taken down and stopped at the end of a test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mounts import MIB, Mount
from tests.servers.ssh import Sshd
from tests.servers.web import Nginx


@pytest.fixture
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cache", "state"):
        monkeypatch.setenv(f"XDG_{name.upper()}_HOME", str(tmp_path / name))


@pytest.fixture
def mount(tmp_path: Path, own_directories: None) -> Iterator[Callable[..., Mount]]:
    mounts: list[Mount] = []

    def make(source: Path | str, *options: str, says: str = "") -> Mount:
        point = tmp_path / f"mnt{len(mounts)}"
        point.mkdir()
        mounts.append(Mount(source, point, *options, says=says))
        return mounts[-1]

    yield make
    for each in mounts:
        each.take_down()


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """An image of 64 MiB and 1000 bytes: data at 0, 5 MiB, 20 MiB and the last bytes; synced."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(64 * MIB + 1000)
        for offset, size in ((0, 8192), (5 * MIB, 3 * MIB), (20 * MIB, 4096), (64 * MIB, 1000)):
            file.seek(offset)
            file.write(os.urandom(size))
        os.fsync(file.fileno())
    return path


@pytest.fixture
def make_sshd(tmp_path: Path, own_directories: None) -> Iterator[Callable[..., Sshd]]:
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
def make_nginx(tmp_path: Path, own_directories: None) -> Iterator[Callable[..., Nginx]]:
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
def servers(tmp_path: Path, own_directories: None) -> Iterator[Callable[..., Any]]:
    """Makes a server of the given class in a directory of its own."""
    made: list[Any] = []

    def make(kind: type[Any], *words: object, **more: Any) -> Any:
        made.append(kind(tmp_path / f"server{len(made)}", *words, **more))
        return made[-1]

    yield make
    for server in made:
        server.stop()
