"""A mount over a long line: what a read costs in round trips, and what part of the line is used."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.images import fill
from tests.mounts import MIB, Mount
from tests.servers.delay_proxy import DelayProxy
from tests.servers.ssh import Sshd

from .test_mount_cache import MOST_MEMORY, resident

TRIP_S = 0.1
RATE = 25e6  # bytes a second: 200 Mbit/s

Mounter = Callable[..., Mount]


@pytest.fixture
def far(sshd: Sshd) -> Iterator[DelayProxy]:
    proxy = DelayProxy(sshd.port, TRIP_S, RATE)
    sshd.trust(proxy.port)
    yield proxy
    proxy.close()


def test_a_random_cold_read_costs_one_round_trip(
    mount: Mounter, sshd: Sshd, far: DelayProxy, tmp_path: Path
) -> None:
    source = tmp_path / "disk.img"
    fill(source, 64 * MIB)
    m = mount(sshd.url(source, far.port), "-o", sshd.options)
    rng, taken = random.Random(1), []
    raw, theirs = m.point / "disk.raw", source.open("rb")
    with raw.open("rb", buffering=0) as file, theirs:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for block in rng.sample(range(64), 15):
            offset = block * MIB + 4096
            begun = time.monotonic()
            found = os.pread(file.fileno(), 4096, offset)
            taken.append(time.monotonic() - begun)
            assert found == os.pread(theirs.fileno(), 4096, offset)
    assert min(taken) >= TRIP_S  # or this measures nothing
    assert statistics.median(taken) < 1.6 * TRIP_S


def test_a_sequential_cold_read_fills_the_line(
    mount: Mounter, sshd: Sshd, far: DelayProxy, tmp_path: Path
) -> None:
    """Half of it at the very least; with one request a round trip it would be a tenth."""
    source, size = tmp_path / "disk.img", 96 * MIB
    fill(source, size)
    m = mount(sshd.url(source, far.port), "-o", sshd.options)
    with (m.point / "disk.raw").open("rb", buffering=0) as file, source.open("rb") as theirs:
        begun = time.monotonic()
        while data := file.read(MIB):
            assert data == theirs.read(MIB)
        rate = size / (time.monotonic() - begun)
        assert not theirs.read(1)
    assert RATE / 2 < rate < 1.1 * RATE
    assert resident(m.pid, "VmHWM") < MOST_MEMORY


def test_a_miss_does_not_wait_for_what_is_read_ahead(
    mount: Mounter, sshd: Sshd, far: DelayProxy, tmp_path: Path
) -> None:
    """While another reader has the line full."""
    source = tmp_path / "disk.img"
    fill(source, 256 * MIB)
    m = mount(sshd.url(source, far.port), "-o", sshd.options)
    taken = []
    with (m.point / "disk.raw").open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 128 * MIB, 128 * MIB, os.POSIX_FADV_RANDOM)
        begun = time.monotonic()
        while time.monotonic() < begun + 2:
            file.read(MIB)
        for n in range(6):
            for _ in range(6):
                file.read(MIB)
            at = time.monotonic()
            os.pread(file.fileno(), 4096, (250 - 7 * n) * MIB)
            taken.append(time.monotonic() - at)
    # The line holds 2.5 MB, and with it goes what cannot be held back any more: a few fetches.
    assert statistics.median(taken) < 5 * TRIP_S
