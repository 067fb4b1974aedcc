"""Extents and exact identity over ssh, from each kind of helper and from none."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs._native import _map
from imgfs.extents import ExtentList, Flags, from_data_ranges
from imgfs.sources.ssh.helper import NoHelper, _extend, from_boundaries
from tests.servers.ssh import Sshd

from .conftest import MIB, opened, run

KINDS = ["python3", "perl", "qemu-img"]
NAMES = [
    b"plain",
    b"-dash",
    b"sp ace",
    b"new\nline\n",
    b"$(touch pwned) `x` \\0101 %s",
    b"q'uo\"te;&|",
    b"col:on",
    b"json:{}",
    b"\xff\xfe\x01",
    "\N{SNOWMAN}".encode(),
    b"~",
]


def true_extents(path: Path) -> ExtentList:
    size = path.stat().st_size
    fd = os.open(path, os.O_RDONLY)
    try:
        return ExtentList(0, *_map.scan_file(fd, size)) if size else from_data_ranges(iter([]), 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind", KINDS)
def test_exact(sshd: Sshd, image: Path, kind: str) -> None:
    async def main() -> None:
        async with opened(sshd, image, helpers=(kind,)) as source:
            assert await source.extents(0, source.size) == true_extents(image)
            part = await source.extents(MIB - 1, 2 * MIB)
            assert part == true_extents(image).clip(MIB - 1, 3 * MIB - 1)
            st = image.stat()
            wanted = f"{st.st_dev}:{st.st_ino}:{st.st_size}:{st.st_mtime_ns}:{st.st_ctime_ns}"
            assert source.stat.identity is not None
            assert (source.stat.identity.kind, source.stat.identity.token) == ("stat", wanted)
            await source.check_identity()

    run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(sshd: Sshd, tmp_path: Path, kind: str) -> None:
    """Empty, all hole, all data, a hole at the end, a hole at the start, sizes of no sector."""
    shapes = {"hole": (MIB + 7, []), "data": (70000, [(0, 70000)])}
    shapes |= {"end": (MIB + 1, [(0, 4096)]), "start": (MIB + 3, [(MIB, 3)])}
    for name, (size, writes) in shapes.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
            for offset, length in writes:
                file.seek(offset)
                file.write(b"x" * length)
            os.fsync(file.fileno())

    async def main() -> None:
        for name in shapes:
            async with opened(sshd, tmp_path / name, helpers=(kind,)) as source:
                assert await source.extents(0, source.size) == true_extents(tmp_path / name)

    run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_names(sshd: Sshd, image: Path, tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "names"
    directory.mkdir()
    before = set(Path.home().iterdir())

    async def main() -> None:
        for name in NAMES:
            path = Path(os.fsdecode(bytes(directory) + b"/" + name))
            subprocess.run(["cp", "--sparse=always", "--", image, path], check=True)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            async with opened(sshd, path, helpers=(kind,)) as source:
                assert os.fsencode(source.name) == name
                assert await source.extents(0, source.size) == true_extents(path)
                assert source.stat.identity is not None
                assert source.stat.identity.kind == "stat"
                assert bytes(await source.read(MIB, 10)) == image.read_bytes()[MIB : MIB + 10]
            path.unlink()

    run(main, 60)
    assert set(Path.home().iterdir()) == before


@pytest.mark.parametrize(("programs", "kind"), [(["perl"], "perl"), (["sh"], None)])
def test_first_that_is_there(
    make_sshd: Callable[..., Sshd], image: Path, tmp_path: Path, programs: list[str], kind: str
) -> None:
    """A server without python3 is asked in perl; one with neither is asked nothing."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for program in [*programs, "stat"]:
        found = shutil.which(program)
        assert found is not None
        (bin_ / program).symlink_to(found)
    server = make_sshd(SetEnv=f"PATH={bin_}")

    async def main() -> None:
        async with opened(server, image) as source:
            found = await source.extents(0, source.size)
            assert source.stat.identity is not None
            if kind:
                assert found == true_extents(image)
                assert source.stat.identity.kind == "stat"
            else:
                assert found.stored_bytes() == source.size
                assert source.stat.identity.kind == "sftp"
            assert bytes(await source.read(MIB, 10)) == image.read_bytes()[MIB : MIB + 10]

    run(main)


def test_extents_off_starts_nothing(sshd: Sshd, image: Path) -> None:
    async def main() -> None:
        async with opened(sshd, image, extents=False) as source:
            assert (await source.extents(0, source.size)).stored_bytes() == source.size
            assert len(sshd.pids()) == 3  # the listener, the connection, the SFTP server

    run(main)


def test_helper_ends_with_the_connection(sshd: Sshd, image: Path) -> None:
    async def main() -> None:
        async with opened(sshd, image) as source:
            await source.extents(0, source.size)

    run(main)
    deadline = time.monotonic() + 5
    while len(sshd.pids()) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(sshd.pids()) == 1


def test_noisy_login(make_sshd: Callable[..., Sshd], image: Path) -> None:
    """What a shell's rc files print before the helper speaks is skipped."""
    command = 'if [ "$SSH_ORIGINAL_COMMAND" = /usr/lib/openssh/sftp-server ]; then exec '
    command += '$SSH_ORIGINAL_COMMAND; fi; echo Welcome; echo; eval "$SSH_ORIGINAL_COMMAND"'
    server = make_sshd(ForceCommand=command)

    async def main() -> None:
        async with opened(server, image) as source:
            assert await source.extents(0, source.size) == true_extents(image)

    run(main)


def test_many_extents_are_fast(sshd: Sshd, tmp_path: Path) -> None:
    path = tmp_path / "many"
    with path.open("wb") as file:
        for n in range(20_000):
            os.pwrite(file.fileno(), b"x", n * 8192)
        os.fsync(file.fileno())

    async def main() -> None:
        async with opened(sshd, path) as source:
            found = await source.extents(0, source.size)
            assert len(found) > 30_000
            assert found == true_extents(path)

    run(main, 20)


def test_boundaries_against_the_validating_builder() -> None:
    for ranges, size in (
        ([], 0),
        ([], 10),
        ([(0, 10)], 10),
        ([(0, 3)], 10),
        ([(3, 10)], 10),
        ([(1, 2), (3, 4), (7, 9)], 10),
        ([(0, 2), (3, 4), (7, 10)], 10),
    ):
        flat = array("Q", [n for pair in ranges for n in pair])
        assert from_boundaries(flat, size) == from_data_ranges(iter(ranges), size)


def test_a_million_boundaries() -> None:
    found: array[int] = array("Q")
    line = [b"4096"] * 2048
    begun = time.monotonic()
    for _ in range(1000):
        _extend(found, map(int, line))
    extents = from_boundaries(found, found[-1])
    assert time.monotonic() - begun < 2
    assert len(extents) == 2048 * 1000
    assert extents.clip(0, 4096).flags == bytes([Flags.HOLE | Flags.ZERO])


@pytest.mark.parametrize("distances", [[], [1], [1, 0], [0, 1, 0, 1], [1, -1], [1, 1 << 64]])
def test_senseless_distances(distances: list[int]) -> None:
    with pytest.raises((ValueError, OverflowError, NoHelper)):
        _extend(array("Q"), distances)
