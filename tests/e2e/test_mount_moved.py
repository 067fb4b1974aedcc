"""Mounts that are moved, covered, bound, or held by another mount namespace, and how they end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs.daemon.mounts import mounted_at, mounts_of
from tests.mounts import IMGFS, Mount, imgfs

Mounter = Callable[..., Mount]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mount(8) is root's")


def run(*words: object) -> None:
    subprocess.run(list(map(str, words)), check=True, timeout=20, capture_output=True)


def ended(m: Mount, within_s: float = 20) -> bool:
    return bool(select.select([m.process], [], [], within_s)[0])


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A directory whose mounts can be moved: those below a shared one cannot."""
    place = tmp_path / "private"
    place.mkdir()
    run("mount", "-t", "tmpfs", "none", place)
    run("mount", "--make-private", place)
    try:
        for name in ("from", "to"):
            (place / name).mkdir()
        yield place
    finally:
        subprocess.run(["umount", "-R", "-l", place], check=False, timeout=20)


def mount_at(sparse: Path, point: Path) -> Mount:
    return Mount(sparse, point)


def test_moved_then_stopped(sparse: Path, private: Path) -> None:
    m = mount_at(sparse, private / "from")
    run("mount", "--move", private / "from", private / "to")
    run("mount", "-t", "tmpfs", "other", private / "from")
    device = (private / "to").stat().st_dev
    assert (private / "to/disk.raw").read_bytes() == sparse.read_bytes()
    os.kill(m.pid, signal.SIGTERM)
    assert ended(m)
    assert mounts_of(device) == []
    # What was mounted since at the place where ours began is another's.
    other = mounted_at(str(private / "from"))
    assert other is not None
    assert other.fstype == "tmpfs"
    os.close(m.process)


def test_moved_then_unmounted(sparse: Path, private: Path) -> None:
    m = mount_at(sparse, private / "from")
    run("mount", "--move", private / "from", private / "to")
    done = imgfs("umount", private / "to")
    assert (done.returncode, done.stderr) == (0, "")
    assert ended(m, 0)
    os.close(m.process)


def test_covered_then_stopped(sparse: Path, private: Path) -> None:
    m = mount_at(sparse, private / "from")
    run("mount", "-t", "tmpfs", "cover", private / "from")
    os.kill(m.pid, signal.SIGTERM)
    assert ended(m)
    cover = mounted_at(str(private / "from"))
    assert cover is not None
    assert cover.fstype == "tmpfs"
    run("umount", private / "from")
    # What is left below is dead, and the next mount there clears it.
    done = imgfs(sparse, private / "from")
    assert done.returncode == 0
    assert (private / "from/disk.raw").read_bytes() == sparse.read_bytes()
    assert imgfs("umount", private / "from").returncode == 0
    os.close(m.process)


def test_bound_elsewhere_too(sparse: Path, private: Path) -> None:
    m = mount_at(sparse, private / "from")
    run("mount", "--bind", private / "from", private / "to")
    os.kill(m.pid, signal.SIGTERM)
    assert ended(m)
    assert mounted_at(str(private / "from")) is None
    assert mounted_at(str(private / "to")) is None
    os.close(m.process)


def test_another_namespace_holds_it(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse)
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec sleep 100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            done = imgfs("umount", m.point, timeout=30)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
            assert f"process {other.pid} (" in done.stderr
            assert f"kill {m.pid}" in done.stderr
            assert mounted_at(str(m.point)) is None
            assert not ended(m, 0)
            os.kill(m.pid, signal.SIGTERM)  # as it says
            assert ended(m)
        finally:
            other.kill()


def test_through_a_symbolic_link(sparse: Path, tmp_path: Path) -> None:
    point, link = tmp_path / "point", tmp_path / "link"
    point.mkdir()
    link.symlink_to("point")
    for mounted, unmounted in ((link, point), (point, link), (link, link)):
        assert imgfs(sparse, mounted).returncode == 0
        assert (point / "disk.raw").read_bytes() == sparse.read_bytes()
        done = imgfs("umount", unmounted)
        assert (done.returncode, done.stderr) == (0, "")
        assert mounted_at(str(point)) is None


def test_dead_mount_through_a_symbolic_link(mount: Mounter, sparse: Path, tmp_path: Path) -> None:
    m = mount(sparse)
    link = tmp_path / "link"
    link.symlink_to(m.point)
    os.kill(m.pid, signal.SIGKILL)
    done = imgfs("umount", link)
    assert done.returncode == 1
    assert "took away the mount" in done.stderr
    assert mounted_at(str(m.point)) is None


def test_without_fusermount_in_the_path(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = tmp_path / "point"
    point.mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert imgfs(sparse, point).returncode == 0
    done = imgfs("umount", point)
    assert (done.returncode, done.stderr) == (0, "")
    # Not installed at all: root mounts and unmounts by himself.
    assert imgfs(sparse, point).returncode == 0
    code = "from imgfs.daemon import unmount; unmount._DIRECTORIES = ()\n"
    code += "from imgfs.cli.main import main; main()"
    done = subprocess.run(
        [IMGFS[0], "-c", code, "umount", point],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert mounted_at(str(point)) is None


def test_three_at_once(sparse: Path, tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    for _ in range(5):
        three = [
            subprocess.Popen([*IMGFS, sparse, point], stderr=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        said = [(each.communicate(timeout=60)[1], each.returncode) for each in three]
        assert sorted(status for _, status in said) == [0, 1, 1], said
        for text, status in said:
            if status:
                assert "is mounting here" in text or "is a mount point already" in text
        (only,) = mounts_of(point.stat().st_dev)
        assert only == str(point)
        assert (point / "disk.raw").read_bytes() == sparse.read_bytes()
        assert imgfs("umount", point).returncode == 0
        assert mounted_at(str(point)) is None
