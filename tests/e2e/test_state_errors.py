"""What is wrong with the directory that snapshots are kept in is told as it is.

By its own errno, in status.json and top, and in the log, once.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs.checksums import encode_document, seed_of
from imgfs.overlays import basefile
from tests.mounts import IMGFS, MIB, Mount, imgfs
from tests.small import BLOCK, faults, run, tmpfs

from .test_mount_signals import wait_until
from .test_state_gone import failed, last_error

Mounter = Callable[..., Mount]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    return path


def errors(m: Mount) -> int:
    images = m.status()["images"]
    assert isinstance(images, dict)
    return int(images["disk"].get("errors", 0))


def test_a_read_only_state(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with tmpfs(state, "8m"):
        m = mount(disk)
        (m.point / "snapshots/X").mkdir()
        run("mount", "-o", "remount,ro", state)
        assert failed((m.point / "snapshots/Y").mkdir) == errno.EROFS
        assert "Read-only file system; mount the filesystem of" in last_error(m)
        assert failed((m.point / "snapshots/X").rmdir) == errno.EROFS
        assert failed(lambda: (m.point / "snapshots/X/X.raw").open("r+b")) == errno.EROFS
        assert errors(m) >= 3
        assert "Read-only file system" in imgfs("top", "--once", m.point).stdout
        done = imgfs("snapshot", "create", disk, "Z")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "Read-only file system" in done.stderr
        assert imgfs("umount", m.point).returncode == 0


def test_a_full_state(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    """Each error that a program got is counted, whether it is found natively or not."""
    with tmpfs(tmp_path / "state", "300k"):
        m = mount(disk)
        (m.point / "snapshots/X").mkdir()
        with (m.point / "snapshots/X/X.raw").open("r+b", buffering=0) as file:
            fd = file.fileno()
            for size in (MIB, BLOCK):  # spliced, and copied
                for block in range(200):
                    if failed(lambda at=block * size, n=size: os.pwrite(fd, b"x" * n, at)):
                        break
                assert failed(lambda n=size: os.pwrite(fd, b"x" * n, 8 * MIB)) == errno.ENOSPC
            before = errors(m)
            for count in range(1, 6):
                assert failed(lambda: os.pwrite(fd, b"x" * MIB, 8 * MIB)) == errno.ENOSPC
                assert errors(m) == before + count
            assert re.search(r"disk/X: .*No space left on device; free space in /", last_error(m))
        assert failed((m.point / "snapshots/Y").mkdir) == errno.ENOSPC
        assert "No space left on device; free space in" in last_error(m)
        imgfs("umount", "--force", m.point)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EDQUOT, "Disk quota exceeded; free space in"),
        (errno.EIO, "Input/output error"),
        (errno.EROFS, "Read-only file system; mount the filesystem of"),
        (errno.EFBIG, "File too large; the filesystem of"),
    ],
)
@pytest.mark.parametrize("size", [BLOCK, MIB])
def test_what_the_kernel_says(
    mount: Mounter, disk: Path, tmp_path: Path, number: int, said: str, size: int
) -> None:
    m = mount(disk)
    (m.point / "snapshots/X").mkdir()
    with (m.point / "snapshots/X/X.raw").open("r+b", buffering=0) as file:
        fd = file.fileno()
        assert os.pwrite(fd, b"x" * size, 0) == size
        data = next((tmp_path / "state/imgfs").glob("*/layers/*/data"))
        with faults(m.pid, data, f"pwrite64,splice:error={errno.errorcode[number]}"):
            assert failed(lambda: os.pwrite(fd, b"y" * size, MIB)) == number
            before = errors(m)
            assert failed(lambda: os.pwrite(fd, b"y" * size, MIB)) == number
            assert errors(m) == before + 1
        assert said in last_error(m)
        assert os.pwrite(fd, b"z" * size, MIB) == size  # and it goes on
        os.fsync(fd)
        assert os.pread(fd, size, 0) + os.pread(fd, size, MIB) == b"x" * size + b"z" * size
    assert imgfs("umount", m.point).returncode == 0


USER = 65534


def test_another_owners_state(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    """Root may do all; so the capability that lets it goes."""
    (tmp_path / "state").mkdir()
    os.chown(tmp_path / "state", USER, USER)
    (tmp_path / "state").chmod(0o700)
    point = tmp_path / "point"
    point.mkdir()
    plain = "-dac_override,-dac_read_search"
    words = ["setpriv", f"--bounding-set={plain}", f"--inh-caps={plain}", *IMGFS]
    with subprocess.Popen([*words, "-f", str(disk), str(point)]) as process:
        try:
            wait_until(lambda: (point / "disk.raw").exists(), 20)
            assert failed((point / "snapshots/X").mkdir) == errno.EACCES
            said = (point / ".imgfs/status.json").read_text()
            assert f"Permission denied; see whose {tmp_path}" in said
        finally:
            assert imgfs("umount", point).returncode == 0
            assert process.wait(20) == 0


def of_another_version(path: Path) -> None:
    content = basefile.load(path)
    seed = seed_of("base", "")
    path.write_bytes(encode_document(basefile.VERSION + 1, content, seed))


@pytest.mark.parametrize("when", ["before", "while it is mounted"])
def test_state_of_another_version(mount: Mounter, disk: Path, tmp_path: Path, when: str) -> None:
    m = mount(disk)
    (m.point / "snapshots/X").mkdir()
    base = next((tmp_path / "state/imgfs").glob("*/base"))
    if when == "before":
        assert imgfs("umount", m.point).returncode == 0
    of_another_version(base)
    if when == "before":
        m = mount(disk)
    said = f"{base}: version {basefile.VERSION + 1} is of another imgfs"
    for action in (
        (m.point / "snapshots/Y").mkdir,
        lambda: list((m.point / "snapshots").iterdir()),
        (m.point / "snapshots/X/X.raw").stat,
        lambda: (m.point / "snapshots/X/X.raw").open("rb"),
        (m.point / "snapshots/X").rmdir,
    ):
        before = errors(m)
        assert failed(action) == errno.EOPNOTSUPP
        assert said in last_error(m)
        assert errors(m) > before
    for words in (
        ("snapshot", "list"),
        ("snapshot", "list", disk),
        ("snapshot", "create", disk, "Z"),
        ("snapshot", "delete", disk, "X"),
        ("snapshot", "export", disk, "X", tmp_path / "x.qcow2"),
        ("snapshot", "commit", disk, "X"),
    ):
        done = imgfs(*words)
        assert done.returncode == 1, words
        assert done.stderr.startswith(f"imgfs: {said}"), words
        assert done.stderr.count("\n") == 1
    assert said in imgfs("info", disk).stdout
    assert said in imgfs("top", "--once", m.point).stdout
    assert imgfs("umount", m.point).returncode == 0


def test_an_error_is_logged_once(disk: Path, tmp_path: Path, own_directories: None) -> None:
    point = tmp_path / "point"
    point.mkdir()
    with tmpfs(tmp_path / "state", "8m"):
        run("mount", "-o", "remount,ro", tmp_path / "state")
        command = [*IMGFS, "-f", str(disk), str(point)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda: (point / "disk.raw").exists(), 20)
            for _ in range(3):
                assert failed((point / "snapshots/Y").mkdir) == errno.EROFS
            assert imgfs("umount", point).returncode == 0
            lines = process.communicate(timeout=20)[1].splitlines()
    assert len([line for line in lines if "Read-only file system" in line]) == 1
