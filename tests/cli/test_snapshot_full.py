"""`imgfs snapshot` on a full disk: one line, status 1, nothing lost, and it can be done again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounts import MIB, Mount, imgfs
from tests.small import fill, resize, tmpfs

Mounter = Callable[..., Mount]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(os.urandom(8 * MIB))
    return path


@pytest.fixture
def full(mount: Mounter, base: Path, tmp_path: Path) -> Iterator[bytes]:
    """A state with snapshots A, which has these bytes, and B; there is no room beside them."""
    with tmpfs(tmp_path / "state", "16m"):
        m = mount(base)
        (m.point / "snapshots/A").mkdir()
        (m.point / "snapshots/B").mkdir()
        content = os.urandom(2 * MIB) + base.read_bytes()[2 * MIB :]
        with (m.point / "snapshots/A/A.raw").open("r+b") as file:
            file.write(content[: 2 * MIB])
        assert imgfs("umount", m.point).returncode == 0
        fill(tmp_path / "state/fill")
        yield content


def refused(*words: object) -> str:
    done = imgfs("snapshot", *words)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("imgfs: ")]
    assert len(lines) == 1
    return lines[0]


def names(base: Path) -> list[str]:
    done = imgfs("snapshot", "list", base)
    assert done.returncode == 0
    return [line.split("  of ")[0].split()[-1] for line in done.stdout.splitlines()]


def test_create(full: bytes, base: Path, tmp_path: Path) -> None:
    said = refused("create", base, "C")
    assert f"No space left on device; free space in {tmp_path}/state/imgfs/base.img-" in said
    assert names(base) == ["A", "B"]
    (tmp_path / "state/fill").unlink()
    assert imgfs("snapshot", "create", base, "C").returncode == 0
    assert names(base) == ["A", "B", "C"]


def test_delete_makes_room(full: bytes, base: Path) -> None:
    assert imgfs("snapshot", "delete", base, "A").returncode == 0
    assert imgfs("snapshot", "create", base, "C").returncode == 0
    assert imgfs("snapshot", "delete", base, "B").returncode == 0
    assert names(base) == ["C"]


def test_commit(full: bytes, base: Path, tmp_path: Path) -> None:
    before = base.read_bytes()
    said = refused("commit", "--force", base, "A")
    assert "No space left on device; free space in" in said
    assert base.read_bytes() in (before, full)  # whose doing it is stays known
    assert names(base) == ["A", "B"]
    (tmp_path / "state/fill").unlink()
    assert imgfs("snapshot", "commit", "--force", base, "A").returncode == 0
    assert base.read_bytes() == full
    assert names(base) == ["B"]


def test_export_to_a_full_disk(full: bytes, base: Path, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "1m"):
        said = refused("export", base, "A", tmp_path / "small/a.qcow2")
        assert f"a.qcow2: No space left on device; free space in {tmp_path}/small" in said
        assert list((tmp_path / "small").iterdir()) == []
        resize(tmp_path / "small", "16m")
        done = imgfs("snapshot", "export", base, "A", tmp_path / "small/a.qcow2")
        assert done.returncode == 0


def test_copy_out_of_a_snapshot(full: bytes, base: Path, mount: Mounter, tmp_path: Path) -> None:
    m = mount(base)
    source = m.point / "snapshots/A/A.raw"
    with tmpfs(tmp_path / "small", "1m"):
        done = imgfs("copy", "--no-progress", source, tmp_path / "small/a.raw")
        assert (done.returncode, "o space" in done.stderr) == (1, True)
        resize(tmp_path / "small", "16m")
        done = imgfs("copy", "--no-progress", source, tmp_path / "small/a.raw")
        assert done.returncode == 0
        assert (tmp_path / "small/a.raw").read_bytes() == full
    assert imgfs("umount", m.point).returncode == 0
