"""Real servers, stopped at the end of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers.ssh import Sshd
from tests.servers.web import Nginx


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
def servers(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes a server of the given class in a directory of its own."""
    made: list[Any] = []

    def make(kind: type[Any], *words: object, **more: Any) -> Any:
        made.append(kind(tmp_path / f"server{len(made)}", *words, **more))
        return made[-1]

    yield make
    for server in made:
        server.stop()
