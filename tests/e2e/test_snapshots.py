"""Snapshots through a mount: taken, written, seen again, and refused where they must be."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fsx import Fsx
from tests.servers import Sshd

from .conftest import MIB, Mount, imgfs

Mounter = Callable[..., Mount]
LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
BLOCK = 4096
UUID = "12345678-1234-1234-1234-123456789abc"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(4 * MIB + 777))
    return path


def ended(mount: Mount) -> None:
    assert imgfs("umount", mount.point, timeout=60).returncode == 0


def refused(action: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        action()
    return caught.value.errno


def test_a_snapshots_life(mount: Mounter, disk: Path) -> None:
    content = disk.read_bytes()
    m = mount(disk)
    snapshots = m.point / "snapshots"
    (snapshots / "a").mkdir()
    raw = snapshots / "a/a.raw"
    assert raw.read_bytes() == content
    with raw.open("r+b") as file:
        file.write(b"one")
    (snapshots / "a/snapshots/b").mkdir()
    with raw.open("r+b") as file:
        file.write(b"two")
    assert (snapshots / "a/snapshots/b/b.raw").read_bytes() == b"one" + content[3:]
    (snapshots / "a").rename(snapshots / "z")
    ended(m)
    m = mount(disk)
    snapshots = m.point / "snapshots"
    assert [path.name for path in snapshots.iterdir()] == ["z"]
    assert (snapshots / "z/z.raw").read_bytes() == b"two" + content[3:]
    child = snapshots / "z/snapshots/b"
    assert (child / "b.raw").read_bytes() == b"one" + content[3:]
    assert refused((snapshots / "z").rmdir) == errno.ENOTEMPTY
    child.rmdir()
    (snapshots / "z").rmdir()
    assert list(snapshots.iterdir()) == []
    assert disk.read_bytes() == content


def test_what_is_refused(mount: Mounter, disk: Path) -> None:
    m = mount(disk)
    work = m.point / "snapshots/work"
    work.mkdir()
    assert refused(work.mkdir) == errno.EEXIST
    assert refused((work / "work.raw").unlink) == errno.EPERM
    assert refused(lambda: (work / "new").touch()) == errno.EPERM
    assert refused(lambda: (m.point / "snapshots/file").touch()) == errno.EPERM
    assert refused(lambda: (work / "work.qcow2").open("r+b")) == errno.EROFS
    with (work / "work.raw").open("rb"):
        assert refused(work.rmdir) == errno.EBUSY
    other = mount(disk)
    assert refused((other.point / "snapshots/work/work.raw").read_bytes) == errno.EBUSY
    assert (other.point / "disk.raw").read_bytes() == disk.read_bytes()
    plain = mount(disk, "-o", "ro")
    assert refused((plain.point / "snapshots/x").mkdir) == errno.EROFS


def test_another_base(mount: Mounter, disk: Path) -> None:
    m = mount(disk)
    work = m.point / "snapshots/work"
    work.mkdir()
    (work / "work.raw").write_bytes(b"written")
    ended(m)
    before = disk.stat()
    content = disk.read_bytes()
    disk.write_bytes(content[::-1])
    m = mount(disk)
    assert refused((m.point / "snapshots/work/work.raw").read_bytes) == errno.ESTALE
    assert refused((m.point / "snapshots/other").mkdir) == errno.ESTALE
    assert before.st_ino == disk.stat().st_ino


def test_programs_write_it_as_a_local_file(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    m = mount(disk)
    (m.point / "snapshots/x").mkdir()
    raw, local = m.point / "snapshots/x/x.raw", tmp_path / "local"
    shutil.copy(disk, local)
    other = tmp_path / "other"
    other.write_bytes(bytes(MIB) + os.urandom(MIB) + bytes(MIB))
    for words in (
        ["dd", f"if={other}", "of=@", "bs=64k", "conv=notrunc", "seek=3", "status=none"],
        ["dd", f"if={other}", "of=@", "bs=1000", "conv=notrunc,sparse", "status=none"],
        ["truncate", "-s", "3000001", "@"],
        ["truncate", "-s", "6M", "@"],
        ["fallocate", "-p", "-o", "1M", "-l", "500000", "@"],
        ["fallocate", "-z", "-o", "123", "-l", "77777", "@"],
        ["cp", str(other), "@"],
        ["mkfs.ext4", "-q", "-F", "-U", UUID, "-E", f"hash_seed={UUID},nodiscard", "@", "3M"],
    ):
        for path in (raw, local):
            command = [word.replace("@", str(path)) for word in words]
            environment = {**os.environ, "E2FSPROGS_FAKE_TIME": "1"}
            subprocess.run(command, check=True, timeout=60, env=environment)
        assert raw.read_bytes() == local.read_bytes(), words
    assert raw.stat().st_blocks * 512 < raw.stat().st_size


def test_discards_give_space_back(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    m = mount(disk)
    (m.point / "snapshots/x").mkdir()
    raw = m.point / "snapshots/x/x.raw"

    def stored() -> int:
        return sum(p.stat().st_blocks * 512 for p in (tmp_path / "state").rglob("data"))

    with raw.open("r+b", buffering=0) as file:
        file.write(os.urandom(4 * MIB))
        os.fsync(file.fileno())
        assert stored() >= 4 * MIB
    subprocess.run(["fallocate", "-p", "-o", "0", "-l", "3M", raw], check=True, timeout=20)
    assert stored() < 2 * MIB


@pytest.mark.timeout(36000 if LONG else 120)
@pytest.mark.parametrize("kind", ["snapshot", "child", "ssh"])
def test_fsx(mount: Mounter, sshd: Sshd, disk: Path, kind: str) -> None:
    source = sshd.url(disk) if kind == "ssh" else disk
    m = mount(source, *(["-o", sshd.options] if kind == "ssh" else []))
    directory = m.point / "snapshots/x"
    directory.mkdir()
    raw = directory / "x.raw"
    if kind == "child":
        Fsx(raw, 1).run(300)
        directory = directory / "snapshots/y"
        directory.mkdir()
        wanted = raw.read_bytes()
        raw = directory / "y.raw"
        assert raw.read_bytes() == wanted
    fsx = Fsx(raw, 2)
    fsx.run(1_000_000 if LONG else 1500)
    ended(m)
    m = mount(source, *(["-o", sshd.options] if kind == "ssh" else []))
    inside = raw.parts[len(m.point.parts) :]
    assert m.point.joinpath(*inside).read_bytes() == fsx.model


WRITER = """
import os, random, sys
fd = os.open(sys.argv[1], os.O_RDWR)
rng = random.Random(int(sys.argv[2]))
while True:
    for _ in range(rng.randrange(1, 20)):
        block = rng.randrange(1024)
        number = rng.randrange(1, 256)
        print("w", block, number, flush=True)
        os.pwrite(fd, bytes([number]) * 4096, block * 4096)
    os.fsync(fd)
    print("s", flush=True)
