"""copy_file_range(2) within a mount: as on a local file, and what it does not fetch and store."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts import MIB, Mount, imgfs
from tests.servers.nbd import QemuNbd
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]
BLOCK = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """6 MiB of data, 8 MiB of hole, and 777 bytes."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(os.urandom(6 * MIB))
        file.seek(14 * MIB)
        file.write(os.urandom(777))
        os.fsync(file.fileno())
    return path


def run(*words: object) -> None:
    command = [str(word) for word in words]
    subprocess.run(command, check=True, timeout=60, capture_output=True)


def stored(tmp_path: Path) -> int:
    """Whole MiB that the snapshots take: there may be a block more for a file of many extents."""
    return sum(path.stat().st_blocks * 512 for path in (tmp_path / "state").rglob("data")) // MIB


def image(mount: Mount, name: str = "disk") -> dict[str, int]:
    images = mount.status()["images"]
    assert isinstance(images, dict)
    found = images[name]
    assert isinstance(found, dict)
    return found


def snapshot(mount: Mount, *path: str) -> Path:
    directory = mount.point.joinpath(*(part for name in path for part in ("snapshots", name)))
    directory.mkdir()
    return directory / f"{path[-1]}.raw"


def copy(source: Path, target: Path, *, at: int = 0, to: int = 0, length: int = 1 << 40) -> int:
    """As many bytes as there are, as cp does it; synced."""
    done = 0
    with source.open("rb") as one, target.open("r+b") as two:
        while done < length and (
            count := os.copy_file_range(
                one.fileno(), two.fileno(), length - done, at + done, to + done
            )
        ):
            done += count
        os.fsync(two.fileno())
    return done


def refused(*args: int) -> int | None:
    with pytest.raises(OSError) as caught:
        os.copy_file_range(*args)
    return caught.value.errno


def copy_extents(source: Path, target: Path) -> None:
    """As cp does it since coreutils 9.2: earlier ones read and write what has holes."""
    size = source.stat().st_size
    with source.open("rb") as file, target.open("wb"):
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            copy(source, target, at=at, to=at, length=end - at)
            at = end
    os.truncate(target, size)


@pytest.mark.parametrize("how", ["cp", "extents", "qemu-img"])
def test_the_base_onto_its_snapshot(
    how: str, mount: Mounter, sshd: Sshd, disk: Path, tmp_path: Path
) -> None:
    """Of what is there anyway nothing is fetched, and nothing is stored."""
    if how == "cp":
        disk.write_bytes(os.urandom(7 * MIB + 777))
    elif how == "qemu-img":  # which knows whole sectors only
        os.truncate(disk, 14 * MIB + 1024)
    m = mount(sshd.url(disk), "-o", sshd.options)
    raw, x = m.point / "disk.raw", snapshot(m, "x")
    with x.open("r+b") as file:
        file.write(os.urandom(3 * MIB))
        file.seek(4 * MIB)
        file.write(os.urandom(3 * MIB))
        os.fsync(file.fileno())
    before = image(m)["bytes_fetched"]
    assert stored(tmp_path) == 6
    if how == "qemu-img":
        run("qemu-img", "convert", "-C", "-n", "-f", "raw", "-O", "raw", raw, x)
    elif how == "cp":
        run("cp", raw, x)
    else:
        copy_extents(raw, x)
    run("sync", x)
    assert stored(tmp_path) == 0
    assert image(m)["bytes_fetched"] - before <= (MIB if how == "qemu-img" else 0)
    assert x.read_bytes() == disk.read_bytes()
    assert imgfs("umount", m.point, timeout=60).returncode == 0
    m = mount(sshd.url(disk), "-o", sshd.options)
    assert (m.point / "snapshots/x/x.raw").read_bytes() == disk.read_bytes()


