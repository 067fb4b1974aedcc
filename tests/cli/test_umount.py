"""`imgfs umount` says what is wrong in one line, whatever the process behind the mount does."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgfs.daemon.mounts import mounted_at
from tests.mounts import Mount, imgfs

Mounter = Callable[..., Mount]
PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH = 0x4206, 0x4207, 17  # linux/ptrace.h


@contextlib.contextmanager
def process_stopped(m: Mount) -> Iterator[None]:
    os.kill(m.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(m.pid, signal.SIGCONT)


@contextlib.contextmanager
def loop_stopped(m: Mount) -> Iterator[None]:
    """The main thread alone: the others still take requests, and nobody answers them."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        assert ptrace(request, m.pid, None, None) == 0, os.strerror(ctypes.get_errno())
    os.waitpid(m.pid, 0x40000000)  # __WALL: until it stands still
    try:
        yield
    finally:
        assert ptrace(PTRACE_DETACH, m.pid, None, None) == 0


@pytest.mark.parametrize("stopped", [process_stopped, loop_stopped])
def test_silent_mount(
    mount: Mounter,
    sparse: Path,
    stopped: Callable[[Mount], contextlib.AbstractContextManager[None]],
) -> None:
    m = mount(sparse)
    with stopped(m):
        begun = time.monotonic()
        done = imgfs("umount", m.point)
        assert time.monotonic() - begun < 8
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"imgfs: {m.point}: its process does not answer; to take it away without waiting run: "
            f"fusermount3 -uz {m.point}\n"
        )
    assert (m.point / "disk.raw").read_bytes() == sparse.read_bytes()  # it is still there
    assert imgfs("umount", m.point).returncode == 0


def test_dead_mount(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse)
    os.kill(m.pid, signal.SIGKILL)
    done = imgfs("umount", m.point)
    # Not 0: that would say that all is durable.
    said = "took away the mount of a process that has ended; "
    said += "what was written and not synced by then may be lost"
    assert (done.returncode, done.stderr) == (1, f"imgfs: {m.point}: {said}\n")
    assert mounted_at(str(m.point)) is None


def test_what_is_no_mount(tmp_path: Path, sparse: Path) -> None:
    for path in (tmp_path, sparse, tmp_path / "missing"):
        done = imgfs("umount", path)
        assert (done.returncode, done.stderr) == (1, f"imgfs: {path}: is not a live imgfs mount\n")


def test_busy_mount(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse)
    with (m.point / "disk.raw").open("rb"):
        done = imgfs("umount", m.point)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "busy" in done.stderr.lower()
    assert imgfs("umount", m.point).returncode == 0


@pytest.mark.parametrize("command", ["umount", "top"])
def test_no_name_is_not_the_working_directory(
    mount: Mounter, sparse: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    m = mount(sparse)
    monkeypatch.chdir(m.point)
    done = imgfs(command, "")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "imgfs: '': no such directory; a mount point must exist\n"
    assert mounted_at(str(m.point)) is not None


def test_a_late_word_to_give_up_kills_nobody() -> None:
    """`imgfs umount --force` may say it to a process that ends by itself just then."""
    code = """
import os, signal, trio
from imgfs.daemon.stop import Stop

async def main():
    async with trio.open_nursery() as nursery:
        await nursery.start(Stop().listen)
        nursery.cancel_scope.cancel()

trio.run(main)
os.kill(os.getpid(), signal.SIGUSR1)
print("still here")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (0, "still here\n")
