"""What crosses the wire for a copy of sparse/: what is in use, and not the free blocks between."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounts import MIB, Mount
from tests.servers.counting_proxy import CountingProxy
from tests.servers.ssh import Sshd

from .test_mount_sparse import START, loop_mounted, run

SIZE = 200 * MIB
FILE = 4 * MIB
KEPT, GONE = 4, 28
#: Login, the helper's script, and what is looked at to find out what is free.
SPARE = 4 * MIB


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """16 MiB of files, and before, between and behind them 112 MiB of deleted ones."""
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    table = f"label: gpt\nstart={START // 512}, size={160 * MIB // 512}\n"
    subprocess.run(["sfdisk", "-q", disk], input=table.encode(), timeout=20, check=True)
    run("mkfs.ext4", "-q", "-J", "size=4", "-E", f"offset={START}", disk, f"{160 * 1024}k")
    with loop_mounted(disk, tmp_path / "fs", offset=START, options="rw", size=160 * MIB) as fs:
        names = [f"gone {n}" for n in range(GONE)]
        for n in range(KEPT):
            names.insert((n + 1) * GONE // KEPT, f"kept {n}")
        for name in names:
            (fs / name).write_bytes(os.urandom(FILE))
            os.sync()
        for path in fs.glob("gone *"):
            path.unlink()
    return disk


@pytest.fixture
def proxy(sshd: Sshd) -> Iterator[CountingProxy]:
    between = CountingProxy(sshd.port)
    sshd.trust(between.port)
    yield between
    between.close()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_copy_fetches_what_is_in_use(
    mount: Callable[..., Mount],
    sshd: Sshd,
    proxy: CountingProxy,
    used: Path,
    tmp_path: Path,
    format: str,
) -> None:
    if format != "raw":
        run("qemu-img", "convert", "-f", "raw", "-O", format, used, used.with_suffix(".qcow2"))
        used = used.with_suffix(".qcow2")
    m = mount(sshd.url(used, proxy.port), "-o", sshd.options)
    copy = tmp_path / "copy.raw"
    run("cp", m.point / "sparse/disk.raw", copy)
    stored = copy.stat().st_blocks * 512
    assert KEPT * FILE <= stored < KEPT * FILE + 4 * MIB
    assert proxy.down < stored + SPARE
