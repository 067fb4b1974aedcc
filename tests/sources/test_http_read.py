"""Reading through a real nginx."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from imgfs.errors import SourceChanged
from imgfs.sources.objects.source import ObjectSource
from tests.servers.web import Nginx, make_certificate

from .conftest import MIB, run
from .web import opened, use


@pytest.fixture
def disk(image: Path, tmp_path: Path) -> Path:
    """The image where nginx finds it."""
    (tmp_path / "www").mkdir(exist_ok=True)
    return Path(shutil.copy2(image, tmp_path / "www/disk.img"))


def test_bytes(disk: Path, nginx: Nginx) -> None:
    data = disk.read_bytes()

    async def check(source: ObjectSource) -> None:
        assert source.size == len(data)
        assert source.name == "disk.img"
        assert source.stat.mtime_ns == int(disk.stat().st_mtime) * 10**9
        assert source.stat.identity is not None
        assert source.stat.identity.kind == "etag"
        assert await source.read(0, source.size) == data
        chooser = random.Random(1)
        for _ in range(50):
            offset = chooser.randrange(len(data))
            length = chooser.randrange(min(MIB, len(data) - offset) + 1)
            assert await source.read(offset, length) == data[offset : offset + length]
        extents = await source.extents(0, source.size)
        assert extents.stored_bytes() == source.size
        await source.check_identity()

    use(nginx.url("disk.img"), check)


@pytest.mark.parametrize("length", [1, 2 * MIB, 2 * MIB + 1, 6 * MIB])
def test_piece_boundaries(disk: Path, nginx: Nginx, length: int) -> None:
    data = disk.read_bytes()

    async def check(source: ObjectSource) -> None:
        for offset in (0, 1, len(data) - length):
            assert await source.read(offset, length) == data[offset : offset + length]

    use(nginx.url("disk.img"), check)


def test_one_request_for_a_small_read(disk: Path, nginx: Nginx) -> None:
    async def check(source: ObjectSource) -> None:
        before = len(nginx.requests())
        await source.read(MIB + 1, 4096)
        await trio.sleep(0.1)
        (line,) = nginx.requests()[before:]
        assert '"GET /disk.img HTTP/1.1" 206 4096' in line

    use(nginx.url("disk.img"), check)


def test_opening_is_two_requests(disk: Path, nginx: Nginx) -> None:
    async def check(_: ObjectSource) -> None:
        await trio.sleep(0.1)

    use(nginx.url("disk.img"), check)
    assert sorted(line.split('"')[1].split()[0] for line in nginx.requests()) == ["GET", "HEAD"]


def test_empty(nginx: Nginx, tmp_path: Path) -> None:
    (tmp_path / "www/empty").touch()

    async def check(source: ObjectSource) -> None:
        assert source.size == 0
        assert await source.read(0, 0) == b""
        await source.check_identity()
        (tmp_path / "www/empty").write_bytes(b"x")
        with pytest.raises(SourceChanged):
            await source.check_identity()

    use(nginx.url("empty"), check)


def test_offsets_past_4_gib(nginx: Nginx, tmp_path: Path) -> None:
    path = tmp_path / "www/large"
    size = (5 << 30) + 7
    marks = (2**31 - 3, 2**32 - 3, size - 6)
    with path.open("wb") as file:
        file.truncate(size)
        for number, offset in enumerate(marks):
            file.seek(offset)
            file.write(b"mark %d" % number)

    async def check(source: ObjectSource) -> None:
        assert source.size == size
        for number, offset in enumerate(marks):
            assert await source.read(offset, 6) == b"mark %d" % number

    use(nginx.url("large"), check)


def test_hostile_name_and_query(nginx: Nginx, tmp_path: Path) -> None:
    name = "- %41 #?é\\\n.img"
    (tmp_path / "www" / name).write_bytes(b"hello")

    async def check(source: ObjectSource) -> None:
        assert source.name == name
        assert await source.read(0, 5) == b"hello"
        assert "secret" not in source.url
        assert source.url.isprintable()

    use(nginx.url(name) + "?a=%2F+b&signature=secret", check)
    assert all("?a=%2F+b&signature=secret HTTP" in line for line in nginx.requests())


def test_https_with_a_ca_of_its_own(
    disk: Path, make_nginx: Callable[..., Nginx], tmp_path: Path
) -> None:
    ca, certificate = make_certificate(tmp_path)
    server = make_nginx(certificate=certificate)

    async def check(source: ObjectSource) -> None:
        assert await source.read(0, source.size) == disk.read_bytes()

    use(server.url("disk.img"), check, ca_file=str(ca))


def test_redirect(disk: Path, make_nginx: Callable[..., Nginx]) -> None:
    target = make_nginx()
    server = make_nginx(more=f"location /old {{ return 302 {target.url('disk.img')}; }}")

    async def check(source: ObjectSource) -> None:
        assert source.name == "old.img"
        assert await source.read(5, MIB) == disk.read_bytes()[5 : MIB + 5]
        await source.check_identity()

    use(server.url("old.img"), check)


def test_cancelled_reads_disturb_nobody(disk: Path, nginx: Nginx) -> None:
    data = disk.read_bytes()

    async def check(source: ObjectSource) -> None:
        async def cancelled(n: int) -> None:
            with trio.move_on_after(n / 5000):
                await source.read(0, 4 * MIB)

        for _ in range(5):
            async with trio.open_nursery() as nursery:
                for n in range(30):
                    nursery.start_soon(cancelled, n)
            assert await source.read(MIB, MIB) == data[MIB : 2 * MIB]

    use(nginx.url("disk.img"), check, depth=4)


def test_cancelled_at_once_though_the_server_is_frozen(disk: Path, nginx: Nginx) -> None:
    async def check(source: ObjectSource) -> None:
        nginx.send(signal.SIGSTOP)
        try:
            begun = time.monotonic()
            with trio.move_on_after(0.2) as scope:
                await source.read(0, 4 * MIB)
            assert scope.cancelled_caught
            assert time.monotonic() - begun < 0.7
        finally:
            nginx.send(signal.SIGCONT)
        assert len(await source.read(0, 4 * MIB)) == 4 * MIB

    use(nginx.url("disk.img"), check)


PROGRAM = """
import sys, trio
import imgfs
async def main():
    async with imgfs.open_image(sys.argv[1]) as source, trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(source.read, 0, source.size)
        await trio.sleep(float(sys.argv[2]))
        nursery.cancel_scope.cancel()
