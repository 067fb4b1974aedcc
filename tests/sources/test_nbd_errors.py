"""What goes wrong with NBD servers: refusals, servers that die, freeze and come back."""

from __future__ import annotations

import builtins
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from imgfs.errors import (
    AccessDenied,
    ImgfsError,
    ProtocolViolation,
    SourceChanged,
    SourceNotFound,
    SourceTimeout,
    SourceUnreachable,
    UnsupportedFeature,
)
from tests.servers.nbd import Nbdkit, QemuNbd
from tests.servers.ports import free_port

from .conftest import MIB, run
from .nbd import opened, refused

Maker = Callable[..., Any]


def test_nobody_listens(tmp_path: Path) -> None:
    begun = time.monotonic()
    port = free_port()
    assert f"127.0.0.1:{port}" in refused(f"nbd://127.0.0.1:{port}/", SourceUnreachable)
    refused(f"nbd+unix:///?socket={tmp_path}/none", SourceUnreachable)
    assert time.monotonic() - begun < 5


def test_name_that_does_not_resolve() -> None:
    assert "not found" in refused("nbd://no-such-host.invalid/", SourceUnreachable)


def test_unknown_export(servers: Maker, image: Path) -> None:
    exports = ["exportname=a", "exportname-strict=true"]
    for kind, words in (
        (Nbdkit, ["--filter=exportname", "file", image, *exports]),
        (QemuNbd, ["-f", "raw", "-x", "a", image]),
    ):
        server = servers(kind, *words)
        assert "no such export" in refused(server.url(b"b"), SourceNotFound)
        assert "no such export" in refused(server.url(), SourceNotFound)

        async def main(url: str = server.url(b"a")) -> None:
            async with opened(url) as source:
                assert source.name == "a"

        run(main)


def test_not_an_nbd_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        async def main() -> None:
            async with trio.open_nursery() as nursery:

                async def serve() -> None:
                    client, _ = await trio.to_thread.run_sync(listener.accept)
                    client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n" * 20)
                    client.close()

                nursery.start_soon(serve)
                with pytest.raises(ProtocolViolation, match="not an NBD server"):
                    async with opened(f"nbd://127.0.0.1:{port}/"):
                        pass

        run(main)


def test_something_that_takes_connections_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        begun = time.monotonic()
        refused(f"nbd://127.0.0.1:{port}/", SourceTimeout, timeout_s=1)
        assert 0.9 < time.monotonic() - begun < 3


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("EIO", ImgfsError),
        ("EPERM", AccessDenied),
        ("ENOSPC", ImgfsError),
        ("ENOMEM", ImgfsError),
        ("EINVAL", ProtocolViolation),
    ],
)
def test_errors_of_a_read(
    servers: Maker, image: Path, tmp_path: Path, name: str, error: type[ImgfsError]
) -> None:
    trigger = tmp_path / "trigger"
    words = [f"error-pread={name}", "error-pread-rate=1", f"error-pread-file={trigger}"]
    server = servers(Nbdkit, "--filter=error", "file", image, *words)

    async def main() -> None:
        async with opened(server.url()) as source:
            assert bytes(await source.read(0, 10)) == image.read_bytes()[:10]
            trigger.touch()
            begun = trio.current_time()
            with pytest.raises(error) as caught:
                await source.read(4096, 512)
            assert type(caught.value) is error
            assert not caught.value.temporary
            assert "read of 512 bytes at 4096" in str(caught.value)
            assert str(server.socket) in str(caught.value)
            assert trio.current_time() - begun < 2
            trigger.unlink()
            assert bytes(await source.read(0, 10)) == image.read_bytes()[:10]

    run(main)


def test_killed_while_reading_without_a_pin(servers: Maker, image: Path) -> None:
    """The bytes may be others now: every read says so, for good, and a fresh open is fine."""
    server = servers(Nbdkit, "--filter=delay", "file", image, "rdelay=200ms")

    async def main() -> None:
        async with opened(server.url(), timeout_s=10) as source:

            async def read() -> None:
                with pytest.raises(SourceChanged, match="identity="):
                    await source.read(0, 4 * MIB)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                nursery.start_soon(read)
                await trio.sleep(0.1)
                await trio.to_thread.run_sync(server.stop)
                await trio.sleep(0.5)
                await trio.to_thread.run_sync(server.start)
            await read()
            with pytest.raises(SourceChanged):
                await source.check_identity()
        async with opened(server.url()) as source:
            assert bytes(await source.read(0, 10)) == image.read_bytes()[:10]

    run(main)


