"""Formats that imgfs has qemu read: the same view, wherever the file is, and nothing else read."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.formats import foreign, qemu
from tests.mounts import MIB, Mount, imgfs
from tests.servers.ssh import Sshd

from .test_mount_formats import fails, zeroes

Mounter = Callable[..., Mount]
WRITES = ("write -P 3 100k 3M", "write -P 7 5M 1k", "write -P 9 8191k 1k")
BY_HAND = {
    "bochs": foreign.bochs(MIB, 65536, {3: b"a" * 512, 130: b"b" * 512, 2047: b"c" * 512}),
    "cloop": foreign.cloop([bytes([n]) * 65536 for n in (3, 0, 7)]),
    "dmg": foreign.dmg([("zlib", b"z" * 65536), ("zero", bytes(65536)), ("raw", b"r" * 5120)]),
}
BY_QEMU = ("qcow", "qed", "parallels")


def made(path: Path) -> Path:
    kind = path.suffix[1:]
    if kind in BY_HAND:
        path.write_bytes(BY_HAND[kind])
    else:
        qemu.img("create", "-q", "-f", kind, path, "8M")
        qemu.io(path, kind, *WRITES)
    return path


def servers(mount: Mount) -> list[int]:
    """The processes that the mount has started."""
    found = subprocess.run(["pgrep", "-P", str(mount.pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


@pytest.mark.parametrize("where", ["local", "ssh"])
def test_the_same_view(mount: Mounter, sshd: Sshd, tmp_path: Path, where: str) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    kinds = (*BY_QEMU, *BY_HAND) if where == "local" else ("qed", "cloop")
    images = {kind: made(pool / f"disk.{kind}") for kind in kinds}
    toml = tmp_path / "images.toml"
    source = str if where == "local" else sshd.url
    lines = (f'[images.{kind}]\nsource = "{source(path)}"\n' for kind, path in images.items())
    toml.write_text("".join(lines))
    m = mount(toml, *(() if where == "local" else ("-o", sshd.options)))
    for kind, path in images.items():
        shown = m.point / kind
        assert (shown / f"{kind}.raw").read_bytes() == qemu.raw(path, kind), kind
        assert (shown / "original" / path.name).read_bytes() == path.read_bytes()
        encoded = (shown / f"{kind}.qcow2", shown / f"{kind}.raw")
        qemu.img("compare", "-f", "qcow2", "-F", "raw", *encoded)
        told = qemu.img("map", "--output=json", "-f", kind, path)
        assert zeroes((shown / "extents.json").read_text()) == zeroes(told), kind
    started = servers(m)
    assert len(started) == len(images)
    assert imgfs("umount", m.point).returncode == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)


def test_luks_with_a_key(mount: Mounter, tmp_path: Path) -> None:
    path, key, raw = tmp_path / "disk.img", tmp_path / "the,key", tmp_path / "raw"
    key.write_text("correct horse")
    raw.write_bytes(os.urandom(MIB))
    with path.open("wb") as file:
        file.truncate(4 * MIB)
    quick = ("--type", "luks1", "--pbkdf-force-iterations", "1000")
    subprocess.run(["cryptsetup", "luksFormat", "-q", *quick, path, key], check=True, timeout=60)
    secret = f"secret,id=s,file={str(key).replace(',', ',,')}"
    target = f"driver=luks,key-secret=s,file.filename={path}"
    words = ("-n", "-f", "raw", "--object", secret, "--target-image-opts", raw, target)
    qemu.img("convert", *words)
    toml = tmp_path / "images.toml"
    toml.write_text('[images.disk]\nsource = "disk.img"\nluks_key = "the,key"\n')
    m = mount(toml)
    assert (m.point / "disk/disk.raw").read_bytes()[:MIB] == raw.read_bytes()
    (pid,) = servers(m)
    assert "correct" not in Path(f"/proc/{pid}/cmdline").read_text()
    status = imgfs("info", path)  # without the key what can be had are the bytes
    assert "format: raw" in status.stdout
    assert mount(path).point.joinpath("disk.raw").read_bytes() == path.read_bytes()
    (tmp_path / "other").write_text("wrong")
    for words, why in (
        (f"luks_key={tmp_path}/other", "Invalid password"),
        (f"luks_key={tmp_path}/none", "No such file"),
    ):
        m = mount(path, "-o", words, says=why)
        assert fails(m.point / "disk.raw") in (errno.EIO, errno.EOPNOTSUPP)
    (tmp_path / "nowhere").mkdir()
    done = imgfs(path, tmp_path / "nowhere", "-o", "format=luks")  # it was asked for
    assert done.returncode == 1 and "name its key with -o luks_key=FILE" in done.stderr


def test_a_backing_file(mount: Mounter, tmp_path: Path) -> None:
    """Beside the image it is followed, through whatever there is below; elsewhere it is not."""
    pool = tmp_path / "pool"
    pool.mkdir()
    (pool / "base.raw").write_bytes(b"base" * (MIB // 2))
    chain = {"mid.qcow2": "base.raw", "old.qcow": "mid.qcow2", "top.qed": "old.qcow"}
    for name, below in chain.items():
        kinds = [Path(each).suffix[1:] for each in (name, below)]
        qemu.img("create", "-q", "-f", kinds[0], "-b", below, "-F", kinds[1], pool / name)
        qemu.io(pool / name, kinds[0], f"write -P {len(name)} {len(name) * 64}k 64k")
    m = mount(f"{pool}/")
    assert (m.point / "top/top.raw").read_bytes() == qemu.raw(pool / "top.qed", "qed")
    told = imgfs("info", pool / "top.qed")
    assert "format: qed" in told.stdout
    secret = b"secret" * 100_001  # not whole sectors
    (tmp_path / "secret.raw").write_bytes(secret)
    for name, why in (("../secret.raw", "is not a file beside it"), ("top2.qed", "form a loop")):
        path = pool / "top2.qed"
        qemu.img("create", "-q", "-f", "qed", "-u", "-b", name, "-F", "raw", path, "1M")
        m = mount(path, says=why)
        assert fails(m.point / "top2.raw") == errno.EIO
    qemu.img("create", "-q", "-f", "qed", "-u", "-b", "../secret.raw", "-F", "raw", path, "1M")
    m = mount(path, "-o", "backing=any")
    assert (m.point / "top2.raw").read_bytes() == secret.ljust(MIB, b"\0")


def test_a_file_that_changes(mount: Mounter, tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qed")
    m = mount(path)
    with (m.point / "disk.raw").open("rb", buffering=0) as raw:
        assert raw.read(200 << 10)[-1] == 3
        qemu.io(path, "qed", "write -P 5 0 8M")
        with pytest.raises(OSError) as raised:
            (m.point / "disk.raw").open("rb").close()
            raw.read(MIB)
    assert raised.value.errno == errno.ESTALE
    assert (m.point / "disk.raw").read_bytes() == b"\5" * (8 * MIB)
    assert len(servers(m)) == 1


def test_a_qemu_that_dies_is_started_again(mount: Mounter, tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qed")
    m = mount(path)
    wanted = qemu.raw(path, "qed")
    with (m.point / "disk.raw").open("rb", buffering=0) as raw:
        assert raw.read(MIB) == wanted[:MIB]
        (pid,) = servers(m)
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        raw.seek(3 * MIB)
        assert raw.read(MIB) == wanted[3 * MIB : 4 * MIB]


def test_without_qemu(mount: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "disk.qed")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("fusermount3",):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tools))
    m = mount(path, says="which is not installed (Debian: qemu-utils)")
    assert fails(m.point / "disk.raw") == errno.EOPNOTSUPP
    monkeypatch.undo()


def test_a_damaged_one(mount: Mounter, tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qed")
    with path.open("r+b") as file:
        file.seek(4)
        file.write(b"\xff" * 8)
    m = mount(path, says="qemu-nbd cannot open it: ")
    assert fails(m.point / "disk.raw") == errno.EOPNOTSUPP
