"""Through the real mount(8), as fstab would have it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers.ssh import Sshd

# mount(8) gives its helpers no PATH, so imgfs must be where the shell looks by itself.  It is put
# there in a mount namespace of the test's own, which ends with the test.
SETUP = """
mount --bind bin /usr/local/bin
exec sh script
"""
BEGIN = """
trap 'fusermount3 -uzq "a point" 2>/dev/null || :' EXIT
"""

Script = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture
def script(tmp_path: Path, sparse: Path) -> Script:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/imgfs").symlink_to(Path(sys.executable).parent / "imgfs")
    (tmp_path / "a point").mkdir()

    def run(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "script").write_text(BEGIN + text)
        command = ["unshare", "-m", "sh", "-c", SETUP]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )

    return run


def test_local_image(script: Script, sparse: Path) -> None:
    done = script("""
        set -e
        mount -t fuse.imgfs "$PWD/disk.img" "$PWD/a point" -o rw,noatime,uid=12,gid=34
        findmnt -n -o FSTYPE,SOURCE "$PWD/a point"
        cd "a point"
        stat -c '%n %s %u %g' disk.raw
        cmp disk.raw ../disk.img
        cd ..
        /usr/local/bin/imgfs umount "a point"
        ls -A "a point"
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["fuse.imgfs", str(sparse)],
        ["disk.raw", str(sparse.stat().st_size), "12", "34"],
    ]


def test_fstab_line_over_ssh(script: Script, sparse: Path, tmp_path: Path) -> None:
    """With words that mean something to mount(8) and systemd, and a blank in the mount point."""
    directory = tmp_path / "sshd"
    directory.mkdir()
    sshd = Sshd(directory)
    try:
        words = f"noauto,user,dev,suid,exec,_netdev,nofail,x-systemd.automount,{sshd.options}"
        where = str(tmp_path / "a point").replace(" ", r"\040")
        (tmp_path / "fstab").write_text(f"{sshd.url(sparse)} {where} fuse.imgfs {words} 0 0\n")
        done = script("""
            set -e
            mount --fstab fstab "$PWD/a point"
            cmp "a point/disk.raw" disk.img
            umount "$PWD/a point"
            ls -A "a point"
        """)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    finally:
        sshd.stop()


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [("missing", "ro", "no such file"), ("disk.img", "ro,cache_size=lots", "not a size")],
)
def test_failure_is_a_line_and_a_status(script: Script, name: str, options: str, text: str) -> None:
    done = script(f"""
        mount -t fuse.imgfs "$PWD/{name}" "$PWD/a point" -o {options}
        echo $?
        ls -A "a point"
    """)
    assert done.stdout == "1\n"
    assert done.stderr.startswith("imgfs: ")
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
