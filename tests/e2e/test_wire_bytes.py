"""What crosses the wire for a sparse image: its data, once, and next to nothing more."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.images import scatter
from tests.mounts import MIB, Mount
from tests.servers.counting_proxy import CountingProxy
from tests.servers.ssh import Sshd

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
SIZE = 8192 * MIB
DATA = (1024 if LONG else 64) * MIB
#: Login, the helper's script and the extents of some hundred runs: 5 % of much data covers them.
HANDSHAKE = 0 if LONG else 300 << 10
WIRE = DATA * 105 // 100 + HANDSHAKE


@pytest.fixture
def proxy(sshd: Sshd) -> Iterator[CountingProxy]:
    between = CountingProxy(sshd.port)
    sshd.trust(between.port)
    yield between
    between.close()


def run(*words: object) -> str:
    command = [str(w) for w in words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


@pytest.mark.timeout(900 if LONG else 180)
def test_sparse_copy_moves_the_data_once(
    mount: Callable[..., Mount], sshd: Sshd, proxy: CountingProxy, tmp_path: Path
) -> None:
    source, copy, converted = (tmp_path / name for name in ("disk.img", "copy", "disk.qcow2"))
    scatter(source, SIZE, DATA)
    point = mount(sshd.url(source, proxy.port), "-o", sshd.options).point
    raw = point / "disk.raw"

    map_json = ("qemu-img", "map", "--output=json", "-f", "raw")
    assert run(*map_json, raw) == run(*map_json, source)
    assert proxy.up + proxy.down <= 300 << 10  # a map is no reason to read

    run("cp", raw, copy)
    assert DATA <= proxy.down <= proxy.up + proxy.down <= WIRE
    assert copy.stat().st_size == SIZE
    # cmp reads every hole, for half a minute; qemu-img steps over what is a hole in both.
    run(*(["cmp"] if LONG else ["qemu-img", "compare", "-f", "raw", "-F", "raw"]), source, copy)
    assert copy.stat().st_blocks <= source.stat().st_blocks * 1.03

    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, converted)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, converted)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, raw)
    # All of that came from here.
    assert proxy.up + proxy.down <= WIRE
