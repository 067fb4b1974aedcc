"""`originals/` of a directory mounted write=through: files are created, renamed and removed."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mounts import MIB, Mount, imgfs
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]


def run(*words: object) -> str:
    command = [str(w) for w in words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@dataclass
class Pool:
    """A directory that is mounted; `far` is how it is at the source."""

    far: Path
    point: Path

    @property
    def originals(self) -> Path:
        return self.point / "originals"


@pytest.fixture(params=["file", "ssh"])
def pool(request: pytest.FixtureRequest, mount: Mounter, tmp_path: Path) -> Iterator[Pool]:
    far = tmp_path / "far"
    far.mkdir()
    (far / "old.raw").write_bytes(b"old" * 1000)
    if request.param == "ssh":
        server: Sshd = request.getfixturevalue("sshd")
        url = server.url(far) + "/"
        yield Pool(far, mount(url, "-o", f"{server.options},write=through").point)
    else:
        yield Pool(far, mount(f"{far}/", "-o", "write=through").point)


def test_a_copied_file_is_there_and_keeps_its_holes(pool: Pool, tmp_path: Path) -> None:
    new = tmp_path / "new.raw"
    with new.open("wb") as file:
        file.write(os.urandom(3 * MIB + 5))
        file.seek(20 * MIB)
        file.write(os.urandom(MIB))
        file.truncate(64 * MIB)
    run("cp", "--sparse=never", new, pool.originals)
    far = pool.far / "new.raw"
    run("cmp", new, far)
    # Not st_blocks: some file systems allocate ahead of what is appended.
    fd = os.open(far, os.O_RDONLY)
    assert os.lseek(fd, 0, os.SEEK_HOLE) <= 4 * MIB
    assert os.lseek(fd, 4 * MIB, os.SEEK_DATA) == 20 * MIB
    assert os.lseek(fd, 20 * MIB, os.SEEK_HOLE) == 21 * MIB
    os.close(fd)
    run("cmp", new, pool.originals / "new.raw")
    # It is an image: it appears as one.
    assert (pool.point / "new").is_dir()
    run("cmp", new, pool.point / "new/new.raw")


def test_rename_also_over_another(pool: Pool) -> None:
    here = pool.originals
    (here / "a.raw").write_bytes(b"a" * 5000)
    (here / "b.raw").write_bytes(b"b" * 7000)
    assert (here / "b.raw").read_bytes() == b"b" * 7000
    (here / "a.raw").rename(here / "b.raw")
    assert (pool.far / "b.raw").read_bytes() == b"a" * 5000
    assert (here / "b.raw").read_bytes() == b"a" * 5000
    assert sorted(each.name for each in here.iterdir()) == ["b.raw", "old.raw"]
    (here / "b.raw").rename(here / "c.txt")
    assert (here / "c.txt").read_bytes() == b"a" * 5000
    run("mv", "-n", here / "c.txt", here / "old.raw")
    assert (here / "old.raw").read_bytes() == b"old" * 1000
    with pytest.raises(OSError) as caught:
        (here / "c.txt").rename(pool.point / "c.txt")
    assert caught.value.errno in (errno.EXDEV, errno.EROFS)


def test_unlink_and_create_again(pool: Pool) -> None:
    file = pool.originals / "x.raw"
    for content in (b"first", b"second, longer", b"3"):
        file.write_bytes(content)
        assert (pool.far / "x.raw").read_bytes() == content
        assert (pool.point / "x/x.raw").read_bytes() == content
        file.unlink()
        assert not (pool.far / "x.raw").exists()
        assert not file.exists()
    with pytest.raises(FileNotFoundError):
        file.unlink()
    with pytest.raises(FileExistsError):
        os.open(pool.originals / "old.raw", os.O_CREAT | os.O_EXCL | os.O_RDWR)


def test_overwrite_append_and_truncate(pool: Pool) -> None:
    file = pool.originals / "old.raw"
    file.write_bytes(b"new")
    assert (pool.far / "old.raw").read_bytes() == b"new"
    with file.open("ab") as out:
        out.write(b" and more")
    assert (pool.far / "old.raw").read_bytes() == b"new and more"
    os.truncate(file, 3)
    assert (pool.far / "old.raw").read_bytes() == b"new"
    run("rsync", "-a", "--inplace", "/etc/passwd", file)
    assert (pool.far / "old.raw").read_bytes() == Path("/etc/passwd").read_bytes()


def test_programs_that_write_beside_and_rename(pool: Pool) -> None:
    run("rsync", "-a", "/etc/passwd", pool.originals / "passwd.raw")
    assert (pool.far / "passwd.raw").read_bytes() == Path("/etc/passwd").read_bytes()
    run("qemu-img", "create", "-q", "-f", "qcow2", pool.originals / "q.img", "64M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 3M", pool.originals / "q.img")
    run("qemu-img", "check", pool.far / "q.img")
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 7 1M 3M", pool.far / "q.img")


def test_without_write_through_nothing_changes(mount: Mounter, tmp_path: Path) -> None:
    far = tmp_path / "far"
    far.mkdir()
    (far / "old.raw").write_bytes(b"old")
    here = mount(f"{far}/").point / "originals"
    for change in (
        lambda: (here / "new").write_bytes(b""),
        lambda: (here / "old.raw").unlink(),
        lambda: (here / "old.raw").rename(here / "b"),
        lambda: (here / "old.raw").write_bytes(b"x"),
    ):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno in (errno.EROFS, errno.EACCES)
    assert [each.name for each in far.iterdir()] == ["old.raw"]


def test_a_big_copy_is_on_disk_when_umount_returns(pool: Pool, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.write_bytes(os.urandom(100 * MIB))
    began = time.monotonic()
    run("cp", new, pool.originals / "big.raw")
    took = time.monotonic() - began
    assert took < 30
    assert imgfs("umount", pool.point).returncode == 0
    run("cmp", new, pool.far / "big.raw")
