"""Writing through a mount to its source: what programs do, what is durable, and what goes wrong."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mounts import MIB, Mount, imgfs
from tests.servers.nbd import Nbdkit, QemuNbd
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 0x10
STEPS = 6000 if os.environ.get("IMGFS_TEST_LONG") else 250
LIBC = ctypes.CDLL(None, use_errno=True)


def run(*words: object, timeout: float = 60) -> str:
    command = [str(w) for w in words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=True
    ).stdout


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    size = ctypes.c_longlong
    if LIBC.fallocate64(fd, mode, size(offset), size(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@dataclass
class Through:
    """An image that is mounted write=through; `image` is the file at the source's side."""

    image: Path
    raw: Path
    mounted: Mount
    is_resizable: bool = True


@pytest.fixture(params=["file", "ssh", "nbdkit", "qemu-nbd"])
def through(
    request: pytest.FixtureRequest, mount: Mounter, tmp_path: Path, sparse: Path
) -> Iterator[Through]:
    kind = request.param
    if kind == "file":
        mounted = mount(sparse, "-o", "write=through")
        yield Through(sparse, mounted.point / "disk.raw", mounted)
    elif kind == "ssh":
        server: Sshd = request.getfixturevalue("sshd")
        mounted = mount(server.url(sparse), "-o", f"{server.options},write=through")
        yield Through(sparse, mounted.point / "disk.raw", mounted)
    else:
        os.truncate(sparse, 64 * MIB)  # qemu-nbd rounds up to sectors
        words = ("file", sparse) if kind == "nbdkit" else ("-f", "raw", "--discard=unmap", sparse)
        maker = Nbdkit if kind == "nbdkit" else QemuNbd
        nbd = maker(tmp_path / "nbd", *words, write=True)
        try:
            mounted = mount(nbd.url(), "-o", "write=through")
            yield Through(sparse, mounted.point / "disk.raw", mounted, is_resizable=False)
        finally:
            nbd.stop()


class Model:
    """A file's bytes, and the same operations on them as on the mounted one."""

    def __init__(self, path: Path, source: Path) -> None:
        self.path = path
        self.bytes = bytearray(source.read_bytes())
        self.fd = os.open(path, os.O_RDWR)

    def close(self) -> None:
        os.close(self.fd)

    def write(self, offset: int, data: bytes) -> None:
        assert os.pwrite(self.fd, data, offset) == len(data)
        if offset > len(self.bytes):
            self.bytes += bytes(offset - len(self.bytes))
        self.bytes[offset : offset + len(data)] = data

    def zero(self, mode: int, offset: int, length: int) -> None:
        fallocate(self.fd, mode, offset, length)
        end = offset + length
        if end > len(self.bytes) and not mode & KEEP_SIZE:
            self.bytes += bytes(end - len(self.bytes))
        end = min(end, len(self.bytes))
        self.bytes[offset:end] = bytes(max(0, end - offset))

    def truncate(self, size: int) -> None:
        os.ftruncate(self.fd, size)
        self.bytes = self.bytes[:size] + bytes(max(0, size - len(self.bytes)))

    def check(self, offset: int, length: int) -> None:
        found = os.pread(self.fd, length, offset)
        assert found == self.bytes[offset : offset + length], f"{length} bytes at {offset}"

    def check_holes(self) -> None:
        """A hole is never where a byte is not zero."""
        at = 0
        assert os.fstat(self.fd).st_size == len(self.bytes)
        while at < len(self.bytes):
            try:
                data = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError as exc:
                assert exc.errno == errno.ENXIO
                data = len(self.bytes)
            assert not any(self.bytes[at:data]), f"a hole at {at}"
            at = os.lseek(self.fd, data, os.SEEK_HOLE) if data < len(self.bytes) else data


