"""Block status as the extent map, from real NBD servers and from lists of numbers."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from imgfs import mapjson
from imgfs.errors import ProtocolViolation, UnsupportedFeature
from imgfs.extents import ExtentList, Flags, all_data
from imgfs.sources.nbd import extents as nbd_extents
from imgfs.sources.nbd.extents import SEGMENT, NbdExtents, decode
from tests.servers.nbd import Nbdkit, QemuNbd

from .conftest import MIB, run
from .nbd import opened
from .test_ssh_extents import true_extents

Maker = Callable[..., Any]
GIB = 1 << 30
ZERO = int(Flags.HOLE | Flags.ZERO)


def qemu_map(url: str) -> str:
    command = ["qemu-img", "map", "--output=json", "-f", "raw", url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_nbdkit_file(servers: Maker, image: Path) -> None:
    server = servers(Nbdkit, "file", image)

    async def main() -> None:
        async with opened(server.url()) as source:
            found = await source.extents(0, source.size)
            assert found == true_extents(image)
            part = await source.extents(MIB - 1, 2 * MIB)
            assert part == found.clip(MIB - 1, 3 * MIB - 1)

    run(main)


def test_agrees_with_qemu_about_qcow2(servers: Maker, image: Path, tmp_path: Path) -> None:
    qcow2 = tmp_path / "disk.qcow2"
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, qcow2]
    subprocess.run(convert, check=True, capture_output=True)
    server = servers(QemuNbd, "-f", "qcow2", qcow2)

    async def main() -> str:
        async with opened(server.url()) as source:
            found = await source.extents(0, source.size)
            assert found.stored_bytes() < source.size
            return "".join(mapjson.lines(found))

    def ranges(text: str) -> list[tuple[int, int, bool]]:
        return [(entry["start"], entry["length"], entry["zero"]) for entry in json.loads(text)]

    # qemu-img also tells that a qcow2's holes are not present.
    assert ranges(run(main)) == ranges(qemu_map(server.url()))


@pytest.mark.parametrize("words", [["--no-sr"], ["--filter=noextents"]])
def test_without_block_status_all_is_data(servers: Maker, image: Path, words: list[str]) -> None:
    server = servers(Nbdkit, *words, "file", image)

    async def main() -> None:
        async with opened(server.url()) as source:
            assert await source.extents(0, source.size) == all_data(0, source.size)

    run(main)


def test_extents_off_asks_nothing(servers: Maker, image: Path, tmp_path: Path) -> None:
    log = tmp_path / "requests"
    server = servers(Nbdkit, "--filter=log", "file", image, f"logfile={log}")

    async def main() -> None:
        async with opened(server.url(), extents=False) as source:
            assert await source.extents(0, source.size) == all_data(0, source.size)

    run(main)
    assert " Extents id=" not in log.read_text()


def test_terabytes_in_as_few_requests_as_can_be(servers: Maker, tmp_path: Path) -> None:
    log = tmp_path / "requests"
    size = 4 << 40
    server = servers(Nbdkit, "--filter=log", "memory", size, f"logfile={log}")

    async def main() -> None:
        async with opened(server.url()) as source:
            found = await source.extents(0, size)
            assert list(found) == [(0, size, Flags.HOLE | Flags.ZERO)]
            await source.extents(GIB, 2 * GIB)  # known by now

    run(main)
    assert log.read_text().count(" Extents id=") == -(-size // SEGMENT)


def test_lazily(servers: Maker, tmp_path: Path) -> None:
    log = tmp_path / "requests"
    server = servers(Nbdkit, "--filter=log", "memory", "1T", f"logfile={log}")

    async def main() -> None:
        async with opened(server.url()) as source:
            await source.extents(100 * GIB, 1000)
            await source.extents(100 * GIB + 500, 1000)

    run(main)
    assert log.read_text().count(" Extents id=") == 1


def test_half_a_million_extents_take_seconds(servers: Maker, tmp_path: Path) -> None:
    """Of an image of a terabyte; what nbdkit itself needs to tell them is most of it."""
    image = tmp_path / "holed"
    count = 250_000
    with image.open("wb") as file:
        for index in range(count):
            os.pwrite(file.fileno(), b"x", index * 16384)
        file.truncate(1 << 40)
        os.fsync(file.fileno())
    server = servers(Nbdkit, "file", image)

    async def main() -> float:
        async with opened(server.url()) as source:
            begun = time.monotonic()
            found = await source.extents(0, source.size)
            took = time.monotonic() - begun
            assert len(found) == 2 * count
            assert next(iter(found)) == (0, 4096, Flags.DATA)
            return took

    assert run(main, 60) < 15


def test_decoding_a_million_extents() -> None:
    entries = [4096, 0, 4096, ZERO] * 500_000
    begun = time.monotonic()
    found = decode("x", entries, 0, 4096 * 1_000_000, 1)
    assert time.monotonic() - begun < 5
    assert len(found) == 1_000_000


@pytest.mark.parametrize("error", ["EIO", "EPERM", "EINVAL"])
def test_server_that_refuses_is_read_as_data(servers: Maker, image: Path, error: str) -> None:
    server = servers(Nbdkit, "--filter=error", "file", image, f"error-extents={error}",
                     "error-extents-rate=1")  # fmt: skip

    async def main() -> None:
        async with opened(server.url()) as source:
            assert await source.extents(0, source.size) == all_data(0, source.size)
            assert bytes(await source.read(0, source.size)) == image.read_bytes()

    run(main)


def test_slow_server_gets_no_more_than_the_timeout(servers: Maker) -> None:
    server = servers(Nbdkit, "--filter=delay", "memory", "1T", "delay-extents=600ms")

    async def main() -> None:
        async with opened(server.url(), timeout_s=1) as source:
            begun = trio.current_time()
            found = await source.extents(0, source.size)
            assert trio.current_time() - begun < 2
            # What came in time is known.
            assert 0 < source.size - found.stored_bytes() < source.size

    run(main)


class Asked:
    """A server in numbers: describes at most `most` extents of `extents` at a time."""

    def __init__(self, extents: list[tuple[int, int]], most: int, longest: int = 1 << 32) -> None:
        self.extents, self.most, self.longest = extents, most, longest
        self.calls: list[tuple[int, int]] = []

    async def __call__(self, offset: int, length: int) -> list[int]:
        await trio.lowlevel.checkpoint()
        self.calls.append((offset, length))
        if length > self.longest:
            raise UnsupportedFeature("too long")
        found: list[int] = []
        at = 0
        for size, flags in self.extents:
            start, at = at, at + size
            if at > offset and len(found) < 2 * self.most and start < offset + length:
                found += [at - max(start, offset), flags]
        return found


def learn(asked: Asked, block: int = 1, least: int = MIB) -> ExtentList:
    size = sum(length for length, _ in asked.extents)

    async def main() -> ExtentList:
        return await NbdExtents("x", size, block, least, 10, asked).of(0, size)

    found: ExtentList = run(main)
    return found


runs = st.lists(
    st.tuples(st.integers(1, 40).map(lambda n: n * 512), st.integers(0, 7)), min_size=1, max_size=30
)


@given(runs, st.integers(1, 5))
def test_any_map_in_any_portions(extents: list[tuple[int, int]], most: int) -> None:
    found = learn(Asked(extents, most), block=512)
    wanted = b"".join(bytes([flags & ZERO]) * (length // 512) for length, flags in extents)
    assert b"".join(bytes([e.flags]) * (e.length // 512) for e in found) == wanted


def test_shorter_questions_for_a_server_that_wants_them() -> None:
    asked = Asked([(8 * MIB, 0), (24 * MIB, ZERO)], 10, longest=MIB)
    assert learn(asked).stored_bytes() == 8 * MIB
    assert max(length for _, length in asked.calls[1:]) == MIB


def test_unaligned_claims_move_on_in_blocks() -> None:
    asked = Asked([(5000, ZERO), (3000, 0), (8384, ZERO)], 1)
    found = learn(asked, block=4096)
    assert all(offset % 4096 == 0 for offset, _ in asked.calls)
    assert [(e.end, e.is_zero) for e in found] == [(4096, True), (8192, False), (16384, True)]


def test_hopelessly_fragmented_maps_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_extents, "MOST_REQUESTS", 10)
    asked = Asked([(512, 0), (512, ZERO)] * 1000, 1)
    found = learn(asked)
    assert len(asked.calls) == 10
    assert found.end == 1024 * 1000
    assert not any(e.is_zero for e in found.clip(5120, found.end))


def test_absurd_size_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_extents, "MOST_REQUESTS", 100)
    found = learn(Asked([((1 << 62) + 7, ZERO)], 1))
    assert found.end == (1 << 62) + 7
    assert len(found) == 2


@pytest.mark.parametrize("entries", [[], [4096], [0, 0], [4096, 0, 0, 3]])
def test_nonsense(entries: list[int]) -> None:
    with pytest.raises(ProtocolViolation):
        decode("x", entries, 0, 8192, 512)


def test_less_than_a_block_is_data() -> None:
    assert list(decode("x", [100, ZERO], 0, 8192, 512)) == [(0, 512, Flags.DATA)]


def test_unknown_flags_are_ignored_and_the_end_is_clipped() -> None:
    found = decode("x", [4096, 0xFFFFFFFC, 1 << 31, 0x13], 512, 8192, 512)
    assert list(found) == [(512, 4608, Flags.DATA), (4608, 8192, Flags.HOLE | Flags.ZERO)]
