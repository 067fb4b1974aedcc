"""Commands that are started with standard descriptors closed, full, or read by nobody."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts import IMGFS, MIB, Mount

CLOSED = {"stdin": "0<&-", "stdout": "1>&-", "stderr": "2>&-", "all": "0<&- 1>&- 2>&-"}
#: by name: the words, and whether something is written to standard output
COMMANDS = {
    "help": ("--help", True),
    "version": ("--version", True),
    "mount help": ("mount --help", True),
    "info": ("info disk.img", True),
    "info json": ("info --json disk.img", True),
    "map": ("map disk.img", True),
    "map json": ("map --json disk.img", True),
    "copy": ("copy disk.img out.img", False),
    "copy json": ("copy --progress json disk.img out.img", True),
    "snapshot list": ("snapshot list disk.img", True),
    "cache list": ("cache list", True),
    "cache check": ("cache check", False),
    "top": ("top --once mnt0", True),
    "top json": ("top --json mnt0", True),
}
Run = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def run(mount: Callable[..., Mount], tmp_path: Path) -> Run:
    """Run words of a command with redirections, in a directory with an image and its mount."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(MIB))
    m = mount(image)
    (m.point / "snapshots/kept").mkdir()

    def work(words: str, redirections: str) -> subprocess.CompletedProcess[bytes]:
        command = ["bash", "-c", f'exec "$@" {redirections}', "-", *IMGFS, *words.split()]
        return subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=60)

    return work


@pytest.mark.parametrize("which", CLOSED)
def test_closed(run: Run, tmp_path: Path, which: str) -> None:
    for name, (words, _) in COMMANDS.items():
        whole = run(words, "")
        found = run(words, CLOSED[which])
        assert (whole.returncode, found.returncode) == (0, 0), (name, found.stderr)
        assert b"Traceback" not in found.stderr
        if which == "stdin":
            assert len(found.stdout.splitlines()) == len(whole.stdout.splitlines()), name
        if words.endswith("out.img"):
            assert (tmp_path / "out.img").read_bytes() == (tmp_path / "disk.img").read_bytes()
            (tmp_path / "out.img").unlink()


def test_full(run: Run, tmp_path: Path) -> None:
    line = f"imgfs: standard output: {os.strerror(errno.ENOSPC)}\n".encode()
    for name, (words, writes) in COMMANDS.items():
        found = run(words, ">/dev/full")
        said = [each for each in found.stderr.splitlines(keepends=True) if b"MiB" not in each]
        wanted = (1, [line]) if writes else (0, [])
        assert (found.returncode, said) == wanted, (name, found.stderr)
        assert run(words, "2>/dev/full").returncode == 0, name
        if words.endswith("out.img"):
            assert (tmp_path / "out.img").read_bytes() == (tmp_path / "disk.img").read_bytes()
    assert run("info nothing", "2>/dev/full").returncode == 1
    assert run("info nothing", ">/dev/full").returncode == 1


def test_a_pipe_that_is_closed(run: Run) -> None:
    for name, (words, writes) in COMMANDS.items():
        found = run(words, "> >(exec <&-)")
        # Who closed it may have done so after all was written.
        assert found.returncode in ((0, 1, 141) if writes else (0,)), name
        said = [line for line in found.stderr.splitlines() if b"MiB" not in line]
        assert said == [], name


@pytest.mark.parametrize("foreground", [False, True])
@pytest.mark.parametrize("which", CLOSED)
def test_a_mount(own_directories: None, tmp_path: Path, which: str, foreground: bool) -> None:
    image, point = tmp_path / "disk.img", tmp_path / "point"
    image.write_bytes(os.urandom(4 * MIB))
    point.mkdir()
    words = [*IMGFS, "mount", str(image), str(point), *(["-f"] if foreground else [])]
    command = ["bash", "-c", f'exec "$@" {CLOSED[which]}', "-", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        if foreground:
            while not os.path.ismount(point):
                assert process.poll() is None
                os.sched_yield()
        else:
            assert process.wait(60) == 0
        assert (point / "disk.raw").read_bytes() == image.read_bytes()
        (point / "snapshots/x").mkdir()
        with (point / "snapshots/x/x.raw").open("r+b") as file:
            file.write(b"written")
        done = subprocess.run(
            ["bash", "-c", f'exec "$@" {CLOSED[which]}', "-", *IMGFS, "umount", str(point)],
            timeout=60,
        )
        assert done.returncode == 0
        assert process.wait(60) == 0
    finally:
        subprocess.run(["fusermount3", "-uzq", point], timeout=20, capture_output=True)
        if process.poll() is None:
            process.kill()
            process.wait(20)
