"""Real SFTP servers with one method that does not do what it should."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest
import trio

from imgfs.errors import ImgfsError, ProtocolViolation, ShortRead, SourceChanged, SourceTimeout
from imgfs.sources.ssh.settings import SshSettings
from imgfs.sources.ssh.source import SshHosts
from imgfs.url.source import SshUrl

from .conftest import MIB, run
from .test_ssh_extents import true_extents

# asyncssh's server leaves files and loops to the garbage collector when it is stopped at work.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Honest(asyncssh.SFTPServer):
    """asyncssh's own server; it has no shell, so there is no helper."""


class Short(asyncssh.SFTPServer):
    def read(self, file_obj: Any, offset: int, size: int) -> Any:
        return super().read(file_obj, offset, max(1, size // 3))


class Longer(asyncssh.SFTPServer):
    def read(self, file_obj: Any, offset: int, size: int) -> Any:
        return bytes(size + 1)


class EndsEarly(asyncssh.SFTPServer):
    def read(self, file_obj: Any, offset: int, size: int) -> Any:
        return super().read(file_obj, offset, max(0, min(size, 2 * MIB - offset)))


class Fails(asyncssh.SFTPServer):
    def read(self, file_obj: Any, offset: int, size: int) -> Any:
        raise asyncssh.SFTPFailure("the disk is\nbroken")


class Reordered(asyncssh.SFTPServer):
    async def read(self, file_obj: Any, offset: int, size: int) -> Any:
        await asyncio.sleep(0.02 if offset < MIB else 0)
        return super().read(file_obj, offset, size)


class Silent(asyncssh.SFTPServer):
    async def read(self, file_obj: Any, offset: int, size: int) -> Any:
        await asyncio.sleep(60)


class ChangesWhileRead(asyncssh.SFTPServer):
    """The file is written to between the look behind a read and the read's answer."""

    async def read(self, file_obj: Any, offset: int, size: int) -> Any:
        await asyncio.sleep(0.2)
        os.utime(file_obj.name, (1, 1))
        return super().read(file_obj, offset, size)


class Sizeless(asyncssh.SFTPServer):
    def stat(self, path: bytes) -> Any:
        return asyncssh.SFTPAttrs(permissions=0o100644)


@contextlib.contextmanager
def serving(directory: Path, server: type[asyncssh.SFTPServer]) -> Iterator[tuple[int, Path]]:
    """The server in a thread of its own; its port and known_hosts."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    user = asyncssh.generate_private_key("ssh-ed25519")
    user.write_private_key(directory / "user")
    user.write_public_key(directory / "user.pub")
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    port = 0

    async def start() -> Any:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[key],
            authorized_client_keys=str(directory / "user.pub"),
            sftp_factory=server,
        )

    def main() -> None:
        nonlocal port
        acceptor = loop.run_until_complete(start())
        port = acceptor.get_port()
        ready.set()
        loop.run_forever()
        acceptor.close()
        rest = asyncio.all_tasks(loop)
        for task in rest:
            task.cancel()
        if rest:
            loop.run_until_complete(asyncio.wait(rest, timeout=2))
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    thread = threading.Thread(target=main)
    thread.start()
    assert ready.wait(10)
    known = directory / "liar_hosts"
    known.write_bytes(f"[127.0.0.1]:{port} ".encode() + key.export_public_key())
    try:
        yield port, known
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@pytest.fixture
def lying(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens an image at such a server and gives the source to a function."""

    def go(server: type, path: Path, use: Callable[..., Any], **changes: Any) -> None:
        with serving(tmp_path, server) as (port, known):
            settings = SshSettings(
                **{
                    "known_hosts": str(known),
                    "identity": str(tmp_path / "user"),
                    "timeout_s": 5,
                    **changes,
                }
            )

            async def main() -> None:
                hosts = SshHosts()
                try:
                    url = SshUrl("me", "127.0.0.1", port, os.fsencode(path))
                    await use(await hosts.open(url, settings))
                finally:
                    with trio.CancelScope(shield=True):
                        await hosts.aclose()

            run(main)

    yield go


@pytest.mark.parametrize("server", [Honest, Short, Reordered])
def test_right_bytes_all_the_same(lying: Callable[..., Any], image: Path, server: type) -> None:
    data = image.read_bytes()

    async def use(source: Any) -> None:
        assert bytes(await source.read(0, 3 * MIB)) == data[: 3 * MIB]
        assert bytes(await source.read(MIB - 7, 99)) == data[MIB - 7 : MIB + 92]
        await source.check_identity()

    lying(server, image, use)


@pytest.mark.parametrize(
    ("server", "error"),
    [
        (Longer, ProtocolViolation),
        (EndsEarly, ShortRead),
        (Fails, ImgfsError),
        (ChangesWhileRead, SourceChanged),
        (Silent, SourceTimeout),
    ],
)
def test_error_and_no_bytes(
    lying: Callable[..., Any], image: Path, server: type, error: type
) -> None:
    async def use(source: Any) -> None:
        with pytest.raises(error) as caught:
            await source.read(MIB, 4 * MIB)
        assert "\n" not in str(caught.value)

    lying(server, image, use, timeout_s=1)


def test_attributes_without_a_size(lying: Callable[..., Any], image: Path) -> None:
    with pytest.raises(ProtocolViolation):
        lying(Sizeless, image, lambda source: None)


def test_ranges_extension(lying: Callable[..., Any], image: Path) -> None:
    """asyncssh's server tells the ranges of data itself."""

    async def use(source: Any) -> None:
        assert await source.extents(0, source.size) == true_extents(image)
        assert source.stat.identity.kind == "sftp"

    lying(Honest, image, use)
