"""Reading from real NBD servers."""

from __future__ import annotations

import hashlib
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from imgfs.sources.base import Identity
from tests.servers.nbd import Nbdkit, NbdServer, QemuNbd

from .conftest import MIB, run
from .nbd import opened

Maker = Callable[..., Any]


def kinds(image: Path) -> dict[str, tuple[type[NbdServer], list[object]]]:
    return {
        "nbdkit": (Nbdkit, ["file", image]),
        "qemu-nbd": (QemuNbd, ["-f", "raw", image]),
        "no structured replies": (Nbdkit, ["--no-sr", "file", image]),
        "oldstyle": (Nbdkit, ["-o", "file", image]),
    }


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd", "no structured replies", "oldstyle"])
def test_bytes(servers: Maker, image: Path, kind: str, tcp: bool) -> None:
    which, words = kinds(image)[kind]
    server = servers(which, *words, tcp=tcp)
    size = -(-image.stat().st_size // 512) * 512 if kind == "qemu-nbd" else image.stat().st_size
    data = image.read_bytes().ljust(size, b"\0")

    async def main() -> None:
        async with opened(server.url()) as source:
            assert (source.size, source.name, source.url) == (size, "disk", server.url())
            assert source.stat.identity is None
            assert bytes(await source.read(0, size)) == data
            chooser = random.Random(1)
            for _ in range(50):
                offset = chooser.randrange(len(data))
                length = chooser.randrange(min(MIB, len(data) - offset) + 1)
                assert bytes(await source.read(offset, length)) == data[offset : offset + length]
            await source.check_identity()

    run(main)


def test_block_sizes_of_the_server(servers: Maker, tmp_path: Path) -> None:
    """Every read is aligned and short enough, or nbdkit refuses it."""
    image = tmp_path / "x"
    image.write_bytes(os.urandom(3 * MIB))
    data = image.read_bytes()
    sizes = ["blocksize-minimum=4096", "blocksize-preferred=8192", "blocksize-maximum=32768"]
    policy = ["--filter=blocksize-policy", "--filter=stats"]
    stats = tmp_path / "stats"
    words = ["file", image, *sizes, "blocksize-error-policy=error", f"statsfile={stats}"]
    server = servers(Nbdkit, *policy, *words)

    async def main() -> None:
        async with opened(server.url()) as source:
            for offset, length in (
                (0, 3 * MIB),
                (1, 1),
                (4095, 2),
                (5000, 40000),
                (3 * MIB - 1, 1),
            ):
                assert bytes(await source.read(offset, length)) == data[offset : offset + length]
            assert (await source.extents(0, source.size)).end == 3 * MIB

    run(main)


def test_tail_that_is_no_block(servers: Maker, tmp_path: Path) -> None:
    image = tmp_path / "x"
    image.write_bytes(os.urandom(10_000))
    policy = ["--filter=blocksize-policy", "file", image]
    sizes = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=1M"]
    server = servers(Nbdkit, *policy, *sizes)

    async def main() -> None:
        async with opened(server.url()) as source:
            assert bytes(await source.read(9_999, 1)) == image.read_bytes()[-1:]
            assert bytes(await source.read(0, 10_000)) == image.read_bytes()

    run(main)


def test_exports(servers: Maker, tmp_path: Path) -> None:
    names = ["a", "hello world", "snow\N{SNOWMAN}", "q'uo\"te;&|?#%"]
    directory = tmp_path / "exports"
    directory.mkdir()
    for name in names:
        (directory / name).write_text(f"{name:>600}")
    server = servers(Nbdkit, "file", f"dir={directory}")

    async def main() -> None:
        for name in names:
            async with opened(server.url(name.encode())) as source:
                assert bytes(await source.read(0, source.size)) == f"{name:>600}".encode()
                assert source.name == name

    run(main)


def connections(server: NbdServer) -> int:
    lines = Path("/proc/net/unix").read_text().splitlines()
    connected = "03"
    return sum(
        line.split()[5:6] + line.split()[7:] == [connected, str(server.socket)] for line in lines
    )


@pytest.mark.parametrize(("words", "wanted"), [([], 4), (["multi-conn-mode=disable"], 1)])
def test_connections_as_the_server_allows(
    servers: Maker, image: Path, words: list[str], wanted: int
) -> None:
    filters = ["--filter=multi-conn"] if words else []
    server = servers(Nbdkit, *filters, "file", image, *words)

    async def main() -> None:
        async with opened(server.url()) as source:
            await trio.sleep(0.3)
            assert connections(server) == wanted
            assert len(source._link._alive) == wanted
            assert bytes(await source.read(0, source.size)) == image.read_bytes()
        with trio.fail_after(5):  # until the server has noticed
            while connections(server):
                await trio.sleep(0.05)

    run(main)


def test_requests_in_flight_are_many_and_bounded(
    servers: Maker, image: Path, tmp_path: Path
) -> None:
    server = servers(Nbdkit, "--filter=delay", "-t", 64, "file", image, "rdelay=200ms")

    async def main() -> None:
        async with opened(server.url(), depth=16) as source:
            begun, most = trio.current_time(), 0

            async def watch() -> None:
                nonlocal most
                while True:
                    most = max(most, sum(each.in_flight for each in source._link._alive))
                    await trio.sleep(0.01)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                # 33 pieces, 16 at once: three rounds of 0.2 s
                assert bytes(await source.read(0, source.size)) == image.read_bytes()
                nursery.cancel_scope.cancel()
            assert 0.5 < trio.current_time() - begun < 2.5
            assert most == 16

    run(main)


def test_cancelled_reads_return_at_once_and_disturb_nobody(servers: Maker, image: Path) -> None:
    server = servers(Nbdkit, "--filter=delay", "file", image, "rdelay=300ms")
    data = image.read_bytes()

    async def main() -> None:
        async with opened(server.url()) as source:
            for _ in range(20):
                begun = trio.current_time()
                with trio.move_on_after(0.01):
                    await source.read(0, 4 * MIB)
                assert trio.current_time() - begun < 0.2
            assert bytes(await source.read(MIB, 10)) == data[MIB : MIB + 10]
            await trio.sleep(0.7)
            assert sum(each.in_flight for each in source._link._alive) == 0
            assert source._link._slots.value == 64
            assert bytes(await source.read(0, source.size)) == data

    run(main)


def test_memory_does_not_grow(servers: Maker) -> None:
    """libnbd's binding (1.14) keeps what is given to it as an nbd.Buffer, for good."""
    server = servers(Nbdkit, "pattern", "1G")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async def main() -> None:
        async with opened(server.url()) as source:

            async def read(length: int, count: int) -> None:
                for n in range(count):
                    with trio.move_on_after(0.001 if n % 5 == 0 else 10):
                        await source.read(n * length, length)

            for lengths in ((4096, 65536, 300_000, 2 * MIB - 65536, 3 * MIB),) * 2:
                before = resident()
                async with trio.open_nursery() as nursery:
                    for length in lengths:
                        nursery.start_soon(read, length, 60)
            assert resident() - before < 64 * MIB

    run(main)


def test_what_was_read_stays_as_it_was(servers: Maker) -> None:
    """Whatever is read after it, of whatever the reader keeps: all, a part, or a part of that."""
    server = servers(Nbdkit, "pattern", "96M")
    every = range(0, 72 * MIB, 2 * MIB)

    async def main() -> None:
        async with opened(server.url()) as source:
            kept = [(at, memoryview(await source.read(at, 2 * MIB))) for at in every]
            kept += [(at + 1, view[1:100]) for at, view in kept]
            kept += [(at + 1, view[1:2]) for at, view in kept if len(view) == 99]
            told = [(at, len(view), hashlib.sha256(view).digest()) for at, view in kept]
            del kept[:10]
            async with trio.open_nursery() as nursery:
                for at in every:
                    nursery.start_soon(source.read, at, 2 * MIB)
            for (at, view), (where, length, digest) in zip(kept, told[10:], strict=True):
                assert (at, len(view)) == (where, length)
                assert hashlib.sha256(view).digest() == digest
                assert bytes(view) == bytes(await source.read(at, len(view)))

    run(main)


def test_memory_of_a_cancelled_read_is_written_by_nobody_else(servers: Maker) -> None:
    """libnbd writes its reply, when it comes, to memory that no other read has got meanwhile."""
    server = servers(Nbdkit, "--filter=delay", "pattern", "64M", "delay-read=300ms")

    async def main() -> None:
        async with opened(server.url()) as source:
            for at in range(0, 16 * MIB, 2 * MIB):
                with trio.move_on_after(0.01) as scope:
                    await source.read(at, 2 * MIB)
                assert scope.cancelled_caught
            wanted = range(32 * MIB, 48 * MIB, 2 * MIB)
            found: dict[int, bytes] = {}

            async def read(at: int) -> None:
                found[at] = bytes(await source.read(at, 2 * MIB))

            async with trio.open_nursery() as nursery:
                for at in wanted:
                    nursery.start_soon(read, at)
            for at in wanted:  # nbdkit's pattern: each eight bytes are their own offset
                assert found[at] == struct.pack(f">{MIB // 4}Q", *range(at, at + 2 * MIB, 8))

    run(main)


def test_pin_is_the_identity(servers: Maker, image: Path) -> None:
    server = servers(Nbdkit, "file", image)

    async def main() -> None:
        async with opened(server.url(), pin="v1") as source:
            assert source.stat.identity == Identity("pin", f"{source.size}:v1")

    run(main)


def test_empty(servers: Maker) -> None:
    server = servers(Nbdkit, "memory", 0)

    async def main() -> None:
        async with opened(server.url()) as source:
            assert (source.size, await source.read(0, 0)) == (0, b"")
            assert len(await source.extents(0, 0)) == 0

    run(main)