trio.run(main)
"""


@pytest.mark.parametrize("after_s", [0, 0.01, 0.1])
def test_process_ends_quietly_in_the_middle(disk: Path, nginx: Nginx, after_s: float) -> None:
    command = [sys.executable, "-c", PROGRAM, nginx.url("disk.img"), str(after_s)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_changed_between_open_and_read(disk: Path, nginx: Nginx) -> None:
    async def check(source: ObjectSource) -> None:
        os.utime(disk, (1, 1))
        with pytest.raises(SourceChanged, match="changed since"):
            await source.read(0, 10)
        with pytest.raises(SourceChanged, match="changed since"):
            await source.check_identity()
        os.truncate(disk, 100)
        with pytest.raises(SourceChanged, match="changed since"):
            await source.read(MIB, 10)  # behind its new end: 416 where If-Match is not looked at
        disk.unlink()
        with pytest.raises(SourceChanged, match="deleted"):
            await source.read(0, 10)
        with pytest.raises(SourceChanged, match="deleted"):
            await source.check_identity()

    use(nginx.url("disk.img"), check)


def test_replaced_while_it_is_read(nginx: Nginx, tmp_path: Path) -> None:
    """Each read is one state's bytes or an error, though the file is replaced all the time."""
    size = 8 * MIB
    path = tmp_path / "www/disk.img"
    ended = threading.Event()

    def write(n: int) -> None:
        new = path.with_name("new")
        new.write_bytes(bytes([n % 251]) * size)
        os.utime(new, (n, n))
        new.replace(path)

    def replace() -> None:
        n = 1
        while not ended.is_set():
            write(n := n + 1)

    write(1)
    outcomes = {"whole": 0, "changed": 0}

    async def main() -> None:
        until = time.monotonic() + 3
        while time.monotonic() < until or not all(outcomes.values()):
            try:
                async with opened(nginx.url("disk.img")) as source:
                    for _ in range(5):
                        data = await source.read(0, size)
                        assert data.count(data[:1]) == size
                        outcomes["whole"] += 1
            except SourceChanged:
                outcomes["changed"] += 1

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        run(main, 60)
    finally:
        ended.set()
        writer.join()