def test_between_snapshots(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    """What only the source has is stored, once."""
    m = mount(disk)
    x, z = snapshot(m, "x"), snapshot(m, "z")
    with x.open("r+b") as file:
        file.write(os.urandom(MIB))
        os.fsync(file.fileno())
    y = snapshot(m, "x", "y")
    with x.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(os.urandom(MIB))
        file.seek(4 * MIB)
        file.write(bytes(MIB))
        os.fsync(file.fileno())
    subprocess.run(["fallocate", "-p", "-o", "4M", "-l", "1M", x], check=True, timeout=20)
    assert stored(tmp_path) == 2
    copy_extents(x, z)
    assert z.read_bytes() == x.read_bytes()
    assert stored(tmp_path) == 4
    assert copy(x, y) == x.stat().st_size
    assert y.read_bytes() == x.read_bytes()
    assert stored(tmp_path) == 5  # the first MiB is in what both stand on
    run("cp", z, y)
    assert y.read_bytes() == z.read_bytes()


def test_views_that_are_made_of_the_base(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    """The sparse disk, and a partition to where it was, cost nothing either."""
    table = b"label: dos\nstart=2048, size=8192, type=83\n"
    subprocess.run(["sfdisk", "-q", disk], input=table, check=True, timeout=20, capture_output=True)
    m = mount(disk)
    x = snapshot(m, "x")
    with x.open("r+b") as file:
        file.write(os.urandom(6 * MIB))
    part = m.point / "partitions/1.raw"
    assert copy(part, x, to=MIB) == 4 * MIB
    content = disk.read_bytes()
    assert x.read_bytes()[MIB : 5 * MIB] == content[MIB : 5 * MIB]
    assert stored(tmp_path) == 2
    assert copy(m.point / "sparse/disk.raw", x) == len(content)
    assert x.read_bytes() == content
    assert stored(tmp_path) == 0
    assert copy(m.point / "disk.qcow2", x) == min((m.point / "disk.qcow2").stat().st_size, 1 << 40)
    with x.open("rb") as file, (m.point / "disk.qcow2").open("rb") as qcow2:
        expected = qcow2.read()
        assert file.read(len(expected)) == expected


def test_ends_and_errors(mount: Mounter, disk: Path) -> None:
    m = mount(disk)
    x = snapshot(m, "x")
    size = x.stat().st_size
    one, two = os.open(m.point / "disk.raw", os.O_RDONLY), os.open(x, os.O_RDWR)
    try:
        assert os.copy_file_range(one, two, 10, size, 0) == 0
        assert os.copy_file_range(one, two, 1000, size - 10, 5) == 10
        assert os.copy_file_range(one, two, 0, 0, 0) == 0
        # Beyond the end there is a hole, as a write there leaves it.
        assert os.copy_file_range(one, two, 100, 50, size + 5000) == 100
        content = disk.read_bytes()
        expected = content[:5] + content[-10:] + content[15:] + bytes(5000) + content[50:150]
        assert os.fstat(two).st_size == len(expected)
        assert x.read_bytes() == expected
        assert refused(two, two, 5000, 0, 4000) == errno.EINVAL
        assert os.copy_file_range(two, two, 4000, 0, 4000) == 4000
        assert x.read_bytes()[4000:8000] == expected[:4000]
        assert refused(two, one, 10, 0, 0) == errno.EBADF
        for flags, number in ((os.O_WRONLY | os.O_APPEND, errno.EBADF), (os.O_RDONLY, errno.EBADF)):
            fd = os.open(x, flags)
            assert refused(one, fd, 10, 0, 0) == number
            os.close(fd)
        # A file that is made as it is opened.
        fd = os.open(m.point / "extents.json", os.O_RDONLY)
        count = os.copy_file_range(fd, two, 20, 0, 0)
        assert os.pread(two, count, 0) == os.pread(fd, count, 0) and count == 20
        os.close(fd)
    finally:
        os.close(one)
        os.close(two)


def test_what_was_written_by_mapping(mount: Mounter, disk: Path) -> None:
    """Pages of the source that are not written back, and pages of the target that are cached."""
    m = mount(disk)
    x, z = snapshot(m, "x"), snapshot(m, "z")
    with x.open("r+b") as one, z.open("r+b") as two:
        size = 4 * MIB
        with mmap.mmap(one.fileno(), size) as source, mmap.mmap(two.fileno(), size) as target:
            source[MIB : MIB + 5000] = b"1" * 5000
            target[MIB : MIB + 9000] = b"2" * 9000
            assert target[2 * MIB] == source[2 * MIB]
            done = os.copy_file_range(one.fileno(), two.fileno(), 5000, MIB, MIB)
            assert done == 5000
            assert target[MIB : MIB + 9000] == b"1" * 5000 + b"2" * 4000
            source[0:10] = b"3" * 10
            assert os.copy_file_range(one.fileno(), two.fileno(), MIB, 0, 2 * MIB) == MIB
            assert target[2 * MIB : 2 * MIB + 10] == b"3" * 10
            assert target[2 * MIB : 3 * MIB] == source[0:MIB]
    assert z.read_bytes()[MIB : MIB + 9000] == b"1" * 5000 + b"2" * 4000


def test_a_full_disk(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4m", "none", state)
    try:
        m = mount(disk)
        x, z = snapshot(m, "x"), snapshot(m, "z")
        data = os.urandom(2 * MIB + MIB // 2)
        with x.open("r+b") as one, z.open("r+b", buffering=0) as two:
            one.write(data)
            one.flush()
            assert two.write(b"z" * BLOCK) == BLOCK
            os.fsync(two.fileno())
            size = os.fstat(two.fileno()).st_size
            done = 0
            with pytest.raises(OSError) as caught:
                while done < len(data):
                    done += os.copy_file_range(
                        one.fileno(), two.fileno(), len(data) - done, done, size + done
                    )
            assert caught.value.errno == errno.ENOSPC
            assert done <= 2 * MIB
            assert os.pread(two.fileno(), BLOCK, 0) == b"z" * BLOCK
            assert os.pread(two.fileno(), done, size) == data[:done]
            # What takes no space goes on.
            base = os.open(m.point / "disk.raw", os.O_RDONLY)
            assert os.copy_file_range(base, one.fileno(), len(data), 0, 0) == len(data)
            os.fsync(one.fileno())
            assert os.pread(one.fileno(), len(data), 0) == os.pread(base, len(data), 0)
            os.close(base)
            while done < len(data):
                count = min(MIB, len(data) - done)
                assert os.pwrite(two.fileno(), data[done : done + count], done) == count
                done += count
            os.fsync(two.fileno())
        assert imgfs("umount", m.point, timeout=60).returncode == 0
    finally:
        run("umount", "-l", state)


def test_another_base(mount: Mounter, disk: Path) -> None:
    m = mount(disk)
    x = snapshot(m, "x")
    with (m.point / "disk.raw").open("rb") as one, x.open("r+b") as two:
        disk.write_bytes(disk.read_bytes()[::-1])
        deadline = time.monotonic() + 20
        one.read(1)
        while True:
            try:
                os.copy_file_range(one.fileno(), two.fileno(), MIB, 0, MIB)
            except OSError as exc:
                assert exc.errno == errno.ESTALE
                break
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_a_stalled_copy_can_be_killed(mount: Mounter, sshd: Sshd, disk: Path) -> None:
    """And tells of what was copied before its source fell silent."""
    m = mount(sshd.url(disk), "-o", f"{sshd.options},timeout=60")
    x = snapshot(m, "x")
    with (m.point / "disk.raw").open("rb") as one, x.open("r+b") as two:
        os.pread(one.fileno(), MIB, 0)
        sshd.send(signal.SIGSTOP)
        try:
            fds = one.fileno(), two.fileno()
            code = f"import os\nwhile True: os.copy_file_range(*{fds}, 1 << 20, 5 << 20, 99)"
            process = subprocess.Popen(["python3", "-c", code], pass_fds=fds)
            time.sleep(1)
            assert process.poll() is None
            begun = time.monotonic()
            process.kill()
            process.wait(20)
            assert time.monotonic() - begun < 1.5
            assert os.copy_file_range(one.fileno(), two.fileno(), 64 << 10, 0, 99) == 64 << 10
        finally:
            sshd.send(signal.SIGCONT)
        assert os.copy_file_range(one.fileno(), two.fileno(), MIB, 5 * MIB, 99) > 0


@pytest.mark.parametrize("kind", ["file", "ssh", "nbd"])
def test_into_a_source(kind: str, mount: Mounter, sshd: Sshd, disk: Path, tmp_path: Path) -> None:
    """What is a hole is one at the far side, and does not cross the wire as bytes."""
    if kind != "file":
        os.truncate(disk, 15 * MIB)
    source = tmp_path / "source.img"
    source.write_bytes(os.urandom(15 * MIB))
    server = None
    try:
        if kind == "file":
            m = mount(source, "-o", "write=through")
        elif kind == "ssh":
            m = mount(sshd.url(source), "-o", f"{sshd.options},write=through")
        else:
            server = QemuNbd(tmp_path / "n", "-f", "raw", "--discard=unmap", source, write=True)
            m = mount(server.url(), "-o", "write=through")
        raw = next(m.point.glob("*.raw"))
        before = image(m, raw.stem)["bytes_written"]
        content = bytearray(source.read_bytes())
        # Within the file: its first half to the second one.
        assert copy(raw, raw, at=100, to=8 * MIB + 5, length=3 * MIB) == 3 * MIB
        content[8 * MIB + 5 : 11 * MIB + 5] = content[100 : 3 * MIB + 100]
        assert raw.read_bytes() == source.read_bytes() == content
        subprocess.run(["fallocate", "-z", "-l", "2M", raw], check=True, timeout=30)
        written = image(m, raw.stem)["bytes_written"]
        assert written - before < 4 * MIB
        assert copy(raw, raw, at=0, to=12 * MIB, length=2 * MIB) == 2 * MIB
        content[: 2 * MIB] = content[12 * MIB : 14 * MIB] = bytes(2 * MIB)
        assert image(m, raw.stem)["bytes_written"] == written
        assert raw.read_bytes() == source.read_bytes() == content
        assert source.stat().st_blocks * 512 <= 11 * MIB + BLOCK
        if kind == "file":
            assert copy(raw, raw, at=1000, to=15 * MIB, length=14 * MIB) == 14 * MIB
            content += content[1000 : 14 * MIB + 1000]
            assert raw.read_bytes() == source.read_bytes() == content
    finally:
        if server is not None:
            server.stop()


def test_converted_into_a_directory(mount: Mounter, sshd: Sshd, disk: Path, tmp_path: Path) -> None:
    """`cp` of a view to originals/ does it all in the mount."""
    directory = tmp_path / "images"
    directory.mkdir()
    disk.rename(directory / "disk.img")
    m = mount(sshd.url(directory) + "/", "-o", f"{sshd.options},write=through")
    run("cp", m.point / "disk/disk.qcow2", m.point / "originals/new.qcow2")
    run("cp", m.point / "disk/disk.raw", m.point / "originals/new.raw")
    run("qemu-img", "compare", "-f", "raw", directory / "disk.img", directory / "new.qcow2")
    assert (directory / "new.raw").read_bytes() == (directory / "disk.img").read_bytes()
    assert (directory / "new.raw").stat().st_blocks * 512 < 8 * MIB


def test_anything_between_files(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    """Copies, writes and syncs on snapshots and on plain files, through the kernel."""
    rng = random.Random(5)
    m = mount(disk)
    names = ("a", "b", "c")
    paths = {name: snapshot(m, name) for name in names}
    paths["base"] = m.point / "disk.raw"
    plain = {name: tmp_path / f"plain-{name}" for name in paths}
    for path in plain.values():
        run("cp", disk, path)
    for turn in range(90):
        target = rng.choice(names)
        size = plain[target].stat().st_size
        if turn % 3 == 0:
            at, data = rng.randrange(size), rng.randbytes(rng.choice([1, 512, 5000, 300_000]))
            for path in (paths[target], plain[target]):
                with path.open("r+b") as file:
                    file.seek(at)
                    file.write(data)
                    if turn % 2:
                        os.fsync(file.fileno())
            continue
        source = rng.choice([*paths])
        at = rng.randrange(plain[source].stat().st_size)
        at -= at % rng.choice([1, 512, BLOCK, MIB])
        to = at if rng.random() < 0.6 else rng.randrange(size)
        length = rng.choice([1, BLOCK, 100_000, 5 * MIB])
        if source == target and abs(at - to) < length:
            continue
        done = {copy(of[source], of[target], at=at, to=to, length=length) for of in (paths, plain)}
        assert len(done) == 1
        if turn % 10 == 9:
            assert paths[target].read_bytes() == plain[target].read_bytes(), turn
    assert imgfs("umount", m.point, timeout=60).returncode == 0
    m = mount(disk)
    for name in names:
        again = m.point / f"snapshots/{name}/{name}.raw"
        assert again.read_bytes() == plain[name].read_bytes(), name
