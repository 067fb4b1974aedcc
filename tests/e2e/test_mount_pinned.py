"""A raw disk stays raw, whatever its guest writes into it, until a person says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.formats import qemu
from tests.mounts import MIB, Mount, imgfs

Mounter = Callable[..., Mount]


def hostile(path: Path, victim: Path) -> bytes:
    """A qcow2 over another file beside it."""
    made = path.with_name("hostile.qcow2")
    qemu.img("create", "-q", "-f", "qcow2", "-b", victim.name, "-F", "raw", made)
    content = made.read_bytes()
    made.unlink()
    return content


def test_what_was_written_through(mount: Mounter, tmp_path: Path) -> None:
    disk, victim = tmp_path / "disk.img", tmp_path / "victim.raw"
    disk.write_bytes(bytes(MIB))
    victim.write_bytes(b"secret" * (MIB // 6))
    m = mount(disk, "-o", "write=through")
    with (m.point / "disk.raw").open("r+b") as raw:
        raw.write(hostile(disk, victim))
    assert imgfs("umount", m.point).returncode == 0
    assert qemu.img("info", disk).count("file format: qcow2") == 1

    says = "disk.img: looks like qcow2, but was raw when imgfs wrote to it, and stays raw; "
    m = mount(disk, says=says)
    assert (m.point / "disk.raw").read_bytes() == disk.read_bytes()
    assert imgfs("umount", m.point).returncode == 0
    told = imgfs("info", disk)
    assert "format: raw\n" in told.stdout
    assert told.stderr.count("\n") == 1

    m = mount(disk, "-o", "format=qcow2")  # a person may say so, and is believed
    assert (m.point / "disk.raw").read_bytes().startswith(b"secret")
    assert "format: qcow2\n" in imgfs("info", disk).stdout


def test_what_a_snapshot_was_committed_into(mount: Mounter, tmp_path: Path) -> None:
    disk, victim = tmp_path / "disk.img", tmp_path / "victim.raw"
    disk.write_bytes(bytes(MIB))
    victim.write_bytes(b"secret" * (MIB // 6))
    m = mount(disk)
    (m.point / "snapshots/x").mkdir()
    with (m.point / "snapshots/x/x.raw").open("r+b") as raw:
        raw.write(hostile(disk, victim))
    assert imgfs("umount", m.point).returncode == 0
    assert imgfs("snapshot", "commit", disk, "x").returncode == 0
    m = mount(disk, says="looks like qcow2, but was raw")
    assert (m.point / "disk.raw").read_bytes() == disk.read_bytes()


def test_what_was_only_read_is_looked_at_anew(mount: Mounter, tmp_path: Path) -> None:
    disk, victim = tmp_path / "disk.img", tmp_path / "victim.raw"
    disk.write_bytes(bytes(MIB))
    victim.write_bytes(b"theirs" * (MIB // 6))
    m = mount(disk)
    assert imgfs("umount", m.point).returncode == 0
    disk.write_bytes(hostile(disk, victim))  # a person put another image there
    assert (mount(disk).point / "disk.raw").read_bytes().startswith(b"theirs")
