"""`-o umask=`; `-o lazy`, `config=` and `helpers=`, against a real sshd."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts import Mount, imgfs
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]


def logins(sshd: Sshd) -> int:
    return (sshd.directory / "log").read_text().count("Accepted publickey")


def state(m: Mount) -> object:
    (image,) = m.status()["images"].values()  # type: ignore[attr-defined]
    return image["state"]


def ls(*words: object) -> str:
    # By its path: an alias for ls may want colours, and they want attributes.
    command = ["/bin/ls", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def test_lazy_connects_at_the_first_stat(mount: Mounter, sshd: Sshd, sparse: Path) -> None:
    m = mount(sshd.url(sparse), "-o", sshd.options + ",lazy")
    assert set(ls(m.point).split()) >= {"disk.raw", "extents.json", "original", "snapshots"}
    assert ls(m.point / "original").split() == ["disk.img"]
    assert state(m) == "not opened yet"
    assert logins(sshd) == 0
    found = (m.point / "disk.raw").stat()
    assert found.st_size == sparse.stat().st_size
    assert found.st_blocks * 512 < found.st_size
    assert (logins(sshd), state(m)) == (1, "open")
    assert (m.point / "original/disk.img").read_bytes() == sparse.read_bytes()
    listed = {e.name: e.inode() for e in os.scandir(m.point)}
    assert listed["disk.raw"] == found.st_ino
    assert logins(sshd) == 1


def test_lazy_extents_connect_too(mount: Mounter, sshd: Sshd, sparse: Path) -> None:
    m = mount(sshd.url(sparse), "-o", sshd.options + ",lazy")
    command = ["qemu-img", "map", "--output=json", "-f", "raw", str(sparse)]
    wanted = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (m.point / "extents.json").read_text() == wanted


def test_lazy_server_comes_later(mount: Mounter, sshd: Sshd, sparse: Path) -> None:
    sshd.stop()
    m = mount(sshd.url(sparse), "-o", sshd.options + ",lazy,timeout=2")
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            (m.point / "disk.raw").stat()
    sshd.start()
    assert (m.point / "disk.raw").read_bytes() == sparse.read_bytes()


def test_lazy_and_hard_waits_for_the_server(mount: Mounter, sshd: Sshd, sparse: Path) -> None:
    """For longer than the timeout, with what opens it as with what reads; mounting does not."""
    sshd.stop()
    point = sparse.with_name("point")
    point.mkdir()
    assert imgfs(sshd.url(sparse), point, "-o", sshd.options + ",timeout=1,hard").returncode == 1
    m = mount(sshd.url(sparse), "-o", sshd.options + ",lazy,timeout=1,hard")
    reader = subprocess.Popen(["cmp", sparse, m.point / "disk.raw"], stderr=subprocess.PIPE)
    time.sleep(4)
    assert reader.poll() is None
    assert state(m) == "failed"
    sshd.start()
    _, said = reader.communicate(timeout=60)
    assert (reader.returncode, said) == (0, b"")


def test_lazy_local_file_comes_later(
    mount: Mounter, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sparse.rename(tmp_path / "away")
    m = mount("disk.img", "-o", "lazy")
    with pytest.raises(FileNotFoundError):
        (m.point / "disk.raw").stat()
    (tmp_path / "away").rename(sparse)
    assert (m.point / "disk.raw").read_bytes() == sparse.read_bytes()


def test_ssh_config_file(mount: Mounter, sshd: Sshd, sparse: Path, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"Host elsewhere\n  HostName 127.0.0.1\n  Port {sshd.port}\n  User root\n"
        f"  UserKnownHostsFile {sshd.directory / 'known'}\n"
        f"  IdentityFile {sshd.directory / 'user'}\n"
    )
    m = mount(f"ssh://elsewhere{sparse}", "-o", f"config={config}")
    assert (m.point / "disk.raw").read_bytes() == sparse.read_bytes()


def test_ssh_config_file_that_cannot_be_used(sshd: Sshd, sparse: Path, tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    (tmp_path / "bad").write_text("Port many\n")
    for name, text in (("missing", "missing"), ("bad", "cannot be read")):
        done = imgfs(sshd.url(sparse), point, "-o", f"{sshd.options},config={tmp_path / name}")
        assert done.returncode == 1
        assert text in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("helpers", "runs"), [("perl", "perl"), ("python3+perl", "python3"), ("perl+python3", "perl")]
)
def test_helpers(mount: Mounter, sshd: Sshd, sparse: Path, helpers: str, runs: str) -> None:
    m = mount(sshd.url(sparse), "-o", f"{sshd.options},helpers={helpers}")
    found = (m.point / "disk.raw").stat()
    assert found.st_blocks * 512 < found.st_size
    names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in sshd.pids()}
    assert names & {"perl", "python3"} == {runs}


def test_unknown_helper(sparse: Path, tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    done = imgfs(sparse, point, "-o", "helpers=perl+ruby")
    assert done.returncode == 1
    assert done.stderr == (
        "imgfs: -o helpers=perl+ruby: name some of python3+perl+qemu-img, with + between\n"
    )


def test_umask(mount: Mounter, sparse: Path, tmp_path: Path) -> None:
    m = mount(sparse, "-o", "umask=027")
    found = ["", "disk.raw", "extents.json", "snapshots"]
    modes = [stat.S_IMODE((m.point / name).stat().st_mode) for name in found]
    assert modes == [0o550, 0o440, 0o440, 0o750]
    done = imgfs(sparse, tmp_path / "mnt0", "-o", "umask=9")
    assert done.stderr == "imgfs: -o umask=9: not an octal number up to 777\n"


def test_the_kernel_sees_to_noexec(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse, "-o", "noexec,sync,relatime")
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    (line,) = [line for line in lines if line.split()[4] == str(m.point)]
    assert "noexec" in line.split()[5].split(",")
    assert "sync" in line.partition(" - ")[2].split()[-1].split(",")