"""


@pytest.mark.timeout(3600 if LONG else 120)
def test_kill_9_while_writing(mount: Mounter, disk: Path) -> None:
    """What was synced is there; every other block is as it was, or as it was to be."""
    disk.write_bytes(bytes(1024 * BLOCK))
    m = mount(disk)
    (m.point / "snapshots/x").mkdir()
    may: dict[int, set[int]] = {block: {0} for block in range(1024)}
    for turn in range(100 if LONG else 4):
        command = [sys.executable, "-c", WRITER, str(m.point / "snapshots/x/x.raw"), str(turn)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as writer:
            time.sleep(random.uniform(0.15, 0.6))
            os.kill(m.pid, signal.SIGKILL)
            assert writer.stdout is not None
            said = writer.stdout.read().decode().splitlines()
        assert any(line == "s" for line in said)
        last: dict[int, int] = {}
        for line in said:
            if line == "s":
                may |= {block: {number} for block, number in last.items()}
                last = {}
            else:
                block, number = map(int, line.split()[1:])
                may[block] = may[block] | {number}
                last[block] = number
        subprocess.run(["fusermount3", "-uzq", m.point], timeout=20, check=False)
        m = mount(disk)
        found = (m.point / "snapshots/x/x.raw").read_bytes()
        for block in range(1024):
            content = found[block * BLOCK : (block + 1) * BLOCK]
            assert len(set(content)) <= 2 or block in last
            for sector in range(0, BLOCK, 512):
                part = content[sector : sector + 512]
                assert len(set(part)) == 1
                assert part[0] in may[block], (turn, block)
            may[block] = set(content)
    assert not any(disk.read_bytes())


def test_a_full_disk(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", state], check=True, timeout=20)
    try:
        m = mount(disk)
        (m.point / "snapshots/x").mkdir()
        raw = m.point / "snapshots/x/x.raw"
        with raw.open("r+b", buffering=0) as file:
            file.write(b"kept" * 1024)
            os.fsync(file.fileno())
            assert refused(lambda: [file.write(os.urandom(MIB)) for _ in range(4)]) == errno.ENOSPC
            os.fsync(file.fileno())
        subprocess.run(["fallocate", "-p", "-o", "4096", "-l", "4M", raw], check=True, timeout=20)
        with raw.open("r+b", buffering=0) as file:
            assert file.read(4096) == b"kept" * 1024
            file.write(b"more" * 1024)
            os.fsync(file.fileno())
        ended(m)
        m = mount(disk)
        with (m.point / "snapshots/x/x.raw").open("rb") as file:
            assert file.read(8192) == b"kept" * 1024 + b"more" * 1024
        ended(m)
    finally:
        subprocess.run(["umount", "-l", state], check=True, timeout=20)


def test_a_damaged_snapshot_harms_no_other(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    m = mount(disk)
    for name in "ab":
        (m.point / "snapshots" / name).mkdir()
    layers = set((tmp_path / "state/imgfs").glob("*/layers/*"))
    with (m.point / "snapshots/a/a.raw").open("r+b") as file:
        file.write(os.urandom(MIB))
    ended(m)
    damaged = max(layers, key=lambda path: (path / "data").stat().st_blocks)
    (damaged / "log").write_bytes(b"x" * 100)
    m = mount(disk)
    assert refused((m.point / "snapshots/a/a.raw").read_bytes) == errno.EIO
    assert (m.point / "snapshots/b/b.raw").read_bytes() == disk.read_bytes()