def test_anything_in_any_order(through: Through) -> None:
    model = Model(through.raw, through.image)
    chance = random.Random(7)
    most = 66 * MIB if through.is_resizable else len(model.bytes)
    for step in range(STEPS):
        offset = chance.randrange(len(model.bytes) + 1) if model.bytes else 0
        if chance.random() < 0.5:
            offset -= offset % 4096
        length = max(1, int(chance.choice((100, 512, 4096, 70_000, 1_500_000)) * chance.random()))
        what = chance.random()
        if what < 0.4:
            length = min(length, most - offset)
            if length:
                data = chance.randbytes(length) if chance.random() < 0.8 else bytes(length)
                model.write(offset, data)
        elif what < 0.5 and offset < len(model.bytes):
            model.zero(PUNCH_HOLE | KEEP_SIZE, offset, length)
        elif what < 0.58 and offset + length <= most:
            model.zero(ZERO_RANGE | chance.choice((0, KEEP_SIZE)), offset, length)
        elif what < 0.6 and through.is_resizable:
            model.truncate(chance.randrange(most))
        elif what < 0.64:
            os.fsync(model.fd)
        elif what < 0.66:
            model.close()
            model.fd = os.open(through.raw, os.O_RDWR)
        elif what < 0.68:
            os.posix_fadvise(model.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        elif what < 0.69:
            model.check_holes()
        else:
            model.check(offset, length)
        assert os.fstat(model.fd).st_size == len(model.bytes), step
    os.fsync(model.fd)
    assert through.image.read_bytes() == model.bytes
    os.posix_fadvise(model.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    model.check_holes()
    for at in range(0, len(model.bytes), 8 * MIB):
        model.check(at, 8 * MIB)
    model.close()
    assert imgfs("umount", through.mounted.point).returncode == 0
    assert through.image.read_bytes() == model.bytes


def test_programs_write_as_on_a_local_file(through: Through, tmp_path: Path) -> None:
    raw, image = through.raw, through.image
    size = image.stat().st_size
    new = tmp_path / "new"
    with new.open("wb") as file:
        file.write(os.urandom(3 * MIB))
        file.truncate(size)
        file.seek(40 * MIB)
        file.write(os.urandom(2 * MIB))
    run("cp", new, raw)
    run("cmp", new, raw)
    run("cmp", new, image)
    assert raw.stat().st_size == size
    if through.is_resizable:
        assert image.stat().st_blocks <= new.stat().st_blocks + 1024
    part = os.urandom(5 * MIB)
    (tmp_path / "part").write_bytes(part)
    run("dd", f"if={tmp_path / 'part'}", f"of={raw}", "bs=64k", "seek=20", "conv=notrunc,fsync")
    assert image.read_bytes()[20 << 16 :][: 5 * MIB] == part
    before, fresh = image.read_bytes(), new.read_bytes()
    run("dd", f"if={new}", f"of={raw}", "bs=1M", "conv=notrunc,sparse", "oflag=direct")
    blocks = (slice(at, at + MIB) for at in range(0, size, MIB))
    wanted = b"".join(fresh[b] if any(fresh[b]) else before[b] for b in blocks)
    assert image.read_bytes() == wanted
    run("cp", "-p", new, raw)
    run("cmp", new, image)
    if through.is_resizable:
        run("truncate", "-s", "10M", raw)
        assert image.stat().st_size == raw.stat().st_size == 10 * MIB
        run("truncate", "-s", "+5M", raw)
        assert image.read_bytes() == fresh[: 10 * MIB] + bytes(5 * MIB)
    else:
        with pytest.raises(subprocess.CalledProcessError):
            run("truncate", "-s", "10M", raw)
        with raw.open("r+b") as file, pytest.raises(OSError) as caught:
            os.pwrite(file.fileno(), b"x", size)
        assert caught.value.errno == errno.EFBIG


def test_a_filesystem_made_and_mounted_there(through: Through, tmp_path: Path) -> None:
    raw, image = through.raw, through.image
    run("mkfs.ext4", "-q", "-F", raw)
    run("e2fsck", "-fn", image)
    point = tmp_path / "loop"
    point.mkdir()
    run("mount", "-o", "loop", raw, point)
    try:
        content = os.urandom(2 * MIB)
        (point / "file").write_bytes(content)
        run("sync", "-f", point)
    finally:
        run("umount", point)
    run("e2fsck", "-fn", raw)
    assert imgfs("umount", through.mounted.point).returncode == 0
    run("e2fsck", "-fn", image)
    assert run("debugfs", "-R", "stat /file", image).count("Size: 2097152")


def test_written_by_mapping(through: Through) -> None:
    import mmap

    with through.raw.open("r+b") as file, mmap.mmap(file.fileno(), 8 * MIB) as memory:
        memory[100:200] = b"m" * 100
        memory[5 * MIB : 5 * MIB + 5] = b"hello"
        memory.flush()
        os.fsync(file.fileno())
        assert through.image.read_bytes()[100:200] == b"m" * 100
    assert through.image.read_bytes()[5 * MIB :][:5] == b"hello"


def test_what_was_synced_survives_kill_9(through: Through) -> None:
    fd = os.open(through.raw, os.O_RDWR)
    data = os.urandom(3 * MIB + 17)
    os.pwrite(fd, data, 12345)
    os.fsync(fd)
    os.kill(through.mounted.pid, signal.SIGKILL)
    assert through.image.read_bytes()[12345:][: len(data)] == data
    with pytest.raises(OSError):  # nobody is there who could tell
        os.close(fd)


def test_the_end_of_a_mount_writes_all_that_was_accepted(through: Through) -> None:
    data = os.urandom(30 * MIB)
    fd = os.open(through.raw, os.O_RDWR)
    os.pwrite(fd, data, 4096)
    for _ in range(2):  # the second one does not wait for open files
        os.kill(through.mounted.pid, signal.SIGTERM)
        time.sleep(0.1)
    assert select.select([through.mounted.process], [], [], 20)[0]
    assert through.image.read_bytes()[4096:][: len(data)] == data
    with pytest.raises(OSError):
        os.close(fd)


def test_two_names_of_one_image_agree(through: Through) -> None:
    other = next((through.raw.parent / "original").iterdir())
    before = other.read_bytes()[:8192]
    with through.raw.open("r+b", buffering=0) as file:
        file.write(b"new bytes")
        assert other.read_bytes()[:8192] == b"new bytes" + before[9:]


def test_permissions_and_times(through: Through) -> None:
    raw = through.raw
    assert raw.stat().st_mode & 0o777 == 0o600
    os.utime(raw, (1, 1))
    raw.chmod(0o644)
    assert raw.stat().st_mode & 0o777 == 0o600
    with pytest.raises(PermissionError):
        os.chown(raw, 12345, 12345)
    with pytest.raises(PermissionError):
        raw.chmod(0o4755)
    with pytest.raises(OSError) as caught:
        raw.unlink()
    assert caught.value.errno == errno.EROFS


def test_who_else_writes_is_noticed(through: Through) -> None:
    """Identity is told by the file's; an NBD server has none, and shows who is right."""
    if not through.is_resizable:
        with through.raw.open("r+b", buffering=0) as file:
            file.write(b"still the same export")
            os.fsync(file.fileno())
        return
    fd = os.open(through.raw, os.O_RDWR)
    os.pwrite(fd, b"ours", 0)
    os.fsync(fd)
    with through.image.open("r+b") as image:
        image.seek(100)
        image.write(b"theirs")
    os.pwrite(fd, b"ours again", 0)
    with pytest.raises(OSError) as caught:
        os.fsync(fd)
    assert caught.value.errno == errno.ESTALE
    with pytest.raises(OSError) as caught:
        os.pwrite(fd, b"and again", 0)
    assert caught.value.errno == errno.ESTALE
    os.close(fd)
    assert through.image.read_bytes()[:4] == b"ours"
    assert through.image.read_bytes()[100:106] == b"theirs"
    # Who opens it now has it as it is.
    with through.raw.open("r+b", buffering=0) as file:
        assert file.read(4) == b"ours"
        file.write(b"!")
        os.fsync(file.fileno())


def ssh_mount(mount: Mounter, sshd: Sshd, image: Path, *options: str) -> Path:
    words = ",".join((sshd.options, "write=through", *options))
    return mount(sshd.url(image), "-o", words).point / (image.stem + ".raw")


def status_of(raw: Path) -> dict[str, object]:
    whole = json.loads((raw.parent / ".imgfs/status.json").read_text())
    found: dict[str, object] = next(iter(whole["images"].values()))
    return found


def test_fsync_says_so_when_the_server_is_gone(mount: Mounter, sshd: Sshd, sparse: Path) -> None:
    raw = ssh_mount(mount, sshd, sparse, "timeout=2")
    fd = os.open(raw, os.O_RDWR)
    os.pwrite(fd, b"a" * 4096, 0)
    os.fsync(fd)
    sshd.stop()
    os.pwrite(fd, b"b" * 4096, 0)
    with pytest.raises(OSError) as caught:
        os.fsync(fd)
    assert caught.value.errno == errno.EIO
    sshd.start()
    os.pwrite(fd, b"c" * 4096, 0)
    with contextlib.suppress(OSError):
        os.fsync(fd)  # may still tell of the lost connection
    os.pwrite(fd, b"d" * 4096, 0)
    os.fsync(fd)
    os.close(fd)
    assert sparse.read_bytes()[:4096] == b"d" * 4096


def test_a_connection_lost_between_write_and_fsync(
    mount: Mounter, sshd: Sshd, sparse: Path
) -> None:
    """The server may have crashed: nobody knows what is on its disk, and all who wrote are told."""
    raw = ssh_mount(mount, sshd, sparse)
    fd, other, reader = (os.open(raw, how) for how in (os.O_RDWR, os.O_RDWR, os.O_RDONLY))
    os.pwrite(fd, b"a" * 4096, 0)
    deadline = time.monotonic() + 10
    while status_of(raw)["dirty"] and time.monotonic() < deadline:
        time.sleep(0.02)
    sshd.kill_sessions()
    for each in (reader, other, fd):  # the first as sync(1) does it
        with pytest.raises(OSError) as caught:
            os.fsync(each)
        assert caught.value.errno == errno.EIO
    assert "lost before" in str(status_of(raw)["last_error"])
    os.pwrite(fd, b"a" * 4096, 0)
    os.fsync(fd)
    for each in (fd, other, reader):
        os.close(each)
    assert sparse.read_bytes()[:4096] == b"a" * 4096


def test_a_writer_that_waits_for_a_dead_server_can_be_killed(
    mount: Mounter, sshd: Sshd, sparse: Path
) -> None:
    raw = ssh_mount(mount, sshd, sparse)
    with raw.open("r+b", buffering=0) as file:
        file.write(b"first")
        os.fsync(file.fileno())
        sshd.send(signal.SIGSTOP)
        try:
            writer = subprocess.Popen(
                ["dd", "if=/dev/zero", "bs=1M", "count=500", "conv=notrunc,fsync", f"of={raw}"],
                stderr=subprocess.DEVNULL,
            )
            time.sleep(2)
            assert writer.poll() is None
            assert int(str(status_of(raw)["dirty"])) <= 65 * MIB
            writer.kill()
            began = time.monotonic()
            writer.wait(timeout=20)
            assert time.monotonic() - began < 2
        finally:
            sshd.send(signal.SIGCONT)
        os.fsync(file.fileno())


@pytest.mark.parametrize("kind", ["file", "ssh"])
def test_a_full_disk_at_the_source(kind: str, mount: Mounter, sshd: Sshd, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=8M", "none", small)
    try:
        image = small / "disk.raw"
        kept = os.urandom(4 * MIB)
        image.write_bytes(kept)
        os.truncate(image, 64 * MIB)
        if kind == "ssh":
            raw = ssh_mount(mount, sshd, image)
        else:
            raw = mount(image, "-o", "write=through").point / "disk.raw"
        fd, other = os.open(raw, os.O_RDWR), os.open(raw, os.O_RDWR)
        os.pwrite(fd, os.urandom(16 * MIB), 16 * MIB)
        for each in (fd, other):
            # Its own close is told, and so is who uses the file on after a child has closed it.
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                os.close(os.dup(each))
            with pytest.raises(OSError) as caught:
                os.fsync(each)
            assert caught.value.errno == errno.ENOSPC
            os.fsync(each)  # each is told once
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, 4 * MIB, 0) == kept
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 16 * MIB, 48 * MIB)
        os.pwrite(fd, b"room again", 20 * MIB)
        os.fsync(fd)
        os.close(fd)
        os.close(other)
        assert image.read_bytes()[20 * MIB :][:10] == b"room again"
        assert imgfs("umount", raw.parent).returncode == 0
    finally:
        run("umount", "-l", small)


def test_close_tells_what_went_wrong(mount: Mounter, sshd: Sshd, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4M", "none", small)
    try:
        image = small / "disk.raw"
        os.close(os.open(image, os.O_CREAT | os.O_RDWR))
        os.truncate(image, 64 * MIB)
        raw = ssh_mount(mount, sshd, image)
        with (tmp_path / "new").open("wb") as file:
            file.write(os.urandom(16 * MIB))
        done = subprocess.run(
            ["cp", tmp_path / "new", raw], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 1
        assert "No space left" in done.stderr
        assert "no space" in str(status_of(raw)["last_error"])
    finally:
        run("umount", "-l", small)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("http://127.0.0.1:1/disk.raw", "http and S3 can only be read"),
        ("s3://bucket/disk.raw", "http and S3 can only be read"),
    ],
)
def test_sources_that_cannot_be_written(source: str, says: str, tmp_path: Path) -> None:
    done = imgfs(source, tmp_path, "-o", "write=through")
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_read_only_exports_and_files(tmp_path: Path, sparse: Path, mount: Mounter) -> None:
    server = Nbdkit(tmp_path / "nbd", "file", sparse)
    try:
        point = tmp_path / "point"
        point.mkdir()
        done = imgfs(server.url(), point, "-o", "write=through")
        assert done.returncode == 1
        assert "exports it read-only" in done.stderr
    finally:
        server.stop()
    raw = mount(sparse, "-o", "write=through,ro").point / "disk.raw"
    with pytest.raises(OSError) as caught:
        raw.open("r+b")
    assert caught.value.errno == errno.EROFS
    plain = mount(sparse, "-o", "rw").point / "disk.raw"
    assert plain.stat().st_mode & 0o222 == 0
    with pytest.raises(OSError) as caught:
        os.open(plain, os.O_RDWR)
    assert caught.value.errno == errno.EROFS
