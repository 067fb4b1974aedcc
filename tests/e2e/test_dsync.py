"""A write that must be on the disk when it returns: O_DSYNC of the file, RWF_DSYNC of the write."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts import MIB, Mount
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]

#: flags of open, flags of the write; O_DIRECT of "cleared" is taken away between the two
HOWS = {
    "as dd": (os.O_WRONLY | os.O_DSYNC, 0),
    "O_SYNC": (os.O_RDWR | os.O_SYNC, 0),
    "past the cache": (os.O_RDWR | os.O_DIRECT | os.O_DSYNC, 0),
    "as qemu": (os.O_RDWR | os.O_DIRECT, os.RWF_DSYNC),
    "only one": (os.O_WRONLY, os.RWF_DSYNC),
    "cleared": (os.O_RDWR | os.O_DIRECT, os.RWF_DSYNC),
}


@pytest.fixture(params=["snapshot", "file", "ssh"])
def written(
    request: pytest.FixtureRequest, mount: Mounter, sshd: Sshd, tmp_path: Path
) -> tuple[Mount, Path, Callable[[], bytes]]:
    """A mount, a file that can be written there, and how to read it when the mount was killed."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(MIB))
    if request.param == "snapshot":
        m = mount(image)
        (m.point / "snapshots/x").mkdir()
        inside = "snapshots/x/x.raw"
        return m, m.point / inside, lambda: (mount(image).point / inside).read_bytes()
    if request.param == "file":
        m = mount(image, "-o", "write=through")
    else:
        m = mount(sshd.url(image), "-o", f"{sshd.options},write=through")
    return m, m.point / "disk.raw", image.read_bytes


@pytest.mark.parametrize("how", HOWS)
def test_is_there_after_kill_9(written: tuple[Mount, Path, Callable[[], bytes]], how: str) -> None:
    m, path, read = written
    wanted = bytearray(path.read_bytes())
    flags, write_flags = HOWS[how]
    fd = os.open(path, flags)
    if how == "cleared":  # qemu does so where a disk's cache mode is changed
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
    with mmap.mmap(-1, 8192) as block:  # aligned
        for number, (offset, length) in enumerate([(0, 8192), (65536, 4096), (65536, 4096)]):
            block[:] = bytes([number + 1]) * len(block)
            part = memoryview(block)[:length]
            assert os.pwritev(fd, [part], offset, write_flags) == length
            wanted[offset : offset + length] = part
            part.release()
    os.kill(m.pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.close(fd)
    subprocess.run(["fusermount3", "-uz", m.point], timeout=20, check=True)
    assert read() == wanted
