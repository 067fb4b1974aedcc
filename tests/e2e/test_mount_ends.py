"""Every way a mount fails to begin, and every way it ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts import Mount, imgfs

Mounter = Callable[..., Mount]
ROUNDS = 20 if os.environ.get("IMGFS_TEST_LONG") else 3


def ended(m: Mount, within_s: float) -> bool:
    return bool(select.select([m.process], [], [], within_s)[0])


def refused(source: object, point: Path, *options: str) -> str:
    done = imgfs(source, point, *options)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("imgfs: ")
    return done.stderr


def test_what_cannot_be_mounted(mount: Mounter, sparse: Path, tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    assert "no such file" in refused(tmp_path / "missing", point)
    assert "is a directory" in refused(tmp_path, point)
    assert "not supported" in refused("ftp://host/x", point)
    assert "no such directory" in refused(sparse, tmp_path / "nowhere")
    assert "not a directory" in refused(sparse, sparse)
    assert "unknown option" in refused(sparse, point, "-o", "nonsense=1")
    assert "not a number" in refused(sparse, point, "-o", "uid=ten")
    assert refused(sparse, "") == "imgfs: '': no such directory; a mount point must exist\n"
    assert not point.is_mount()
    assert "is a mount point already" in refused(sparse, mount(sparse).point)


def readers(m: Mount) -> tuple[threading.Event, list[threading.Thread]]:
    """Threads that read until told to stop, or until the mount is gone."""
    stop = threading.Event()

    def read() -> None:
        try:
            fd = os.open(m.point / "disk.raw", os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return
        try:
            import mmap

            buffer = mmap.mmap(-1, 1 << 20)
            while not stop.is_set():
                os.preadv(fd, [buffer], 5 << 20)
        except OSError:
            pass
        finally:
            with contextlib.suppress(OSError):  # FLUSH fails once the connection is gone
                os.close(fd)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    return stop, threads


@pytest.mark.parametrize("how", ["umount", "SIGTERM", "SIGINT", "abort"])
def test_ends_with_reads_in_flight(mount: Mounter, sparse: Path, how: str) -> None:
    for _ in range(ROUNDS):
        m = mount(sparse)
        stop, threads = readers(m)
        if how == "umount":
            subprocess.run(["fusermount3", "-uz", str(m.point)], timeout=20, check=True)
            stop.set()
        elif how == "abort":
            abort(m.point)
        else:
            os.kill(m.pid, getattr(signal, how))
            stop.set()
        assert ended(m, 15)
        stop.set()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert not os.path.ismount(m.point)
        subprocess.run(["fusermount3", "-uzq", str(m.point)], check=False, capture_output=True)


def abort(point: Path) -> None:
    connections = Path("/sys/fs/fuse/connections")
    if not any(connections.iterdir()):
        subprocess.run(["mount", "-t", "fusectl", "none", str(connections)], check=True)
    (connections / str(os.minor(point.stat().st_dev)) / "abort").write_text("1")


def test_umount_waits_for_the_process(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse)
    done = imgfs("umount", m.point)
    assert (done.returncode, done.stderr) == (0, "")
    assert ended(m, 0)
    assert "not a live imgfs mount" in imgfs("umount", m.point).stderr


def test_source_that_became_our_own_file(mount: Mounter, sparse: Path) -> None:
    """It would be opened by asking ourselves, who wait for it to be opened."""
    m = mount(sparse)
    raw, data = m.point / "disk.raw", sparse.read_bytes()
    away = sparse.with_name("away")
    sparse.rename(away)
    sparse.symlink_to(m.point / "original/disk.img")
    for _ in range(2):
        read = subprocess.Popen(["head", "-c1", raw], stderr=subprocess.PIPE)
        # Whoever waits for himself cannot even be killed: only an abort ends that.
        rescue = threading.Timer(10, abort, [m.point])
        rescue.start()
        said = read.communicate()[1]
        rescue.cancel()
        assert b"Invalid argument" in said
    away.replace(sparse)
    assert raw.read_bytes() == data


def test_source_under_the_mount_point(mount: Mounter, sparse: Path, tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    (tmp_path / "link").symlink_to(point / "disk.img")
    assert "lies under the mount point" in refused(tmp_path / "link", point)
    assert "lies under the mount point" in refused(point / "disk.img", point, "-o", "lazy")
    (point / "disk.img").touch()
    assert "is not empty" in refused(point / "disk.img", point)


def test_sizes_that_are_none(sparse: Path, tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    for value in ("lots", "", "-1", "1x", "1e3", "٣"):
        assert "not a size" in refused(sparse, point, "-o", f"cache_size={value}")
    assert "not a size" in refused(sparse, point, "-o", "prefetch=fast")
    assert "nothing would ever come" in refused(sparse, point, "-o", "prefetch=0")
    assert not point.is_mount()
