"""Sources that are written: what arrives there, and what no server is believed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncssh
import pytest
import trio

from imgfs.errors import (
    ImgfsError,
    NotDurable,
    OutOfRange,
    ReadOnlyView,
    SourceChanged,
    UnsupportedFeature,
)
from imgfs.sources.base import WritableSource
from imgfs.sources.local.file import open_file
from imgfs.sources.ssh.settings import SshSettings
from imgfs.sources.ssh.source import SshHosts
from imgfs.url.source import SshUrl
from tests.servers.nbd import Nbdkit, QemuNbd
from tests.servers.ssh import Sshd

from .conftest import MIB, run, url_of
from .nbd import opened as opened_nbd
from .nbd import refused
from .test_ssh_liars import Honest, serving

# asyncssh's server leaves files and loops to the garbage collector when it is stopped at work.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

Open = Callable[[Path], Any]


@asynccontextmanager
async def opened_ssh(sshd: Sshd, path: Path, **settings: Any) -> AsyncIterator[WritableSource]:
    hosts = SshHosts()
    try:
        source = await hosts.open(url_of(sshd, path), sshd.settings(**settings), write=True)
        yield source
        await source.aclose()
    finally:
        with trio.CancelScope(shield=True):
            await hosts.aclose()


@asynccontextmanager
async def opened_file(path: Path) -> AsyncIterator[WritableSource]:
    source = await open_file(str(path), write=True)
    yield source
    await source.aclose()


@pytest.fixture(params=["file", "ssh", "ssh without helper", "nbdkit", "qemu-nbd", "4 KiB blocks"])
def open_one(request: pytest.FixtureRequest, servers: Callable[..., Any]) -> Open:
    """Opens the image at a path for writing."""

    def nbd(kind: type[Any], *words: object) -> Any:
        server = servers(kind, *words, write=True)
        return opened_nbd(server.url(), write=True)

    if request.param == "file":
        return opened_file
    if request.param.startswith("ssh"):
        sshd: Sshd = request.getfixturevalue("sshd")
        more = {"helpers": ()} if "without" in request.param else {}
        return lambda path: opened_ssh(sshd, path, **more)
    if request.param == "qemu-nbd":
        return lambda path: nbd(QemuNbd, "-f", "raw", "--discard=unmap", path)
    policy = ["blocksize-minimum=4096", "blocksize-error-policy=error"]
    if request.param == "nbdkit":
        return lambda path: nbd(Nbdkit, "file", path)
    return lambda path: nbd(Nbdkit, "--filter=blocksize-policy", "file", path, *policy)


def test_writes_and_zeroes_of_any_alignment(open_one: Open, image: Path) -> None:
    os.truncate(image, 8 * MIB)
    wanted = bytearray(image.read_bytes())

    async def main() -> None:
        chance = random.Random(3)
        async with open_one(image) as source:
            for _ in range(40):
                offset = chance.randrange(8 * MIB)
                length = min(8 * MIB - offset, chance.choice((1, 700, 4096, 300_000, 2 * MIB)))
                if chance.random() < 0.7:
                    data = chance.randbytes(length)
                    await source.begin_writing()
                    await source.write(offset, data)
                    wanted[offset : offset + length] = data
                else:
                    await source.begin_writing()
                    await source.zero(offset, length)
                    wanted[offset : offset + length] = bytes(length)
                await source.pin()
                await source.check_identity()
                assert await source.read(offset, length) == wanted[offset : offset + length]
            await source.flush()
            assert source.counters.writes >= 40

    run(main)
    assert image.read_bytes() == wanted


def test_zeroes_give_space_back(open_one: Open, image: Path) -> None:
    os.truncate(image, 8 * MIB)
    before = image.stat().st_blocks

    async def main() -> bool:
        async with open_one(image) as source:
            await source.zero(MIB, 2 * MIB)
            await source.flush()
            can_punch: bool = source.can_punch
            return can_punch

    if run(main):
        assert image.stat().st_blocks <= before - 2 * MIB // 512 + 64
    assert not any(image.read_bytes()[MIB : 3 * MIB])


def test_sizes(open_one: Open, image: Path) -> None:
    os.truncate(image, 8 * MIB)

    async def main() -> None:
        async with open_one(image) as source:
            if not source.is_resizable:
                with pytest.raises(UnsupportedFeature):
                    await source.resize(MIB)
                with pytest.raises(OutOfRange):
                    await source.write(8 * MIB - 1, b"12")
                return
            await source.begin_writing()
            await source.write(9 * MIB, b"beyond")
            assert source.size == 9 * MIB + 6
            await source.resize(MIB)
            await source.resize(2 * MIB)
            await source.pin()
            assert source.stat.size == source.size == 2 * MIB
            assert await source.read(MIB, MIB) == bytes(MIB)
            assert image.stat().st_size == 2 * MIB

    run(main)


def test_a_source_that_was_not_opened_for_writing(image: Path) -> None:
    async def main() -> None:
        source = await open_file(str(image))
        for change in (source.write(0, b"x"), source.zero(0, 1), source.resize(1), source.flush()):
            with pytest.raises(ReadOnlyView):
                await change
        await source.aclose()

    before = image.read_bytes()
    run(main)
    assert image.read_bytes() == before


def test_somebody_elses_write_between_ours(sshd: Sshd, image: Path) -> None:
    async def main() -> None:
        for opened in (opened_file(image), opened_ssh(sshd, image)):
            async with opened as source:
                await source.begin_writing()
                await source.write(0, b"ours")
                await source.pin()
                with image.open("r+b") as file:
                    file.write(b"theirs")
                with pytest.raises(SourceChanged):
                    await source.begin_writing()

    run(main)


@pytest.mark.parametrize("kind", ["file", "ssh"])
def test_our_own_writes_are_no_change(sshd: Sshd, image: Path, kind: str) -> None:
    """Also for who asked before they began and is told after they ended."""

    async def main() -> None:
        async with opened_file(image) if kind == "file" else opened_ssh(sshd, image) as source:

            async def look() -> None:
                while not is_over:
                    await source.check_identity()
                    assert len(await source.read(MIB, 100)) == 100

            is_over = False
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(look)
                for number in range(150):
                    await source.begin_writing()
                    await source.write(0, b"%08d" % number)
                    await source.pin()
                is_over = True

    run(main)


def test_no_fsync_is_no_success(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(port: int, known: Path) -> str:
        url = SshUrl(user="u", host="127.0.0.1", port=port, path=os.fsencode(image))
        settings = SshSettings(known_hosts=str(known), identity=str(tmp_path / "user"))
        hosts = SshHosts()
        try:
            source = await hosts.open(url, settings, write=True)
            await source.write(0, b"written all the same")
            with pytest.raises(NotDurable) as caught:
                await source.flush()
            return str(caught.value)
        finally:
            with trio.CancelScope(shield=True):
                await hosts.aclose()

    handler = asyncssh.sftp.SFTPServerHandler
    lacking = [each for each in handler._extensions if not each[0].startswith(b"fsync")]
    monkeypatch.setattr(handler, "_extensions", lacking)
    with serving(tmp_path, Honest) as (port, known):
        said = run(lambda: main(port, known))
    assert "fsync@openssh.com" in said
    assert image.read_bytes()[:20] == b"written all the same"


def test_no_flush_is_no_success(servers: Callable[..., Any]) -> None:
    answers = ["get_size=echo 1M", "can_write=exit 0", "can_flush=exit 3", "can_fua=echo none"]
    answers += ["pwrite=cat >/dev/null", "pread=head -c $3 /dev/zero"]
    server = servers(Nbdkit, "eval", *answers, write=True)

    async def main() -> None:
        async with opened_nbd(server.url(), write=True) as source:
            await source.write(0, b"x" * 512)
            with pytest.raises(NotDurable, match="no flush"):
                await source.flush()

    run(main)


def test_an_export_that_is_read_only(image: Path, servers: Callable[..., Any]) -> None:
    server = servers(Nbdkit, "file", image)
    assert "read-only" in refused(server.url(), ReadOnlyView, write=True)


def test_a_read_only_file_system(sshd: Sshd, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", place], check=True)
    try:
        (place / "disk.raw").write_bytes(b"x" * 512)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)

        async def main() -> None:
            with pytest.raises(ReadOnlyView, match="read-only filesystem"):
                async with opened_file(place / "disk.raw"):
                    pass
            with pytest.raises(ImgfsError):
                async with opened_ssh(sshd, place / "disk.raw"):
                    pass

        run(main)
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_flush_after_all_connections_were_lost(image: Path, servers: Callable[..., Any]) -> None:
    server = servers(Nbdkit, "file", image, write=True)

    async def main() -> None:
        async with opened_nbd(server.url(), write=True, pin="the same") as source:
            await source.write(0, b"before")
            server.send(signal.SIGKILL)
            server.stop()
            server.start()
            with pytest.raises(NotDurable, match="lost before"):
                await source.flush()
            await source.write(0, b"again.")
            await source.flush()

    run(main)
    assert image.read_bytes()[:6] == b"again."
