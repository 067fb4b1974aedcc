"""An open file stays itself, whatever happens to its name: as on a plain filesystem."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mounts import MIB, Mount, imgfs
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]


@dataclass
class Pool:
    """A directory that is mounted; `far` is how it is at the source."""

    far: Path
    point: Path
    server: Sshd | None

    @property
    def originals(self) -> Path:
        return self.point / "originals"


def make_pool(request: pytest.FixtureRequest, mount: Mounter, tmp_path: Path, kind: str) -> Pool:
    far = tmp_path / "far"
    far.mkdir()
    if kind == "file":
        return Pool(far, mount(f"{far}/", "-o", "write=through").point, None)
    server: Sshd = request.getfixturevalue("sshd")
    more = ",extents=off" if kind == "sftp" else ""
    options = f"{server.options},write=through,timeout=5{more}"
    return Pool(far, mount(server.url(far) + "/", "-o", options).point, server)


@pytest.fixture(params=["file", "ssh", "sftp"])
def pool(request: pytest.FixtureRequest, mount: Mounter, tmp_path: Path) -> Iterator[Pool]:
    yield make_pool(request, mount, tmp_path, request.param)


def content(fd: int) -> bytes:
    return os.pread(fd, 64 * MIB, 0)


def rename_while_open(here: Path) -> Iterator[object]:
    fd = os.open(here / "a.raw", os.O_CREAT | os.O_RDWR)
    inode = os.fstat(fd).st_ino
    os.pwrite(fd, b"a" * 5000, 0)
    (here / "a.raw").rename(here / "b.raw")
    os.pwrite(fd, b"b" * 5000, 5000)
    yield content(fd)
    yield os.fstat(fd).st_nlink, (here / "b.raw").stat().st_ino == inode
    os.fsync(fd)
    yield (here / "b.raw").read_bytes()
    (here / "b.raw").rename(here / "c.img")
    os.ftruncate(fd, 100)
    os.pwrite(fd, b"c", 200)
    yield content(fd)
    os.close(fd)
    yield (here / "c.img").read_bytes()
    yield sorted(each.name for each in here.iterdir())


def remove_while_open(here: Path) -> Iterator[object]:
    fd = os.open(here / "a.raw", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"a" * 5000, 0)
    reader = os.open(here / "a.raw", os.O_RDONLY)
    (here / "a.raw").unlink()
    yield os.fstat(fd).st_nlink
    os.pwrite(fd, b"b" * 70000, 3000)
    os.fsync(fd)
    yield content(fd), content(reader)
    (here / "a.raw").write_bytes(b"another")
    yield (here / "a.raw").stat().st_ino != os.fstat(fd).st_ino
    os.pwrite(fd, b"c" * 10, 0)
    os.ftruncate(fd, 20000)
    yield os.fstat(fd).st_size, content(fd), content(reader)
    os.utime(fd, ns=(0, 10**18))
    yield os.fstat(fd).st_mtime_ns
    os.close(fd)
    os.close(reader)
    yield (here / "a.raw").read_bytes()


def replace_while_open(here: Path) -> Iterator[object]:
    (here / "a.raw").write_bytes(b"a" * 5000)
    (here / "b.raw").write_bytes(b"b" * 7000)
    a, b = os.open(here / "a.raw", os.O_RDWR), os.open(here / "b.raw", os.O_RDWR)
    inode = os.fstat(a).st_ino
    os.pwrite(a, b"1", 0)
    os.pwrite(b, b"2", 0)
    (here / "a.raw").rename(here / "b.raw")
    yield os.fstat(a).st_nlink, os.fstat(b).st_nlink
    os.pwrite(a, b"3", 1)
    os.pwrite(b, b"4", 1)
    yield content(a), content(b)
    os.fsync(b)
    os.fsync(a)
    os.pwrite(b, b"5" * 100000, 2)
    yield content(b)
    os.close(b)
    os.close(a)
    yield (here / "b.raw").read_bytes()
    yield (here / "b.raw").stat().st_ino == inode
    yield (here / "a.raw").exists()


def written_beside_and_renamed(here: Path) -> Iterator[object]:
    (here / "a.raw").write_bytes(b"old" * 1000)
    reader = os.open(here / "a.raw", os.O_RDONLY)
    yield content(reader)
    for number in range(3):
        new = here / f".a.raw.{number}"
        with new.open("wb") as file:
            file.write(b"%d" % number * 5000)
            new.rename(here / "a.raw")
            file.write(b"more")
        yield (here / "a.raw").read_bytes()
    os.close(reader)
    yield sorted(each.name for each in here.iterdir())


def no_replace(here: Path) -> Iterator[object]:
    (here / "a.raw").write_bytes(b"a")
    (here / "b.raw").write_bytes(b"b")
    fd = os.open(here / "a.raw", os.O_RDWR)
    subprocess.run(["mv", "-n", here / "a.raw", here / "b.raw"], timeout=60, check=False)
    os.pwrite(fd, b"c", 1)
    os.close(fd)
    yield (here / "a.raw").read_bytes(), (here / "b.raw").read_bytes()
    subprocess.run(["mv", "-n", here / "a.raw", here / "c.raw"], timeout=60, check=True)
    yield (here / "c.raw").read_bytes()


SEQUENCES = [
    rename_while_open,
    remove_while_open,
    replace_while_open,
    written_beside_and_renamed,
    no_replace,
]


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_as_on_a_plain_filesystem(
    pool: Pool, tmp_path: Path, sequence: Callable[[Path], Iterator[object]]
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    expected = list(sequence(plain))
    assert list(sequence(pool.originals)) == expected
    # And the source is what the plain directory is.
    there = {each.name: each.read_bytes() for each in plain.iterdir()}
    assert imgfs("umount", pool.point).returncode == 0
    assert {each.name: each.read_bytes() for each in pool.far.iterdir()} == there


def test_the_image_directory_follows(pool: Pool) -> None:
    (pool.originals / "a.raw").write_bytes(b"a" * 5000)
    fd = os.open(pool.point / "a/a.raw", os.O_RDWR)
    os.pwrite(fd, b"1", 0)
    (pool.originals / "a.raw").rename(pool.originals / "b.raw")
    os.pwrite(fd, b"2", 1)
    for path in (pool.point / "b/b.raw", pool.point / "b/original/b.raw", pool.originals / "b.raw"):
        assert path.read_bytes() == b"12" + b"a" * 4998
        assert path.stat().st_ino == os.fstat(fd).st_ino
    with (pool.point / "b/b.raw").open("r+b") as file:
        file.write(b"34")
    assert content(fd) == b"34" + b"a" * 4998
    os.close(fd)
    assert (pool.far / "b.raw").read_bytes() == b"34" + b"a" * 4998
    assert not (pool.point / "a").exists()


def test_renamed_by_somebody_else(pool: Pool) -> None:
    (pool.originals / "a.raw").write_bytes(b"a" * 5000)
    fd = os.open(pool.originals / "a.raw", os.O_RDWR)
    os.pwrite(fd, b"1", 0)
    os.fsync(fd)
    (pool.far / "a.raw").rename(pool.far / "b.raw")
    os.pwrite(fd, b"2", 1)
    os.fsync(fd)
    assert content(fd) == b"12" + b"a" * 4998
    assert (pool.far / "b.raw").read_bytes() == b"12" + b"a" * 4998
    (pool.far / "b.raw").unlink()
    (pool.far / "a.raw").write_bytes(b"another")
    os.pwrite(fd, b"3", 2)
    os.fsync(fd)
    assert content(fd) == b"123" + b"a" * 4997
    os.close(fd)
    assert (pool.originals / "a.raw").read_bytes() == b"another"
    assert (pool.far / "a.raw").read_bytes() == b"another"


def test_replaced_by_somebody_else(pool: Pool) -> None:
    (pool.originals / "a.raw").write_bytes(b"a" * 5000)
    fd = os.open(pool.originals / "a.raw", os.O_RDWR)
    os.pwrite(fd, b"1", 0)
    os.fsync(fd)
    (pool.far / "new").write_bytes(b"n" * 6000)
    (pool.far / "new").rename(pool.far / "a.raw")
    os.pwrite(fd, b"2", 1)
    assert content(fd) == b"12" + b"a" * 4998
    os.fsync(fd)
    assert (pool.originals / "a.raw").read_bytes() == b"n" * 6000
    with (pool.originals / "a.raw").open("r+b") as file:
        file.write(b"new")
    os.pwrite(fd, b"3", 2)
    os.close(fd)
    assert (pool.far / "a.raw").read_bytes() == b"new" + b"n" * 5997


def test_changed_by_somebody_else_is_stale_all_the_same(pool: Pool) -> None:
    (pool.originals / "a.raw").write_bytes(b"a" * 5000)
    fd = os.open(pool.originals / "a.raw", os.O_RDWR)
    with (pool.far / "a.raw").open("r+b") as file:
        file.write(b"theirs, and longer" * 1000)
    with pytest.raises(OSError) as caught:
        os.pwrite(fd, b"ours", 0)
        os.fsync(fd)
    assert caught.value.errno == errno.ESTALE
    with contextlib.suppress(OSError):
        os.close(fd)
    assert (pool.far / "a.raw").read_bytes() == b"theirs, and longer" * 1000


@pytest.mark.parametrize("says", ["nothing", "fsync", "close"])
def test_a_lost_connection_is_survived_by_name_only(
    request: pytest.FixtureRequest, mount: Mounter, tmp_path: Path, says: str
) -> None:
    """Without a name the handle was all there was: fsync and close say that it is gone."""
    pool = make_pool(request, mount, tmp_path, "ssh")
    assert pool.server is not None
    (pool.originals / "a.raw").write_bytes(b"a" * 5000)
    fd = os.open(pool.originals / "a.raw", os.O_RDWR)
    os.fsync(fd)
    has_name = says == "nothing"
    if has_name:
        (pool.originals / "a.raw").rename(pool.originals / "b.raw")
    else:
        (pool.originals / "a.raw").unlink()
    pool.server.kill_sessions()
    if has_name:
        os.pwrite(fd, b"1", 0)
        os.fsync(fd)
        os.close(fd)
        assert (pool.far / "b.raw").read_bytes() == b"1" + b"a" * 4999
        return
    with pytest.raises(OSError) as caught:
        os.pwrite(fd, b"1", 0)
        if says == "fsync":
            os.fsync(fd)
        os.close(fd)
    assert caught.value.errno == errno.ESTALE
    with contextlib.suppress(OSError):
        os.close(fd)


def test_a_snapshot_that_is_renamed_stays_open(mount: Mounter, sparse: Path) -> None:
    snapshots = mount(sparse).point / "snapshots"
    (snapshots / "x").mkdir()
    fd = os.open(snapshots / "x/x.raw", os.O_RDWR)
    os.pwrite(fd, b"1", 0)
    (snapshots / "x").rename(snapshots / "y")
    os.pwrite(fd, b"2", 1)
    os.fsync(fd)
    with pytest.raises(OSError) as caught:
        (snapshots / "y").rmdir()
    assert caught.value.errno == errno.EBUSY
    assert os.pread(fd, 2, 0) == b"12"
    os.close(fd)
    with (snapshots / "y/y.raw").open("rb") as file:
        assert file.read(2) == b"12"
