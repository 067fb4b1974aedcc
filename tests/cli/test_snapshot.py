"""`imgfs snapshot`: what a shell does with snapshots while nothing is mounted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs.overlays.commit import committing
from imgfs.overlays.store import SnapshotStore
from tests.mounts import Mount, imgfs
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]
MIB = 1 << 20


def snapshot(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "imgfs.cli.main", "snapshot", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=check)


def qemu_img(*words: str | Path) -> str:
    command = ["qemu-img", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state/imgfs"


def names(source: Path) -> list[str]:
    return [each["name"] for each in json.loads(snapshot("list", source, "--json").stdout)]


def put(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def test_without_a_mount(sparse: Path, state: Path) -> None:
    assert snapshot("list").stdout == ""
    snapshot("create", sparse, "x")
    snapshot("create", sparse, "x/y")
    assert names(sparse) == ["x", "x/y"]
    assert f"x/y  of {sparse}\n" in snapshot("list").stdout
    refused = snapshot("create", sparse, "x", check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "has a snapshot x already" in refused.stderr
    refused = snapshot("delete", sparse, "x", check=False)
    assert refused.stderr == f"imgfs: {sparse}: x has snapshots itself; delete x/y first\n"
    sparse.unlink()
    snapshot("delete", sparse, "x/y")
    snapshot("delete", sparse, "x")
    assert names(sparse) == []
    assert list(state.glob("*/layers/*")) == []


def test_list_tells_what_a_snapshot_holds(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse)
    outer = m.point / "snapshots/x"
    outer.mkdir()
    put(outer / "x.raw", 10 * MIB, os.urandom(3 * MIB))
    (outer / "x.delta.qcow2").read_bytes()  # which freezes what was written
    put(outer / "x.raw", 30 * MIB, os.urandom(MIB))
    inner = outer / "snapshots/y"
    inner.mkdir()
    put(inner / "y.raw", 40 * MIB, os.urandom(2 * MIB))
    assert imgfs("umount", m.point, timeout=60).returncode == 0
    used = {each["name"]: each["used"] for each in json.loads(snapshot("list", "--json").stdout)}
    assert 4 * MIB <= used["x"] < 4.5 * MIB
    assert 2 * MIB <= used["x/y"] < 2.5 * MIB


@pytest.mark.parametrize("name", ["", "x/", "/x", "a//b", "..", "x/."])
def test_names_that_cannot_be(sparse: Path, name: str) -> None:
    refused = snapshot("create", sparse, name, check=False)
    assert (refused.returncode, "not a snapshot's name" in refused.stderr) == (1, True)


def test_what_a_mount_made_and_back(mount: Mounter, sparse: Path, tmp_path: Path) -> None:
    snapshot("create", sparse, "x")
    m = mount(sparse)
    raw = m.point / "snapshots/x/x.raw"
    put(raw, 3 * MIB + 5, b"changed")
    held = snapshot("create", sparse, "x/y", check=False)
    assert f"in process {m.pid}" in held.stderr
    assert imgfs("umount", m.point, timeout=60).returncode == 0
    snapshot("create", sparse, "x/y")
    m = mount(sparse)
    inner = m.point / "snapshots/x/snapshots/y/y.raw"
    with inner.open("rb") as file:
        file.seek(3 * MIB)
        assert file.read(12) == bytes(5) + b"changed"
    assert imgfs("umount", m.point, timeout=60).returncode == 0


def test_export(mount: Mounter, sparse: Path, tmp_path: Path) -> None:
    snapshot("create", sparse, "x")
    m = mount(sparse)
    raw = m.point / "snapshots/x/x.raw"
    put(raw, 10 * MIB, os.urandom(100_000))
    subprocess.run(["fallocate", "-p", "-o", "5M", "-l", "1M", raw], check=True, timeout=20)
    copy = tmp_path / "copy.raw"
    subprocess.run(["cp", raw, copy], check=True, timeout=60)
    assert imgfs("umount", m.point, timeout=60).returncode == 0
    file = tmp_path / "x.qcow2"
    snapshot("export", sparse, "x", file)
    assert "No errors" in qemu_img("check", file)
    info = json.loads(qemu_img("info", "--output=json", file))
    assert (info["backing-filename"], info["backing-filename-format"]) == (str(sparse), "raw")
    assert file.stat().st_blocks * 512 < MIB
    assert "identical" in qemu_img("compare", "-F", "raw", file, copy)
    assert not list(tmp_path.glob("*.part"))


def test_what_is_mounted_is_busy_by_its_name(mount: Mounter, sparse: Path, tmp_path: Path) -> None:
    m = mount(sparse)
    raw = m.point / "snapshots/x/x.raw"
    raw.parent.mkdir()
    put(raw, 0, b"changed")
    for words in (
        ("export", sparse, "x", tmp_path / "x.qcow2"),
        ("commit", sparse, "x"),
        ("create", sparse, "x/y"),
        ("delete", sparse, "x"),
    ):
        refused = snapshot(*words, check=False)
        assert (refused.returncode, refused.stderr) == (
            1,
            f"imgfs: {sparse}: snapshot x is open for writing in process {m.pid}; "
            "unmount it, or end that, first\n",
        )


def test_export_to_where_there_is_no_room(sparse: Path) -> None:
    snapshot("create", sparse, "x")
    refused = snapshot("export", sparse, "x", "/proc/x.qcow2", check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "/proc/.x.qcow2.part" in refused.stderr
    refused = snapshot("export", sparse, "x", sparse.parent / "none/x.qcow2", check=False)
    assert refused.stderr == f"imgfs: {sparse.parent}/none: no such directory\n"
    refused = snapshot("export", sparse, "nothing", "/proc/x.qcow2", check=False)
    assert refused.stderr == f"imgfs: {sparse}: has no snapshot nothing\n"


def test_another_base(sparse: Path, tmp_path: Path) -> None:
    snapshot("create", sparse, "x")
    os.utime(sparse)
    refused = snapshot("export", sparse, "x", tmp_path / "x.qcow2", check=False)
    assert "is not what its snapshots were taken of" in refused.stderr
    refused = snapshot("create", sparse, "z", check=False)
    assert "is not what its snapshots were taken of" in refused.stderr
    assert names(sparse) == ["x"]


def changed(mount: Mounter, source: Path, name: str, tmp_path: Path) -> Path:
    """A copy of the snapshot's disk, after changes of all kinds to it."""
    snapshot("create", source, name)
    m = mount(source)
    raw = m.point / f"snapshots/{name}/{name}.raw"
    put(raw, 10 * MIB + 100, os.urandom(3 * MIB))
    subprocess.run(["fallocate", "-p", "-o", "5M", "-l", "1M", raw], check=True, timeout=20)
    os.truncate(raw, 70 * MIB)
    copy = tmp_path / f"{name}.raw"
    subprocess.run(["cp", raw, copy], check=True, timeout=60)
    assert imgfs("umount", m.point, timeout=60).returncode == 0
    return copy


