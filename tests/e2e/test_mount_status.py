"""The figures of `.imgfs/status.json`, and that `.imgfs/metrics` and `imgfs top` show them."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.images import fill
from tests.mounts import MIB, Mount, imgfs
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big.img"
    fill(path, 64 * MIB)
    return path


def image(m: Mount) -> dict[str, Any]:
    (found,) = m.status()["images"].values()  # type: ignore[attr-defined]
    assert found["hits"] + found["misses"] == found["reads"]
    return dict(found)


def counts(m: Mount) -> tuple[int, int, int]:
    """Reads, misses, and the bytes that programs have got."""
    found = image(m)
    return found["reads"], found["misses"], found["bytes_native"] + found["bytes_python"]


class Reader:
    """Reads past the page cache, so that what is counted is what was asked for."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self._buffer = mmap.mmap(-1, MIB)

    def read(self, offset: int, length: int) -> None:
        assert os.preadv(self._fd, [memoryview(self._buffer)[:length]], offset) == length

    def close(self) -> None:
        os.close(self._fd)


def test_hits_and_misses(mount: Mounter, sshd: Sshd, big: Path) -> None:
    m = mount(sshd.url(big), "-o", sshd.options)
    reader = Reader(m.point / "big.raw")
    assert counts(m) == (0, 0, 0)
    for n, offset in enumerate((50 * MIB, 10 * MIB, 30 * MIB), 1):  # nobody reads ahead for these
        reader.read(offset, 4096)
        assert counts(m) == (n, n, n * 4096)
    time.sleep(0.5)  # what was read is being written to the cache meanwhile
    for n in range(1, 101):
        reader.read(10 * MIB + 4096 * (n % 16), 4096)
        assert counts(m) == (3 + n, 3, (3 + n) * 4096)
    reader.close()


def test_window_of_a_stream(mount: Mounter, sshd: Sshd, big: Path) -> None:
    m = mount(sshd.url(big), "-o", sshd.options)
    reader = Reader(m.point / "big.raw")
    windows = []
    for offset in range(0, 64 * MIB, MIB):
        reader.read(offset, MIB)
        windows.append(image(m)["window"])
    reader.close()
    assert windows[0] == 0
    assert max(windows) >= 4 * MIB
    assert windows[-1] == 0  # nothing is left to be ahead of
    reads, misses, length = counts(m)
    assert (reads, length) == (128, 64 * MIB)  # the kernel asks for half of one at a time
    assert 0 < misses < reads


def test_who_waits_for_others_blocks_missed_too(mount: Mounter, sshd: Sshd, big: Path) -> None:
    m = mount(sshd.url(big), "-o", sshd.options)
    fds = [os.open(m.point / "big.raw", os.O_RDONLY | os.O_DIRECT) for _ in range(8)]
    sshd.send(signal.SIGSTOP)
    words = ["dd", "bs=64k", "count=1", "skip=320", "status=none"]
    try:
        readers = [subprocess.Popen(words, stdin=fd, stdout=subprocess.DEVNULL) for fd in fds]
        time.sleep(1)
        assert counts(m) == (0, 0, 0)  # none of them is answered
    finally:
        sshd.send(signal.SIGCONT)
    assert [reader.wait(20) for reader in readers] == [0] * 8
    for fd in fds:
        os.close(fd)
    assert counts(m) == (8, 8, 8 * 65536)


def test_what_an_earlier_mount_left_is_no_miss(mount: Mounter, sshd: Sshd, sparse: Path) -> None:
    first = mount(sshd.url(sparse), "-o", sshd.options)
    assert (first.point / "disk.raw").read_bytes() == sparse.read_bytes()
    assert counts(first)[1] > 0
    assert imgfs("umount", first.point).returncode == 0
    again = mount(sshd.url(sparse), "-o", sshd.options)
    reader = Reader(again.point / "disk.raw")
    for n in range(48):  # Python finds out that they are good, and its reads are counted once
        reader.read(5 * MIB + n * 65536, 65536)
    reader.close()
    assert counts(again) == (48, 0, 48 * 65536)


def test_a_local_image_never_misses(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse)
    reader = Reader(m.point / "disk.raw")
    for offset in range(0, 64 * MIB, MIB):
        reader.read(offset, MIB)
    reader.close()
    assert counts(m) == (128, 0, 64 * MIB)
    assert image(m)["window"] == 0


def test_metrics_and_top_show_the_same(mount: Mounter, sshd: Sshd, sparse: Path) -> None:
    m = mount(sshd.url(sparse), "-o", sshd.options)
    assert (m.point / "disk.raw").read_bytes() == sparse.read_bytes()
    found = image(m)
    text = (m.point / ".imgfs/metrics").read_text()
    families = {f.name: f.samples for f in text_string_to_metric_families(text)}
    for key in ("reads", "hits", "misses"):
        assert [s.value for s in families[f"imgfs_image_{key}"]] == [found[key]]
    assert [s.value for s in families["imgfs_image_readahead_window_bytes"]] == [found["window"]]
    shown = imgfs("top", "--once", m.point).stdout.splitlines()[-1]
    assert f" {100 * found['hits'] / found['reads']:.0f} % " in shown
