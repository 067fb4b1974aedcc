"""What a person says of an image's format, its backing files and its own snapshots."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.formats import qemu
from tests.mounts import MIB, Mount, imgfs
from tests.servers.ssh import Sshd

from .test_mount_formats import fails

Mounter = Callable[..., Mount]


@pytest.fixture
def apart(tmp_path: Path) -> Path:
    """top.qcow2, on mid.qcow2 in a directory beside its own, on base.raw beside that."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    top, mid, base = (
        tmp_path / "one/top.qcow2",
        tmp_path / "two/mid.qcow2",
        tmp_path / "two/base.raw",
    )
    base.write_bytes(b"base" * (MIB // 2))
    qemu.img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", mid)
    qemu.io(mid, "qcow2", "write -P 1 0 64k")
    qemu.img("create", "-q", "-f", "qcow2", "-b", "../two/mid.qcow2", "-F", "qcow2", top)
    qemu.io(top, "qcow2", "write -P 2 1M 64k")
    return top


@pytest.mark.parametrize("where", ["local", "ssh"])
def test_a_chain_over_two_directories(mount: Mounter, sshd: Sshd, apart: Path, where: str) -> None:
    source = str(apart) if where == "local" else sshd.url(apart)
    options = "" if where == "local" else "," + sshd.options
    m = mount(source, "-o", "lazy" + options)
    assert fails(m.point / "top.raw") == errno.EIO
    assert imgfs("umount", m.point).returncode == 0
    m = mount(source, "-o", "backing=any" + options)
    assert (m.point / "top.raw").read_bytes() == qemu.raw(apart, "qcow2")


@pytest.mark.parametrize("where", ["local", "ssh"])
def test_in_a_toml_file(
    mount: Mounter, sshd: Sshd, apart: Path, tmp_path: Path, where: str
) -> None:
    source = str if where == "local" else sshd.url
    lost = tmp_path / "one/lost.qcow2"
    (tmp_path / "one/gone.raw").write_bytes(bytes(2 * MIB))
    qemu.img("create", "-q", "-f", "qcow2", "-b", "gone.raw", "-F", "raw", lost)
    qemu.io(lost, "qcow2", "write -P 5 0 64k")
    (tmp_path / "one/gone.raw").unlink()
    file = tmp_path / "images.toml"
    file.write_text(f"""
[images.refused]
source = "{source(apart)}"

[images.any]
source = "{source(apart)}"
backing = "any"

[images.said]
source = "{source(lost)}"
backing = "{source(tmp_path / "two/base.raw")}"

[images.bytes]
source = "{source(apart)}"
format = "raw"

[images.wrong]
source = "{source(apart)}"
format = "vhd"
""")
    m = mount(file, *(() if where == "local" else ("-o", sshd.options)))
    assert fails(m.point / "refused/refused.raw") == errno.EIO
    assert (m.point / "any/any.raw").read_bytes() == qemu.raw(apart, "qcow2")
    said = (m.point / "said/said.raw").read_bytes()
    assert said == b"\5" * 65536 + (b"base" * (MIB // 2))[65536:]
    assert (m.point / "bytes/bytes.raw").read_bytes() == apart.read_bytes()
    assert fails(m.point / "wrong/wrong.raw") == errno.EIO


def test_snapshots_inside(mount: Mounter, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", path, "4M")
    for number, name in enumerate(("clean", "it's = 2nd")):
        qemu.io(path, "qcow2", f"write -P {number + 1} {number}M 2M")
        qemu.img("snapshot", "-c", name, path)
    qemu.img("resize", "-q", path, "6M")
    qemu.io(path, "qcow2", "write -P 9 0 6M")
    told = imgfs("info", path).stdout
    assert "'1' 'clean'" in told and "'2' \"it's = 2nd\"" in told
    file = tmp_path / "images.toml"
    file.write_text('[images.old]\nsource = "disk.qcow2"\nsnapshot = "it\'s = 2nd"\n')
    for by, name in (("snapshot=1", "clean"), ("", "it's = 2nd")):
        m = mount(path, "-o", by) if by else mount(file)
        raw = m.point / ("disk.raw" if by else "old/old.raw")
        out = tmp_path / "out"
        qemu.img("convert", "-f", "qcow2", "-l", name, "-O", "raw", path, out)
        out.write_bytes(out.read_bytes()[: 4 * MIB])  # qemu gives it the size of the image now
        assert raw.read_bytes() == out.read_bytes()
        qemu.img("compare", "-f", "vmdk", "-F", "raw", raw.with_suffix(".vmdk"), out)
    assert "virtual size: 4.0 MiB" in imgfs("info", path, "-o", "snapshot=clean").stdout
    point = m.point / "old/snapshots/new"
    point.mkdir()
    assert (point / "new.raw").read_bytes() == out.read_bytes()
    assert sorted(p.name for p in point.glob("new.*"))[0] == "new.delta.qcow2"
    assert fails(point / "new.delta.qcow2") == errno.ENOENT  # no header can name what it is on
    (tmp_path / "free").mkdir()
    done = imgfs(path, tmp_path / "free", "-o", "snapshot=gone")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no snapshot has the id or name 'gone'; there are: 'clean', " in done.stderr
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    done = imgfs("info", tmp_path / "disk.raw", "-o", "snapshot=clean")
    assert done.stderr == "imgfs: disk.raw: is raw, which has no snapshots of its own\n"


def test_a_disk_that_a_format_cannot_hold(mount: Mounter, tmp_path: Path) -> None:
    path = tmp_path / "large.img"
    with path.open("wb") as file:
        file.truncate((2040 << 30) + 512)
    m = mount(path)
    shown = {each.suffix for each in m.point.glob("large.*") if each.exists()}
    assert shown == {".raw", ".qcow2", ".vmdk", ".vdi", ".vhdx"}
    assert fails(m.point / "large.vhd") == errno.ENOENT
    told = imgfs("info", path).stdout
    assert "not shown:\n  as .vhd, because large.img: " in told
    with path.open("r+b") as file:
        file.truncate(2040 << 30)
    assert (mount(path).point / "large.vhd").exists()
    assert "not shown" not in imgfs("info", path).stdout
