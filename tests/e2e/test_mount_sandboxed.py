"""Mounts where the kernel, or a sandbox, refuses system calls: copied instead, or said so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.formats import qemu
from tests.mounts import IMGFS, MIB

from . import sandbox

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(sandbox.library() is None, reason="needs libseccomp"),
    # Without privileges of its own a filter takes fusermount3's away.
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
SPLICES = "splice,vmsplice,tee"
#: refused one at a time, as gVisor, old container runtimes and strict units of systemd do it
OTHERS = (
    "pidfd_open",
    "eventfd2",
    "memfd_create",
    "copy_file_range",
    "fallocate",
    "close_range",
    "openat2",
    "preadv2",
    "setpipe",
)


@pytest.fixture
def sandboxed(own_directories: None, tmp_path: Path) -> Iterator[Run]:
    """Run imgfs with these calls refused."""
    point = tmp_path / "point"
    point.mkdir()

    def run(error: str, names: str, *words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, sandbox.__file__, error, names, *IMGFS, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    yield run
    subprocess.run(["fusermount3", "-uzq", point], timeout=20, capture_output=True)


def used(point: Path) -> None:
    """Write and read large ranges, one by one and at once, and look that all is right."""
    image, raw = point.parent / "disk.img", point / "disk.raw"
    content = image.read_bytes()
    assert raw.read_bytes() == content
    (point / "snapshots/x").mkdir()
    x = point / "snapshots/x/x.raw"
    new = os.urandom(len(content))
    with x.open("r+b", buffering=0) as file:
        for at in range(0, len(new), 3 * MIB):
            file.write(new[at : at + 3 * MIB])
        os.fsync(file.fileno())
    assert x.read_bytes() == new
    fd = os.open(x, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert b"".join(iter(lambda: os.read(fd, MIB), b"")) == new
    finally:
        os.close(fd)
    dd = ["dd", f"if={image}", f"of={x}", "bs=2M", "conv=notrunc,fsync", "status=none"]
    subprocess.run(dd, check=True, timeout=60)
    assert x.read_bytes() == content
    subprocess.run(["fallocate", "-p", "-o", "1M", "-l", "2M", x], check=True, timeout=60)
    assert x.read_bytes() == content[:MIB] + bytes(2 * MIB) + content[3 * MIB :]
    (point / "snapshots/y").mkdir()
    y = point / "snapshots/y/y.raw"
    subprocess.run(["cp", "--sparse=never", x, y], check=True, timeout=60)
    assert y.read_bytes() == x.read_bytes()
    qemu.img("compare", "-f", "qcow2", "-F", "raw", point / "snapshots/x/x.qcow2", x)
    (point / "snapshots/y").rmdir()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(10 * MIB) + bytes(MIB) + os.urandom(1000))
    return path


@pytest.mark.parametrize("names", [SPLICES, "splice", "vmsplice", f"{SPLICES},setpipe"])
@pytest.mark.parametrize("error", ["EINVAL", "EPERM", "ENOSYS"])
def test_splice(sandboxed: Run, image: Path, tmp_path: Path, error: str, names: str) -> None:
    point = tmp_path / "point"
    done = sandboxed(error, names, image, point)
    assert (done.returncode, done.stderr) == (0, "")
    used(point)
    assert sandboxed(error, names, "umount", point).returncode == 0


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
def test_another(sandboxed: Run, image: Path, tmp_path: Path, error: str, name: str) -> None:
    point = tmp_path / "point"
    done = sandboxed(error, name, image, point)
    assert (done.returncode, done.stderr) == (0, "")
    used(point)
    done = sandboxed(error, name, "umount", point)
    assert (done.returncode, done.stderr) == (0, "")
    for words in (["info", image], ["map", image], ["copy", image, tmp_path / "copy.qcow2"]):
        done = sandboxed(error, name, *words)
        assert done.returncode == 0, done.stderr
    qemu.img("compare", "-f", "raw", "-F", "qcow2", image, tmp_path / "copy.qcow2")
