"""Mounts under limits of memory and of threads: they stay up, and give the right bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgfs import limits
from tests.mounts import IMGFS, MIB, Mount, imgfs
from tests.servers.web import Nginx

pytestmark = pytest.mark.timeout(300)
Mounter = Callable[..., Mount]
MOST = 140 * MIB  # of a process with eight fast http streams; it took 210 without a bound


def same(source: Path, shown: Path) -> None:
    subprocess.run(["cmp", source, shown], check=True, timeout=100, capture_output=True)


def use(mount: Mount, image: Path, name: str) -> None:
    """Read, snapshot, write, and generate."""
    same(image, mount.point / f"{image.stem}.raw")
    (mount.point / "snapshots" / name).mkdir()
    disk = mount.point / "snapshots" / name / f"{name}.raw"
    dd = ["dd", f"if={image}", f"of={disk}", "bs=4M", "conv=notrunc,fsync", "status=none"]
    subprocess.run(dd, check=True, timeout=100)
    same(image, disk)
    for shown in ("qcow2", "vhdx"):
        path = mount.point / f"{image.stem}.{shown}"
        assert subprocess.run(["cat", path], stdout=subprocess.DEVNULL, timeout=100).returncode == 0


@pytest.fixture
def limited(own_directories: None, tmp_path: Path) -> Iterator[Callable[..., Mount]]:
    """Mounts made under a limit of addresses."""
    made: list[Mount] = []

    def make(size: int, source: Path | str, *options: str) -> Mount:
        point = tmp_path / f"limited{len(made)}"
        point.mkdir()
        command = ["prlimit", f"--as={size}", *IMGFS, str(source), str(point), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        mount = Mount.__new__(Mount)
        mount.point = point
        mount.pid = int(mount.status()["pid"])  # type: ignore[call-overload]
        mount.process = os.pidfd_open(mount.pid)
        made.append(mount)
        return mount

    yield make
    for mount in made:
        mount.take_down()


@pytest.mark.parametrize("size", [300 * MIB, 150 * MIB])
def test_addresses(limited: Callable[..., Mount], tmp_path: Path, size: int) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(48 * MIB))
    m = limited(size, image)
    use(m, image, "x")
    memory = m.status()["memory"]
    assert isinstance(memory, dict)
    assert memory["limit"] <= size // limits.ADDRESS_SHARE
    assert imgfs("umount", m.point, timeout=90).returncode == 0


def streams(nginx: Nginx, tmp_path: Path) -> tuple[Path, Path]:
    """A TOML file of eight images of one content."""
    image = tmp_path / "www/0.img"
    image.write_bytes(os.urandom(64 * MIB))
    lines = []
    for number in range(8):
        if number:
            os.link(image, image.with_name(f"{number}.img"))
        lines.append(f'[images.d{number}]\nsource = "{nginx.url(f"{number}.img")}"\n')
    toml = tmp_path / "images.toml"
    toml.write_text("".join(lines))
    return toml, image


def read_all(m: Mount, image: Path) -> int:
    """Compare all eight at once; returns the most private memory that the process had meanwhile."""
    command = ["cmp", str(image)]
    readers = [
        subprocess.Popen([*command, str(m.point / f"d{n}/d{n}.raw")], stdout=subprocess.DEVNULL)
        for n in range(8)
    ]
    most, ended = 0, threading.Event()

    def sample() -> None:
        nonlocal most
        while not ended.wait(0.01):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{m.pid}/status").read_text()
                kib = text.partition("RssAnon:")[2].split()[0]
                most = max(most, int(kib) * 1024)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        assert [reader.wait(120) for reader in readers] == [0] * 8
    finally:
        ended.set()
        sampler.join()
        for reader in readers:
            reader.kill()
    return most


def test_eight_streams(mount: Mounter, nginx: Nginx, tmp_path: Path) -> None:
    toml, image = streams(nginx, tmp_path)
    m = mount(toml)
    most = read_all(m, image)
    memory = m.status()["memory"]
    assert isinstance(memory, dict)
    assert memory["limit"] <= 64 * MIB
    assert 0 < memory["peak"] <= memory["limit"] + 2 * MIB
    assert most <= MOST


def test_eight_streams_under_a_limit(
    limited: Callable[..., Mount], nginx: Nginx, tmp_path: Path
) -> None:
    toml, image = streams(nginx, tmp_path)
    m = limited(300 * MIB, toml)
    read_all(m, image)
    assert imgfs("umount", m.point, timeout=90).returncode == 0


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of version 1 or 2 that limits how many threads there may be."""
    for top in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")):
        path = top / f"imgfs-test-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        if (path / "pids.max").exists():
            break
        path.rmdir()
    else:
        pytest.skip("no control group for threads can be made here")
    yield path
    (path / "pids.max").write_text("max")
    for pid in (path / "cgroup.procs").read_text().split():
        (path.parent / "cgroup.procs").write_text(pid)
    path.rmdir()


def enter(group: Path, m: Mount) -> None:
    (group / "cgroup.procs").write_text(str(m.pid))
    (group / "pids.max").write_text("1")


def test_no_thread_can_be_started(mount: Mounter, group: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(24 * MIB))
    m = mount(image)
    enter(group, m)
    use(m, image, "x")
    readers = [
        subprocess.Popen(["md5sum", m.point / "disk.vmdk", m.point / "disk.qcow2"], stdout=-1)
        for _ in range(16)
    ]
    assert len({reader.communicate(timeout=100)[0] for reader in readers}) == 1
    (m.point / "snapshots/x").rmdir()
    (group / "pids.max").write_text("max")
    assert imgfs("umount", m.point, timeout=90).returncode == 0


def test_no_thread_for_a_client(mount: Mounter, group: Path, nginx: Nginx, tmp_path: Path) -> None:
    """What needs threads of its own fails as long as there are none, and works then."""
    image = tmp_path / "www/disk.img"
    image.write_bytes(os.urandom(8 * MIB))
    m = mount(nginx.url("disk.img"), "-o", "lazy")
    enter(group, m)
    with pytest.raises(OSError) as raised:
        (m.point / "disk.raw").open("rb").close()
    assert raised.value.errno in (errno.EAGAIN, errno.EIO)
    assert m.status()["pid"] == m.pid
    (group / "pids.max").write_text("max")
    same(image, m.point / "disk.raw")


@pytest.mark.parametrize("most", [2, 6, 10])
def test_too_few_threads_to_begin(
    own_directories: None, group: Path, tmp_path: Path, most: int
) -> None:
    image, point = tmp_path / "disk.img", tmp_path / "point"
    image.write_bytes(os.urandom(MIB))
    point.mkdir()
    (group / "pids.max").write_text(str(most))
    script = f'echo $$ > {group}/cgroup.procs; exec "$@"'
    command = ["sh", "-c", script, "-", *IMGFS, str(image), str(point)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "can be started" in done.stderr
    assert not os.path.ismount(point)