@pytest.mark.parametrize("kind", ["file", "ssh"])
def test_commit(mount: Mounter, sparse: Path, sshd: Sshd, tmp_path: Path, kind: str) -> None:
    copy = changed(mount, sparse, "x", tmp_path)
    if kind == "ssh":
        source = sshd.url(sparse)
        options = ["-o", sshd.options]
        snapshot("create", source, "x", *options)
        m = mount(source, *options)
        subprocess.run(["cp", copy, m.point / "snapshots/x/x.raw"], check=True, timeout=60)
        assert imgfs("umount", m.point, timeout=60).returncode == 0
        snapshot("commit", source, "x", *options)
        assert json.loads(snapshot("list", source, "--json").stdout) == []
    else:
        snapshot("commit", sparse, "x")
        assert names(sparse) == []
    assert sparse.read_bytes() == copy.read_bytes()
    assert sparse.stat().st_blocks * 512 < 16 * MIB


def test_commit_beside_others(mount: Mounter, sparse: Path, tmp_path: Path) -> None:
    copy = changed(mount, sparse, "x", tmp_path)
    snapshot("create", sparse, "other")
    refused = snapshot("commit", sparse, "x", check=False)
    assert "has other snapshots (other)" in refused.stderr
    snapshot("commit", sparse, "x", "--force")
    assert sparse.read_bytes() == copy.read_bytes()
    assert names(sparse) == ["other"]
    snapshot("export", sparse, "other", tmp_path / "other.qcow2")  # the base is its base again


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_commit_of_what_has_snapshots_writes_nothing(
    mount: Mounter, sparse: Path, tmp_path: Path, force: list[str]
) -> None:
    changed(mount, sparse, "x", tmp_path)
    for name in ("x/y", "x/y/z", "other"):
        snapshot("create", sparse, name)
    before = sparse.read_bytes()
    refused = snapshot("commit", sparse, "x", *force, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (f"imgfs: {sparse}: x has snapshots itself; delete x/y/z, x/y first\n")
    assert sparse.read_bytes() == before
    assert names(sparse) == ["other", "x", "x/y", "x/y/z"]
    snapshot("export", sparse, "x", tmp_path / "x.qcow2")  # the base is still its base


def test_an_interrupted_commit_is_done_again(mount: Mounter, sparse: Path, tmp_path: Path) -> None:
    copy = changed(mount, sparse, "x", tmp_path)
    # As a commit leaves it that was killed after its first bytes.
    store = SnapshotStore(str(sparse))
    base = store.base()
    assert base is not None
    with pytest.raises(KeyError), committing(store, ("x",), base):
        raise KeyError
    put(sparse, 10 * MIB, b"half")
    for words in (("create", sparse, "y"), ("export", sparse, "x", tmp_path / "q")):
        assert snapshot(*words, check=False).returncode == 1
    snapshot("commit", sparse, "x")
    assert sparse.read_bytes() == copy.read_bytes()
    assert names(sparse) == []
    snapshot("create", sparse, "y")


def test_commit_into_what_cannot_be(sparse: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("convert", "-O", "qcow2", sparse, image)
    snapshot("create", image, "x")
    refused = snapshot("commit", image, "x", check=False)
    assert "only a raw image can be written into" in refused.stderr
    snapshot("create", sparse, "x")
    os.utime(sparse)
    refused = snapshot("commit", sparse, "x", check=False)
    assert "is not what its snapshots were taken of" in refused.stderr
    assert names(sparse) == ["x"]


def test_damaged_records(sparse: Path, state: Path) -> None:
    for name in ("x", "y"):
        snapshot("create", sparse, name)
    (file,) = state.glob("*/snapshots")
    file.write_bytes(file.read_bytes().replace(b'["x"]', b'["X"]'))
    listed = snapshot("list", sparse)
    assert f"y  of {sparse}\n" in listed.stdout
    assert f"imgfs: {file}: has damaged records" in listed.stderr
    refused = snapshot("delete", sparse, "x", check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "--damaged" in refused.stderr
    snapshot("delete", sparse, "--damaged")
    assert snapshot("list", sparse).stderr == ""
    assert names(sparse) == ["y"]
    assert "say either" in snapshot("delete", sparse, check=False).stderr
