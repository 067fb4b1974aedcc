"""A mount of a disk of 1 TiB in a million extents: what memory it takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.big_qcow2 import CLUSTER, write_qcow2
from tests.mounts import MIB, Mount

from .test_mount_cache import resident

Mounter = Callable[..., Mount]
TIB = 1 << 40
EVERY = 32  # one of so many clusters is stored: half a million


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    count = TIB // CLUSTER // EVERY
    # Each in the file where none of its neighbours on the disk is.
    places = {index * EVERY: index * 7919 % count for index in range(count)}
    path = tmp_path_factory.mktemp("million") / "disk.qcow2"
    write_qcow2(path, TIB, places)
    yield path
    path.unlink()


def walk(fd: int, start: int, count: int) -> None:
    at = start
    for _ in range(count):
        data = os.lseek(fd, at, os.SEEK_DATA)
        at = os.lseek(fd, data, os.SEEK_HOLE)
        assert (data % (EVERY * CLUSTER), at - data) == (0, CLUSTER)


def test_a_million_extents_in_100_mib(mount: Mounter, million: Path) -> None:
    # With the file's own holes there would be no data at all.
    m = mount(million, "-o", "extents=off")
    path = m.point / "disk.raw"
    assert path.stat().st_blocks * 512 == TIB // EVERY
    fd = os.open(path, os.O_RDONLY)
    try:
        for start in (0, TIB // 2, TIB - 4096 * EVERY * CLUSTER):
            walk(fd, start, 4096)
            assert os.pread(fd, 4096, start) == bytes(4096)
    finally:
        os.close(fd)
    assert resident(m.pid, "VmHWM") < 100 * MIB
