"""What a program that imgfs starts is given to read: by libnbd's client, and by one that lies."""

from __future__ import annotations

import gc
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import nbd
import pytest
import trio

from imgfs.errors import ShortRead
from imgfs.image import Image
from imgfs.sources.nbd.export import MOST_READ, Exports

DATA = random.Random(1).randbytes((1 << 20) + 700)  # not whole sectors
BROKEN = 4096  # bytes from here on cannot be read


class Bytes(Image):
    def __init__(self, content: bytes, broken: int | None = None) -> None:
        super().__init__("bytes", len(content))
        self.content = content
        self.broken = broken

    async def _read(self, offset: int, length: int) -> bytes:
        await trio.sleep(0)
        if self.broken is not None and offset + length > self.broken:
            raise ShortRead("it is broken")
        return self.content[offset : offset + length]


@asynccontextmanager
async def exported(*images: Image) -> AsyncIterator[Exports]:
    async with trio.open_nursery() as nursery:
        exports = Exports(images)
        nursery.start_soon(exports.serve)
        try:
            yield exports
        finally:
            exports.close()


def open_files() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


def receive(client: socket.socket, length: int) -> bytes:
    found = b""
    while len(found) < length and (data := client.recv(length - len(found))):
        found += data
    return found


def in_thread(images: list[Image], work: Callable[[str], None]) -> None:
    async def main() -> None:
        async with exported(*images) as exports:
            with trio.fail_after(20):
                await trio.to_thread.run_sync(partial(work, exports.path))

    before = open_files()
    trio.run(main)
    gc.collect()  # a client of libnbd closes its socket then
    assert open_files() <= before


def connected(path: str, export: str) -> nbd.NBD:
    client = nbd.NBD()
    client.set_export_name(export)
    client.connect_unix(path)
    return client


def test_what_a_client_reads() -> None:
    def work(path: str) -> None:
        client = connected(path, "1")
        assert client.get_size() == 1 << 20 | 1024
        assert client.is_read_only()
        padded = DATA.ljust(client.get_size(), b"\0")
        rng = random.Random(2)
        for _ in range(50):
            start = rng.randrange(len(padded))
            length = rng.randint(1, len(padded) - start)
            assert client.pread(length, start) == padded[start : start + length]
        other = connected(path, "0")
        assert other.pread(512, 0) == b"x" * 512
        with pytest.raises(nbd.Error, match=r"(?i)no such|unknown|not found|handshake"):
            connected(path, "2")
        client.shutdown()
        assert other.pread(512, 512) == b"x" * 512

    in_thread([Bytes(b"x" * 1024), Bytes(DATA)], work)


def test_what_cannot_be_read_is_an_error_there() -> None:
    def work(path: str) -> None:
        client = connected(path, "0")
        assert client.pread(BROKEN, 0) == DATA[:BROKEN]
        with pytest.raises(nbd.Error) as raised:
            client.pread(512, BROKEN)
        assert raised.value.errno == "EIO"
        assert client.pread(BROKEN, 0) == DATA[:BROKEN]

    in_thread([Bytes(DATA, BROKEN)], work)


def raw_client(path: str) -> socket.socket:
    """A client past the negotiation."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(path)
    assert receive(client, 18).startswith(b"NBDMAGICIHAVEOPT")
    client.sendall(struct.pack(">I8sIIIcH", 3, b"IHAVEOPT", 7, 7, 1, b"0", 0))
    for length in (12, 14, 0):
        head = receive(client, 20)
        assert struct.unpack(">QIII", head)[3] == length
        receive(client, length)
    return client


@pytest.mark.parametrize("length", [0, MOST_READ + 1, 0xFFFFFFFF])
def test_absurd_lengths(length: int) -> None:
    def work(path: str) -> None:
        with raw_client(path) as client:
            client.sendall(struct.pack(">IHH8sQI", 0x25609513, 0, 0, b"a cookie", 0, length))
            assert receive(client, 16) == struct.pack(">II8s", 0x67446698, 22, b"a cookie")
            client.sendall(struct.pack(">IHH8sQI", 0x25609513, 0, 0, b"further!", 1 << 63, 5))
            assert receive(client, 21)[16:] == bytes(5)

    in_thread([Bytes(DATA)], work)


@pytest.mark.parametrize(
    "said",
    [
        struct.pack(">IHH8sQI", 0x25609513, 0, 1, b"a cookie", 0, 512),  # to write
        struct.pack(">IHH8sQI", 0x12345678, 0, 0, b"a cookie", 0, 512),
        b"short",
    ],
)
def test_one_that_lies_is_left(said: bytes) -> None:
    def work(path: str) -> None:
        with raw_client(path) as client:
            client.sendall(said)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        assert connected(path, "0").pread(512, 0) == DATA[:512]

    in_thread([Bytes(DATA)], work)


@pytest.mark.parametrize("said", [b"", b"\0" * 4, b"\0" * 40, b"\0\0\0\3IHAVEOPT" + b"\xff" * 8])
def test_one_that_does_not_negotiate_is_left(said: bytes) -> None:
    def work(path: str) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(path)
            client.sendall(said)
            client.shutdown(socket.SHUT_WR)
            while client.recv(100):
                pass
        assert connected(path, "0").pread(512, 0) == DATA[:512]

    in_thread([Bytes(DATA)], work)
