"""xfs in doubt: damaged at random, cut, flagged; and both versions as mkfs makes them."""

from __future__ import annotations

import os
import random
import struct
import time
from pathlib import Path

import pytest

from imgfs.guest.xfs import look
from tests.drive import Files

from .mounted import run
from .test_xfs import free_of_xfs_db

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
SIZE = 320 << 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By version; both hold a few files, and were never mounted."""
    directory = tmp_path_factory.mktemp("xfs")
    data = directory / "data"
    data.write_bytes(os.urandom(3 << 20))
    proto = directory / "proto"
    files = "\n".join(f"f{i} ---644 0 0 {data}" for i in range(20))
    proto.write_text(f"/\n0 0\nd--755 0 0\n{files}\n$\n")
    found = {}
    for version in (4, 5):
        path = found[version] = directory / f"v{version}"
        with path.open("wb") as file:
            file.truncate(SIZE)
        run("mkfs.xfs", "-q", "-m", f"crc={version - 4}", "-p", proto, path)
    return found


@pytest.mark.parametrize("version", [4, 5])
def test_as_xfs_db_says(images: dict[int, Path], version: int) -> None:
    found = Files(images[version]).run(look(0, SIZE))
    assert found.left_whole == ""
    assert sum(found.free[1::2]) - sum(found.free[::2]) > SIZE // 2
    pairs = list(zip(found.free[::2], found.free[1::2], strict=True))
    wanted = free_of_xfs_db(images[version])
    assert [(a, b) for a, b in pairs] == wanted


@pytest.mark.parametrize("version", [4, 5])
def test_mutations(images: dict[int, Path], version: int) -> None:
    """Never an exception, and never long."""
    rng = random.Random(version)
    whole = images[version].read_bytes()[: 8 << 20]
    hidden = images[version].stat().st_size
    for _ in range(3000 if LONG else 100):
        image = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 10])):
            at = rng.randrange(rng.choice([264, 4 * 512, len(image) - 8]))
            width = rng.choice([1, 2, 4, 8])
            value = rng.choice([0, 0xFFFFFFFFFFFFFFFF, 1, 0x80, rng.getrandbits(64)])
            image[at : at + width] = value.to_bytes(8, "little")[:width]
        began = time.process_time()
        found = Files(image).run(look(0, rng.choice([len(image), hidden, 1 << 45])))
        assert time.process_time() - began < 1
        assert found.left_whole or found.free


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("offset", [0, 8, 84, 88])
def test_absurd_superblocks(images: dict[int, Path], version: int, offset: int) -> None:
    image = bytearray(images[version].read_bytes()[: 1 << 20])
    struct.pack_into(">I", image, offset, 0xFFFFFFFF)
    assert Files(image).run(look(0, SIZE)).left_whole


def test_larger_than_its_place(images: dict[int, Path]) -> None:
    assert Files(images[5]).run(look(0, SIZE - 4096)).left_whole
