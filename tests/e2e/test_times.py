"""The times of what is written: the same sequence on a plain file tells when they are to change."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mounts import MIB, Mount, imgfs
from tests.servers.nbd import Nbdkit
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
TICK_S = 0.02  # longer than a filesystem's clock takes for one step
SIZE = 8 * MIB

_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def copy(fd: int, offset: int, to: int, length: int) -> None:
    assert os.copy_file_range(fd, fd, length, offset, to) == length


#: Each is done to an open file after the one before, by its path if it takes one.
STEPS: dict[str, Callable[[int, Path], object]] = {
    "fsync of nothing": lambda fd, path: os.fsync(fd),
    "write of blocks": lambda fd, path: os.pwrite(fd, os.urandom(MIB), MIB),
    "write of a few bytes": lambda fd, path: os.pwrite(fd, b"few", 4 * MIB + 5),
    "write over itself": lambda fd, path: os.pwrite(fd, b"few", 4 * MIB + 5),
    "fsync": lambda fd, path: os.fsync(fd),
    "read": lambda fd, path: os.pread(fd, MIB, MIB),
    "allocate inside": lambda fd, path: fallocate(fd, 0, 0, MIB),
    "allocate behind the end": lambda fd, path: fallocate(fd, KEEP_SIZE, SIZE, MIB),
    "punch data": lambda fd, path: fallocate(fd, KEEP_SIZE | PUNCH_HOLE, MIB, MIB // 2),
    "punch the hole": lambda fd, path: fallocate(fd, KEEP_SIZE | PUNCH_HOLE, MIB, MIB // 2),
    "punch a few bytes": lambda fd, path: fallocate(fd, KEEP_SIZE | PUNCH_HOLE, 3 * MIB + 7, 9),
    "zero data": lambda fd, path: fallocate(fd, ZERO_RANGE, MIB + MIB // 2, MIB // 4),
    "zero the hole": lambda fd, path: fallocate(fd, ZERO_RANGE, MIB, MIB // 4),
    "fsync of holes": lambda fd, path: os.fsync(fd),
    "copy data": lambda fd, path: copy(fd, 2 * MIB - 4096, 6 * MIB, 4096),
    "copy a hole": lambda fd, path: copy(fd, MIB, 6 * MIB, 4096),
    "grow": lambda fd, path: os.ftruncate(fd, SIZE + MIB),
    "the same size": lambda fd, path: os.ftruncate(fd, SIZE + MIB),
    "cut": lambda fd, path: os.ftruncate(fd, SIZE - MIB),
    "grow by allocating": lambda fd, path: fallocate(fd, 0, SIZE - MIB, MIB),
    "cut by name": lambda fd, path: os.truncate(path, SIZE - 4096),
    "append": lambda fd, path: os.pwrite(fd, os.urandom(8192), SIZE - 4096),
    "set the mtime": lambda fd, path: os.utime(path, ns=(0, 1_000_000_000_123_456_789)),
    "set it to the same": lambda fd, path: os.utime(path, ns=(0, 1_000_000_000_123_456_789)),
    "write after that": lambda fd, path: os.pwrite(fd, b"more", 0),
    "touch": lambda fd, path: os.utime(path),
    "open with O_TRUNC": lambda fd, path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
    "write to the empty file": lambda fd, path: os.pwrite(fd, b"x" * 10000, 0),
}


@dataclass(frozen=True)
class Seen:
    """What a step did: whether a time moved on, or went back, and the size and bytes then."""

    mtime: int
    ctime: int
    size: int
    content: bytes


def compared(before: int, after: int) -> int:
    return (after > before) - (after < before)


def seen(path: Path) -> dict[str, Seen]:
    found = {}
    fd = os.open(path, os.O_RDWR)
    try:
        for name, step in STEPS.items():
            before = os.fstat(fd)
            time.sleep(TICK_S)
            step(fd, path)
            after = path.stat()
            assert after.st_ino == os.fstat(fd).st_ino
            found[name] = Seen(
                compared(before.st_mtime_ns, after.st_mtime_ns),
                compared(before.st_ctime_ns, after.st_ctime_ns),
                after.st_size,
                os.pread(fd, SIZE * 2, 0)[:64],
            )
    finally:
        os.close(fd)
    return found


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"disk" * (SIZE // 4))
    os.utime(path, ns=(0, 1_500_000_000_000_000_000))
    return path


@pytest.fixture(params=["snapshot", "file", "ssh", "sftp", "originals"])
def shown(request: pytest.FixtureRequest, image: Path, mount: Mounter) -> Iterator[Path]:
    """A file in a mount that can be written, and is what `image` is."""
    if request.param == "snapshot":
        point = mount(image).point
        (point / "snapshots/x").mkdir()
        yield point / "snapshots/x/x.raw"
    elif request.param == "file":
        yield mount(image, "-o", "write=through").point / "disk.raw"
    elif request.param == "originals":
        alone = image.parent / "pool"
        alone.mkdir()
        image.rename(alone / image.name)
        yield mount(f"{alone}/", "-o", "write=through").point / "originals/disk.raw"
    else:
        server: Sshd = request.getfixturevalue("sshd")
        more = ",extents=off" if request.param == "sftp" else ""
        options = f"{server.options},write=through{more}"
        yield mount(server.url(image), "-o", options).point / "disk.raw"


def test_times_move_as_those_of_a_plain_file(
    request: pytest.FixtureRequest, shown: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"disk" * (SIZE // 4))
    os.utime(plain, ns=(0, 1_500_000_000_000_000_000))
    assert shown.stat().st_mtime_ns == plain.stat().st_mtime_ns
    expected = seen(plain)
    steps = dict(STEPS)
    if "sftp" in request.node.callspec.id:
        # Nobody there can make a hole.
        for name in [name for name in STEPS if name.startswith(("punch",))]:
            del STEPS[name], expected[name]
    try:
        found = seen(shown)
    finally:
        STEPS.update(steps)
    assert {name: (each.mtime, each.ctime, each.size) for name, each in found.items()} == {
        name: (each.mtime, each.ctime, each.size) for name, each in expected.items()
    }
    if "sftp" not in request.node.callspec.id:
        assert found == expected


def test_a_time_that_was_set_is_kept_until_a_write(shown: Path) -> None:
    when = 1_234_567_890_123_456_789
    shown.open("r+b").close()
    os.utime(shown, ns=(0, when))
    assert shown.stat().st_mtime_ns == when
    assert abs(shown.stat().st_ctime - time.time()) < 60
    with shown.open("r+b") as file:
        file.write(b"new")
    assert abs(shown.stat().st_mtime - time.time()) < 60


def snapshot_of(point: Path, name: str = "x") -> Path:
    return point / f"snapshots/{name}/{name}.raw"


def times(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_ctime_ns


def kill(one: Mount) -> None:
    os.kill(one.pid, signal.SIGKILL)
    subprocess.run(["fusermount3", "-uz", str(one.point)], timeout=20, check=False)


def test_a_snapshot_keeps_its_times_over_umount(image: Path, mount: Mounter) -> None:
    one = mount(image)
    for name in ("fresh", "written", "set"):
        (one.point / f"snapshots/{name}").mkdir()
    written, was_set = snapshot_of(one.point, "written"), snapshot_of(one.point, "set")
    with written.open("r+b") as file:
        file.write(b"written")
    os.utime(was_set, ns=(0, 999_999_999_999_999_999))
    before = {name: times(snapshot_of(one.point, name)) for name in ("fresh", "written", "set")}
    assert before["fresh"][0] == image.stat().st_mtime_ns
    assert before["set"][0] == 999_999_999_999_999_999
    assert abs(before["written"][0] / 1e9 - time.time()) < 60
    assert imgfs("umount", one.point).returncode == 0
    two = mount(image)
    assert {name: times(snapshot_of(two.point, name)) for name in before} == before


def test_a_snapshot_keeps_its_times_over_a_kill(image: Path, mount: Mounter) -> None:
    one = mount(image)
    for name in ("fresh", "synced", "written", "set"):
        (one.point / f"snapshots/{name}").mkdir()
        snapshot_of(one.point, name).stat()
    fds = []
    for name in ("synced", "written"):
        fds.append(os.open(snapshot_of(one.point, name), os.O_RDWR))
        os.pwrite(fds[-1], b"x" * MIB, 0)
        os.fsync(fds[-1])
        time.sleep(TICK_S)
        os.pwrite(fds[-1], b"y" * 4096, 0)  # onto a block of the layer's: only the file tells of it
        if name == "synced":
            os.fsync(fds[-1])
    os.utime(snapshot_of(one.point, "set"), ns=(0, 10**18))
    before = {n: times(snapshot_of(one.point, n))[0] for n in ("fresh", "synced", "written", "set")}
    kill(one)
    for fd in fds:
        with contextlib.suppress(OSError):  # which says that the mount has gone
            os.close(fd)
    two = mount(image)
    after = {name: times(snapshot_of(two.point, name))[0] for name in before}
    assert after == before
    with snapshot_of(two.point, "synced").open("rb") as file:
        assert file.read(4097) == b"y" * 4096 + b"x"


def test_after_a_power_loss_a_snapshot_that_was_open_is_not_older_than_its_content(
    image: Path, mount: Mounter, tmp_path: Path
) -> None:
    one = mount(image)
    (one.point / "snapshots/x").mkdir()
    with snapshot_of(one.point).open("r+b") as file:
        file.write(b"x" * MIB)
        os.fsync(file.fileno())
    kill(one)
    # What a power loss may leave: the file's mtime of before, and nothing of this boot.
    for layer in (tmp_path / "state/imgfs").glob("*/layers/*"):
        os.utime(layer / "data", ns=(0, 10**18))
        os.utime(layer, ns=(0, 10**18))
    began = time.time()
    two = mount(image)
    assert began - 1 < snapshot_of(two.point).stat().st_mtime < time.time() + 1
    shown = snapshot_of(two.point).stat().st_mtime_ns
    assert imgfs("umount", two.point).returncode == 0
    assert snapshot_of(mount(image).point).stat().st_mtime_ns == shown


def test_times_of_what_is_made_of_a_snapshot(image: Path, mount: Mounter) -> None:
    subprocess.run(["mkfs.ext4", "-qF", str(image)], check=True, timeout=60)
    point = mount(image).point
    (point / "snapshots/x").mkdir()
    x = snapshot_of(point)
    for content in (b"first", b"second"):
        with x.open("r+b") as file:
            file.seek(6 * MIB)
            file.write(content)
        time.sleep(TICK_S)
        shown = ("x.qcow2", "x.vmdk", "x.vdi", "x.delta.qcow2", "sparse/x.raw", "sparse/x.qcow2")
        mtime_ns = x.stat().st_mtime_ns
        assert {name: (x.parent / name).stat().st_mtime_ns for name in shown} == dict.fromkeys(
            shown, mtime_ns
        )
        assert x.stat().st_mtime_ns == mtime_ns
        name = content.decode()
        (x.parent / "snapshots" / name).mkdir()
        nested = x.parent / f"snapshots/{name}/{name}.raw"
        assert nested.stat().st_mtime_ns == x.stat().st_mtime_ns == mtime_ns
    (point / "snapshots/x").rename(point / "snapshots/y")
    assert snapshot_of(point, "y").stat().st_mtime_ns == mtime_ns
    os.utime(snapshot_of(point, "y"), ns=(0, 10**18))
    assert (point / "snapshots/y/y.qcow2").stat().st_mtime_ns == 10**18
    assert (point / "snapshots/y/snapshots/second/second.qcow2").stat().st_mtime_ns == mtime_ns


def test_blocks_follow_what_is_punched_copied_and_cut(image: Path, mount: Mounter) -> None:
    point = mount(image).point
    (point / "snapshots/x").mkdir()
    fd = os.open(snapshot_of(point), os.O_RDWR)

    def blocks() -> int:
        return os.fstat(fd).st_blocks * 512

    assert blocks() == SIZE
    fallocate(fd, KEEP_SIZE | PUNCH_HOLE, 0, MIB)
    assert blocks() == SIZE - MIB
    fallocate(fd, ZERO_RANGE, 2 * MIB, MIB)
    assert blocks() == SIZE - 2 * MIB
    copy(fd, 0, 4 * MIB, MIB)  # of a hole
    assert blocks() == SIZE - 3 * MIB
    copy(fd, 5 * MIB, 0, MIB)
    assert blocks() == SIZE - 2 * MIB
    os.ftruncate(fd, 4 * MIB)
    assert blocks() == 3 * MIB
    os.close(fd)


def test_rsync_sees_every_change(image: Path, mount: Mounter, tmp_path: Path) -> None:
    one = mount(image)
    (one.point / "snapshots/x").mkdir()
    backup = tmp_path / "backup.raw"

    def rsync(source: Path) -> None:
        subprocess.run(["rsync", "-a", source, backup], check=True, timeout=60)
        assert backup.read_bytes() == source.read_bytes()
        assert backup.stat().st_mtime_ns == source.stat().st_mtime_ns

    x = snapshot_of(one.point)
    rsync(x)
    for step in ("write of blocks", "punch data", "zero data", "copy data"):
        time.sleep(1.1)  # rsync compares seconds
        fd = os.open(x, os.O_RDWR)
        STEPS[step](fd, x)
        os.close(fd)
        rsync(x)
    assert imgfs("umount", one.point).returncode == 0
    two = mount(image)
    rsync(snapshot_of(two.point))
    # The other way: what rsync sets is what it finds.
    (two.point / "snapshots/y").mkdir()
    y = snapshot_of(two.point, "y")
    subprocess.run(["rsync", "-a", "--inplace", backup, y], check=True, timeout=60)
    told = subprocess.run(
        ["rsync", "-ai", "--inplace", backup, y],
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert "f..t" not in told.stdout and ">f" not in told.stdout


def test_a_time_passes_on_to_the_source(
    request: pytest.FixtureRequest, image: Path, mount: Mounter
) -> None:
    server: Sshd = request.getfixturevalue("sshd")
    for source, options in ((image, ""), (server.url(image), f"{server.options},")):
        one = mount(source, "-o", f"{options}write=through")
        shown = one.point / "disk.raw"
        with shown.open("r+b") as file:
            file.write(os.urandom(4096))
        os.utime(shown, ns=(0, 1_111_111_111_222_222_222))
        assert image.stat().st_mtime_ns == 1_111_111_111_222_222_222
        assert imgfs("umount", one.point).returncode == 0
        assert image.stat().st_mtime_ns == 1_111_111_111_222_222_222


def test_times_of_an_export_which_has_none(mount: Mounter, image: Path, tmp_path: Path) -> None:
    server = Nbdkit(tmp_path / "nbd", "file", image, write=True)
    try:
        shown = mount(server.url(), "-o", "write=through").point / "disk.raw"
        shown.open("r+b").close()
        os.utime(shown, ns=(0, 10**18 + 7))
        assert shown.stat().st_mtime_ns == 10**18 + 7
        last = shown.stat()
        fd = os.open(shown, os.O_RDWR)
        for name in [*list(STEPS)[:13], "fsync of holes", "write after that"]:
            before = os.fstat(fd)
            STEPS[name](fd, shown)
            last = os.fstat(fd)
            if "fsync" in name or name == "read":
                assert last.st_mtime_ns >= before.st_mtime_ns
            else:
                assert last.st_mtime_ns > before.st_mtime_ns, name
        os.close(fd)
        assert shown.stat().st_mtime_ns >= last.st_mtime_ns
    finally:
        server.stop()


def test_times_of_a_partition_of_a_snapshot(image: Path, mount: Mounter) -> None:
    subprocess.run(
        ["sfdisk", "-q", str(image)], input=b"label: gpt\nstart=2048\n", check=True, timeout=60
    )
    point = mount(image).point
    (point / "snapshots/x").mkdir()
    x = snapshot_of(point)
    part = x.parent / "partitions/1.raw"
    assert part.stat().st_mtime_ns == x.stat().st_mtime_ns == image.stat().st_mtime_ns
    with x.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(b"new")
    assert part.stat().st_mtime_ns == x.stat().st_mtime_ns > image.stat().st_mtime_ns


def test_a_file_that_cannot_be_written_keeps_its_times(image: Path, mount: Mounter) -> None:
    shown = mount(image).point / "disk.raw"
    with pytest.raises(OSError) as caught:
        os.utime(shown, ns=(0, 5))
    assert caught.value.errno == errno.EROFS
    assert shown.stat().st_mtime_ns == image.stat().st_mtime_ns
