"""A mount by a user who is not root, in a mount namespace of its own; needs root to begin with."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MIB = 1 << 20
USER = 65534

# A container's /dev/fuse may be root's alone, and the checkout in a directory of root's.
SETUP = """
set -e
[ -e fuse ] || mknod -m 666 fuse c 10 229
mount --bind fuse /dev/fuse
mount --bind {repository} repo
export HOME="$PWD/home" PYTHONPATH="$PWD/repo" PYTHONDONTWRITEBYTECODE=1 LC_ALL=C
unset XDG_CACHE_HOME SSH_AUTH_SOCK
exec setpriv --reuid {user} --regid {user} --clear-groups sh script
"""
BEGIN = """
imgfs() { timeout 20 repo/.venv/bin/python -m imgfs.cli.main "$@"; }
pid() { sed -n 's/.*"pid": \\([0-9]*\\).*/\\1/p' mnt/.imgfs/status.json; }
trap 'fusermount3 -uzq mnt 2>/dev/null || :' EXIT
"""

Script = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody can get to, with an image and what the user owns."""
    # Not tmp_path, which is its owner's alone.
    path = Path(tempfile.mkdtemp(dir="/var/tmp"))
    path.chmod(0o755)
    for name in ("mnt", "home", "repo", "out"):
        (path / name).mkdir()
        os.chown(path / name, USER, USER)
    with (path / "disk.img").open("wb") as file:
        file.write(os.urandom(MIB))
        file.truncate(8 * MIB + 5)
        os.fsync(file.fileno())
    (path / "disk.img").chmod(0o644)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def script(place: Path) -> Script:
    def run(text: str) -> subprocess.CompletedProcess[str]:
        (place / "script").write_text(BEGIN + text)
        setup = SETUP.format(repository=REPOSITORY, user=USER)
        command = ["unshare", "-m", "sh", "-c", setup]
        return subprocess.run(
            command, cwd=place, capture_output=True, text=True, timeout=60, check=False
        )

    return run


def test_sizes_and_bytes(script: Script, place: Path) -> None:
    done = script("""
        set -e
        imgfs disk.img mnt
        stat -c '%n %s %u %A' mnt/disk.raw mnt/original/disk.img
        ls -l mnt >out/ls
        cmp mnt/disk.raw disk.img
        cp mnt/disk.raw out/copy
        ! cp disk.img mnt/disk.raw 2>/dev/null
        imgfs umount mnt
        ls -A mnt
    """)
    assert (done.returncode, done.stderr) == (0, "")
    size = 8 * MIB + 5
    assert done.stdout.splitlines() == [
        f"mnt/disk.raw {size} {USER} -r--------",
        f"mnt/original/disk.img {size} {USER} -r--------",
    ]
    assert f" {size} " in (place / "out/ls").read_text()
    assert (place / "out/copy").stat().st_blocks * 512 < 2 * MIB


def test_what_the_source_refuses(script: Script, place: Path) -> None:
    (place / "disk.img").chmod(0o600)
    done = script("imgfs disk.img mnt; echo $?; ls -A mnt")
    assert done.stdout == "1\n"
    assert done.stderr.endswith("disk.img: permission denied\n")
    assert done.stderr.count("\n") == 1
    os.chown(place / "disk.img", USER, USER)
    done = script("imgfs disk.img mnt && cmp mnt/disk.raw disk.img && imgfs umount mnt")
    assert (done.returncode, done.stderr) == (0, "")


def test_another_users_mount_point(script: Script, place: Path) -> None:
    os.chown(place / "mnt", 0, 0)
    done = script("imgfs disk.img mnt; echo $?; ls -A mnt")
    assert done.stdout == "1\n"
    assert "mnt" in done.stderr.splitlines()[-1]


def test_dead_mount_is_taken_away(script: Script) -> None:
    done = script("""
        set -e
        imgfs disk.img mnt
        dying=$(pid)
        kill -9 $dying
        while kill -0 $dying 2>/dev/null; do sleep 0.01; done
        imgfs disk.img mnt
        cmp mnt/disk.raw disk.img
        imgfs umount mnt
        ls -A mnt
    """)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.endswith("mnt: took away the mount of a process that has ended\n")
    assert done.stderr.count("\n") == 1


def test_signal_unmounts(script: Script) -> None:
    done = script("""
        set -e
        imgfs disk.img mnt
        ending=$(pid)
        kill $ending
        while kill -0 $ending 2>/dev/null; do sleep 0.01; done
        ls -A mnt
        ! grep -q fuse.imgfs.*user_id=65534 /proc/self/mountinfo
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
