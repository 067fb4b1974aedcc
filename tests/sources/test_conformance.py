"""The contract of all sources, on each kind of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from imgfs.sources.base import Source
from imgfs.sources.local.file import open_file
from imgfs.sources.objects.settings import from_environment
from tests.servers.nbd import Nbdkit, NbdServer, QemuNbd
from tests.servers.ssh import Sshd
from tests.servers.web import Bucket, Nginx, Weed
from tests.sources.conformance import CHECKS, TIMEOUT_S, Check, Kind, Served

from . import nbd, web
from .conftest import opened, run


@contextmanager
def local_file(work: Path, image: Path) -> Iterator[Served]:
    @asynccontextmanager
    async def open_() -> AsyncIterator[Source]:
        source = await open_file(str(image))
        yield source
        await source.aclose()

    yield Served(open_)


@contextmanager
def ssh(work: Path, image: Path) -> Iterator[Served]:
    server = Sshd(work)
    try:
        yield Served(lambda: opened(server, image, timeout_s=TIMEOUT_S), server.stop)
    finally:
        server.stop()


@contextmanager
def nbd_of(server: NbdServer, *, sector: int = 1, tells_holes: bool = True) -> Iterator[Served]:
    def open_() -> object:
        return nbd.opened(server.url(), timeout_s=TIMEOUT_S)

    try:
        yield Served(open_, server.stop, tells_holes, sector)  # type: ignore[arg-type]
    finally:
        server.stop()


@contextmanager
def http(work: Path, image: Path) -> Iterator[Served]:
    server = Nginx(work, image.parent)
    try:
        url = server.url(image.name)
        yield Served(lambda: web.opened(url, timeout_s=TIMEOUT_S), server.stop, tells_holes=False)
    finally:
        server.stop()


@pytest.fixture(scope="module", autouse=True)
def _shared() -> Iterator[None]:
    yield
    while SHARED:
        SHARED.pop().stop()


SHARED: list[Weed] = []  # it takes ten seconds until it takes an object


@contextmanager
def s3(work: Path, image: Path) -> Iterator[Served]:
    if not SHARED:
        SHARED.append(Weed(work))
    (server,) = SHARED
    Bucket(server).put(image.name, image.read_bytes())
    settings = from_environment(server.environment, timeout_s=TIMEOUT_S)
    url = f"s3://{server.bucket}/{image.name}"
    yield Served(lambda: web.opened(url, **asdict(settings)), tells_holes=False)


KINDS: dict[str, Kind] = {
    "file": local_file,
    "ssh": ssh,
    "http": http,
    "s3": s3,
    "nbdkit": lambda work, image: nbd_of(Nbdkit(work, "file", image)),
    "nbdkit over TCP": lambda work, image: nbd_of(Nbdkit(work, "file", image, tcp=True)),
    "nbdkit, simple replies": lambda work, image: nbd_of(
        Nbdkit(work, "--no-sr", "file", image), tells_holes=False
    ),
    "qemu-nbd": lambda work, image: nbd_of(QemuNbd(work, "-f", "raw", image), sector=512),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind: str, check: Check, image: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with KINDS[kind](work, image) as served:
        run(lambda: check(served, image))