def test_killed_while_reading_with_a_pin(servers: Maker, image: Path) -> None:
    """The reads wait, and go on when the server is back."""
    server = servers(Nbdkit, "--filter=delay", "file", image, "rdelay=50ms")
    data = image.read_bytes()

    async def main() -> None:
        async with opened(server.url(), timeout_s=10, pin="v1") as source:
            for _ in range(3):

                async def read(offset: int) -> None:
                    found = await source.read(offset, MIB)
                    assert bytes(found) == data[offset : offset + MIB]

                async with trio.open_nursery() as nursery:
                    for n in range(28):
                        nursery.start_soon(read, n * MIB // 4)
                    await trio.sleep(0.1)
                    await trio.to_thread.run_sync(server.stop)
                    await trio.sleep(0.3)
                    await trio.to_thread.run_sync(server.start)
            assert source._link._slots.value == 64

    run(main)


def test_dead_then_back(servers: Maker, image: Path) -> None:
    server = servers(Nbdkit, "file", image, tcp=True)

    async def main() -> None:
        async with opened(server.url(), timeout_s=1, pin="v1") as source:
            await trio.to_thread.run_sync(server.stop)
            begun = trio.current_time()
            with pytest.raises(SourceUnreachable, match=f"127.0.0.1:{server.port}"):
                await source.read(0, 10)
            assert 0.9 < trio.current_time() - begun < 3
            with pytest.raises(SourceUnreachable):
                await source.check_identity()
            await trio.to_thread.run_sync(server.start)
            assert bytes(await source.read(0, 10)) == image.read_bytes()[:10]
            await source.check_identity()

    run(main)


def test_frozen_server(servers: Maker, image: Path) -> None:
    server = servers(Nbdkit, "file", image)

    async def main() -> None:
        async with opened(server.url(), timeout_s=1, pin="v1") as source:
            server.send(signal.SIGSTOP)
            await trio.sleep(0.1)  # each of its threads stops in its own time
            try:
                begun = trio.current_time()
                with pytest.raises(SourceTimeout, match="no answer in 1 s"):
                    await source.read(0, 10)
                assert 0.9 < trio.current_time() - begun < 3
                begun = trio.current_time()
                with trio.move_on_after(0.2):
                    await source.read(0, 10)
                assert trio.current_time() - begun < 0.5
            finally:
                server.send(signal.SIGCONT)
            assert bytes(await source.read(0, 10)) == image.read_bytes()[:10]

    run(main)


def test_slow_server_is_not_a_dead_one(servers: Maker, image: Path) -> None:
    """Longer than the timeout in all, but an answer comes every now and then."""
    server = servers(Nbdkit, "--filter=delay", "-t", 1, "file", image, "rdelay=400ms")

    async def main() -> None:
        async with opened(server.url(), timeout_s=1) as source:
            assert bytes(await source.read(0, MIB)) == image.read_bytes()[:MIB]

    run(main)


def test_descriptors_are_given_back(servers: Maker, image: Path) -> None:
    server = servers(Nbdkit, "file", image)
    gone = f"nbd+unix:///?socket={server.directory}/none"

    def count() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    async def main() -> None:
        before = 0
        for n in range(12):
            async with opened(server.url()) as source:
                await source.read(0, MIB)
            with pytest.raises(SourceUnreachable):
                async with opened(gone):
                    pass
            await trio.sleep(0.01)
            before = before if n > 3 else count()
        assert count() <= before

    run(main)


def test_a_closed_source_has_no_socket_whoever_refers_to_it(servers: Maker, image: Path) -> None:
    server = servers(Nbdkit, "file", image)
    kept: list[Any] = []

    def sockets() -> set[str]:
        links = [each for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
        return {str(each.readlink()) for each in links if "socket:" in str(each.readlink())}

    async def main() -> None:
        before = sockets()
        async with opened(server.url()) as source:
            kept.extend(each._handle for each in source._link._alive)
            assert kept
            if not hasattr(kept[0], "close"):
                pytest.skip("this libnbd closes a handle with the last reference to it")
        assert not sockets() - before

    run(main)


def test_without_libnbd(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name == "nbd":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "python3-libnbd" in refused("nbd://127.0.0.1:1/", UnsupportedFeature)
