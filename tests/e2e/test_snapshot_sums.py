"""A damaged snapshot through a mount: EIO and the file's name, and nothing else suffers."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs.overlays.store import SnapshotStore, stores
from tests.mounts import MIB, Mount, imgfs

Mounter = Callable[..., Mount]
BLOCK = 4096


def image_of(mount: Mount) -> dict[str, object]:
    images = mount.status()["images"]
    assert isinstance(images, dict)
    found: dict[str, object] = next(iter(images.values()))
    return found


def refused(action: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        action()
    return caught.value.errno


def store_of() -> SnapshotStore:
    (found,) = stores()
    return found


def data_of(name: str, layer: int = 0) -> Path:
    """Of that layer of the snapshot, from the top down, that has bytes."""
    store = store_of()
    layers = [store.layer_path(each) / "data" for each in store.get(tuple(name.split("/"))).layers]
    return [path for path in layers if path.stat().st_blocks][layer]


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def flip_stored(path: Path) -> int:
    """Somewhere in the middle of what is stored; returns where."""
    with path.open("rb") as file:
        at = os.lseek(file.fileno(), 0, os.SEEK_DATA)
        at = (at + os.lseek(file.fileno(), at, os.SEEK_HOLE)) // 2 + 77
    flip(path, at)
    return at


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(4 * MIB))
    return path


def taken(m: Mount, *names: str) -> None:
    for name in names:
        snapshot = m.point / "snapshots" / name
        snapshot.mkdir()
        with (snapshot / f"{snapshot.name}.raw").open("r+b") as file:
            file.seek(MIB)
            file.write(snapshot.name[:1].encode() * MIB)


def test_a_flipped_byte(mount: Mounter, disk: Path) -> None:
    m = mount(disk)
    taken(m, "a", "b")
    wanted = (m.point / "snapshots/b/b.raw").read_bytes()
    assert imgfs("umount", m.point, timeout=60).returncode == 0
    damaged = data_of("a")
    at = flip_stored(damaged) // BLOCK * BLOCK
    m = mount(disk)
    a, b = m.point / "snapshots/a", m.point / "snapshots/b"

    def read(name: str, offset: int, length: int) -> bytes:
        with (a / name).open("rb") as file:
            return os.pread(file.fileno(), length, offset)

    # By the fast path, by its splices and by Python, and through all that is shown of it.
    for offset, length in ((at, BLOCK), (at + 5, 1)):
        assert refused(lambda o=offset, n=length: read("a.raw", o, n)) == errno.EIO  # type: ignore[misc]
    for name in ("a.raw", "a.qcow2", "a.delta.qcow2", "a.vmdk", "sparse/a.raw"):
        assert refused((a / name).read_bytes) == errno.EIO
    with (a / "a.raw").open("r+b") as file:
        assert refused(lambda: (os.pwrite(file.fileno(), b"x", at), os.fsync(file.fileno()))) == (
            errno.EIO
        )
    told = image_of(m)
    assert f"{damaged}: the 4 KiB at byte {at} " in str(told["last_error"])
    assert int(str(told["errors"])) > 0
    # All else is what it was.
    assert b.joinpath("b.raw").read_bytes() == wanted
    assert read("a.raw", at + BLOCK, BLOCK) == b"a" * BLOCK
    assert (m.point / "disk.raw").read_bytes() == disk.read_bytes()
    # Written as a whole it is good again.
    with (a / "a.raw").open("r+b") as file:
        os.pwrite(file.fileno(), b"y" * BLOCK, at)
        os.fsync(file.fileno())
    assert read("a.raw", at, BLOCK) == b"y" * BLOCK
    assert imgfs("umount", m.point, timeout=60).returncode == 0
    m = mount(disk)
    content = (m.point / "snapshots/a/a.raw").read_bytes()
    assert content[at : at + BLOCK] == b"y" * BLOCK
    assert content[:MIB] == disk.read_bytes()[:MIB]


def test_what_stands_on_it(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    """Snapshots of it fail where they see it; commands say what is wrong."""
    m = mount(disk)
    taken(m, "a", "a/snapshots/c")
    assert imgfs("umount", m.point, timeout=60).returncode == 0
    with data_of("a", -1).open("rb") as file:
        at = os.lseek(file.fileno(), 0, os.SEEK_DATA)
    flip(data_of("a", -1), at)
    m = mount(disk)
    raw = m.point / "snapshots/a/snapshots/c/c.raw"
    assert raw.read_bytes()[MIB : 2 * MIB] == b"c" * MIB  # it has all of this itself
    assert refused((m.point / "snapshots/a/a.raw").read_bytes) == errno.EIO
    assert imgfs("umount", m.point, timeout=60).returncode == 0
    done = imgfs("snapshot", "export", disk, "a", tmp_path / "a.qcow2")
    assert done.returncode == 1 and "/data: the 4 KiB at byte" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "a.qcow2").exists()
    before = disk.read_bytes()
    assert imgfs("snapshot", "commit", disk, "a/c").returncode == 1  # refused: see its help
    assert disk.read_bytes() == before


def test_a_missing_file(mount: Mounter, disk: Path) -> None:
    m = mount(disk)
    taken(m, "a", "b")
    assert imgfs("umount", m.point, timeout=60).returncode == 0
    sums = data_of("a").with_name("sums")
    sums.unlink()
    m = mount(disk)
    assert refused((m.point / "snapshots/a/a.raw").read_bytes) == errno.EIO
    assert (m.point / "snapshots/b/b.raw").read_bytes()[MIB : 2 * MIB] == b"b" * MIB
    assert f"{sums}: is missing" in str(image_of(m)["last_error"])


def test_what_is_quiet_gets_its_sums(mount: Mounter, disk: Path) -> None:
    """So that closing has little left to do; after kill -9 all is there, and known."""
    m = mount(disk)
    taken(m, "a")
    raw = m.point / "snapshots/a/a.raw"
    with raw.open("r+b") as file:
        os.fsync(file.fileno())
    sums = data_of("a").with_name("sums")
    deadline = time.monotonic() + 60
    while not any(sums.read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(m.pid, signal.SIGKILL)
    select.select([m.process], [], [], 20)
    # The kernel may have taken it away by itself.
    subprocess.run(["fusermount3", "-uzq", m.point], check=False, timeout=20)
    flip(data_of("a"), MIB + 5)
    m = mount(disk)
    with (m.point / "snapshots/a/a.raw").open("rb") as file:
        assert refused(lambda: os.pread(file.fileno(), 1, MIB)) == errno.EIO
        assert os.pread(file.fileno(), BLOCK, MIB + BLOCK) == b"a" * BLOCK
