"""Snapshots through a mount: taken, written, seen again, and refused where they must be."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fsx import Fsx
from tests.mounts import MIB, Mount, imgfs
from tests.servers.ssh import Sshd

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
    for directory in (snapshots / "z", snapshots / "z/sparse"):
        files = [path for path in directory.iterdir() if path.is_file()]
        assert {path.name.partition(".")[0] for path in files} == {"z"}
    assert (snapshots / "z/sparse/z.raw").read_bytes() == b"two" + content[3:]
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


def layer_files(pid: int) -> list[str]:
    """Those that the process has open."""
    links = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed just now
            links.append(str(each.readlink()))
    return [link for link in links if "/layers/" in link]


def test_a_deleted_snapshots_files_are_closed(mount: Mounter, disk: Path) -> None:
    """And their space given back: they were left to the collector, which may come hours later."""
    m = mount(disk)
    child = m.point / "snapshots/a/snapshots/b"
    for _ in range(4):
        for path in (child.parent.parent, child):
            path.mkdir()
            with (path / f"{path.name}.raw").open("r+b") as file:
                file.write(os.urandom(MIB))
                os.fsync(file.fileno())
        for path in (child.parent.parent, child):
            for name in (*path.iterdir(), *path.joinpath("sparse").iterdir()):
                if name.is_file():
                    with name.open("rb") as file:
                        assert file.read(100)
            assert list(path.joinpath("partitions").iterdir()) == []
        child.rmdir()
        child.parent.parent.rmdir()
    deadline = time.monotonic() + 10  # the kernel takes a moment to forget the last of them
    while left := layer_files(m.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_what_is_refused(mount: Mounter, disk: Path) -> None:
    m = mount(disk)
    work = m.point / "snapshots/work"
    work.mkdir()
    assert refused(work.mkdir) == errno.EEXIST
    assert refused((work / "work.raw").unlink) == errno.EPERM
    assert refused((m.point / "snapshots/originals").mkdir) == errno.EPERM
    for name in ("x" * 250, "x" * 300):  # no X.delta.qcow2 could be made of the first
        assert refused((m.point / "snapshots" / name).mkdir) == errno.ENAMETOOLONG
        assert refused(lambda name=name: work.rename(work.with_name(name))) == errno.ENAMETOOLONG
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
        ["dd", f"if={other}", "of=@", "bs=4k", "conv=sparse", "status=none"],
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


def stored_in(state: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in state.rglob("data"))


def test_a_filesystem_made_and_mounted_there(mount: Mounter, sparse: Path, tmp_path: Path) -> None:
    """Loop-mounted, written, trimmed, and there again in the next mount."""
    state, point = tmp_path / "state", tmp_path / "loop"
    point.mkdir()

    def run(*words: object) -> None:
        command = [str(word) for word in words]
        subprocess.run(command, check=True, timeout=60, capture_output=True)

    m = mount(sparse)
    (m.point / "snapshots/x").mkdir()
    raw = m.point / "snapshots/x/x.raw"
    run("truncate", "-s", "64M", raw)
    run("mkfs.ext4", "-q", "-F", raw)
    kept, large = os.urandom(2 * MIB + 5), os.urandom(20 * MIB)
    run("mount", "-o", "loop", raw, point)
    try:
        (point / "kept").write_bytes(kept)
        (point / "large").write_bytes(large)
        run("sync", "-f", point)
        before = stored_in(state)
        assert before > len(large)
        (point / "large").unlink()
        run("sync", "-f", point)
        run("fstrim", point)
        assert stored_in(state) < before - len(large) + MIB
    finally:
        run("umount", point)
    run("e2fsck", "-fn", raw)
    ended(m)
    raw = mount(sparse).point / "snapshots/x/x.raw"
    run("e2fsck", "-fn", raw)
    run("mount", "-o", "loop,ro", raw, point)
    try:
        assert sorted(path.name for path in point.iterdir()) == ["kept", "lost+found"]
        assert (point / "kept").read_bytes() == kept
    finally:
        run("umount", point)


def test_what_is_written_over_a_frozen_state_takes_its_place(
    mount: Mounter, disk: Path, tmp_path: Path
) -> None:
    """As soon as nobody can see that by itself."""
    m = mount(disk)
    (m.point / "snapshots/x").mkdir()
    raw = m.point / "snapshots/x/x.raw"
    content = os.urandom(6 * MIB)
    with raw.open("r+b", buffering=0) as file:
        file.write(os.urandom(7 * MIB))
        (m.point / "snapshots/x/snapshots/y").mkdir()
        file.seek(0)
        file.write(content)
        os.fsync(file.fileno())
        time.sleep(3)
        assert stored_in(tmp_path / "state") >= 13 * MIB  # y needs it
        (m.point / "snapshots/x/snapshots/y").rmdir()
        file.seek(MIB)
        file.write(content[MIB : 2 * MIB])
        file.seek(8 * MIB)
        file.write(b"more")
        os.fsync(file.fileno())
        deadline = time.monotonic() + 30
        while stored_in(tmp_path / "state") > 8 * MIB:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        seventh = os.pread(file.fileno(), MIB, 6 * MIB)
        assert os.pread(file.fileno(), 6 * MIB, 0) == content
    ended(m)
    raw = mount(disk).point / "snapshots/x/x.raw"
    assert raw.read_bytes() == content + seventh + bytes(MIB) + b"more"


def test_a_frozen_state_that_hides_the_one_below_it(
    mount: Mounter, disk: Path, tmp_path: Path
) -> None:
    """The two are merged, and nothing of the upper one changes by that."""
    m = mount(disk)
    (m.point / "snapshots/x").mkdir()
    raw = m.point / "snapshots/x/x.raw"
    children = m.point / "snapshots/x/snapshots"
    layers = next((tmp_path / "state").rglob("layers"))
    with raw.open("r+b", buffering=0) as file:
        for length, name in ((MIB, "hidden"), (2 * MIB, "hides")):
            content = os.urandom(length)
            file.seek(0)
            file.write(content)
            children.joinpath(name).mkdir()
        assert len(list(layers.iterdir())) == 5
        children.joinpath("hidden").rmdir()
        deadline = time.monotonic() + 30
        while len(list(layers.iterdir())) > 3:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert os.pread(file.fileno(), 2 * MIB, 0) == content
        file.seek(0)
        file.write(b"more")
        os.fsync(file.fileno())
    assert children.joinpath("hides/hides.raw").read_bytes()[: 2 * MIB] == content
    ended(m)
    raw = mount(disk).point / "snapshots/x/x.raw"
    assert raw.read_bytes()[: 2 * MIB] == b"more" + content[4:]


def test_discards_give_space_back(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    m = mount(disk)
    (m.point / "snapshots/x").mkdir()
    raw = m.point / "snapshots/x/x.raw"

    with raw.open("r+b", buffering=0) as file:
        file.write(os.urandom(4 * MIB))
        os.fsync(file.fileno())
        assert stored_in(tmp_path / "state") >= 4 * MIB
    subprocess.run(["fallocate", "-p", "-o", "0", "-l", "3M", raw], check=True, timeout=20)
    assert stored_in(tmp_path / "state") < 2 * MIB


@pytest.mark.timeout(36000 if LONG else 120)
def test_fsx_over_ssh(mount: Mounter, sshd: Sshd, disk: Path) -> None:
    m = mount(sshd.url(disk), "-o", sshd.options)
    (m.point / "snapshots/x").mkdir()
    fsx = Fsx(m.point / "snapshots/x/x.raw", 2)
    fsx.run(100_000 if LONG else 500)
    ended(m)
    m = mount(sshd.url(disk), "-o", sshd.options)
    assert (m.point / "snapshots/x/x.raw").read_bytes() == fsx.model


def fio_and_kill(m: Mount, raw: Path, log: Path, turn: int) -> None:
    """fio writes blocks, and is told by strace in `log`; the mount is killed at some moment."""
    words = ["strace", "-f", "-qq", "-xx", "-s", str(BLOCK), "-o", log, "-e", "pwrite64,fsync"]
    words += ["fio", "--name=x", f"--filename={raw}", "--size=4M", "--bs=4k", "--rw=randwrite"]
    words += ["--ioengine=psync", f"--direct={turn % 2}", "--fsync=8", "--rate_iops=1000"]
    words += ["--verify=crc32c", "--do_verify=0", "--time_based", "--runtime=60"]
    words += ["--verify_state_save=0"]  # it would go to the working directory
    with subprocess.Popen(
        [*words, f"--randseed={turn}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as fio:
        deadline = time.monotonic() + 30
        while not (log.exists() and b"fsync" in log.read_bytes()):
            assert fio.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.4))
        os.kill(m.pid, signal.SIGKILL)
        assert fio.wait(20) != 0


WRITE = re.compile(rf'pwrite64\(\d+, "([^"]*)", {BLOCK}, (\d+)')
SYNCED = re.compile(r"fsync(\(\d+\)| resumed).* = 0")


@pytest.mark.timeout(3600 if LONG else 120)
def test_kill_9_while_fio_writes(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    """What was synced is there; every other sector is as it was, or as it was to be."""
    disk.write_bytes(bytes(1024 * BLOCK))
    m = mount(disk)
    (m.point / "snapshots/x").mkdir()
    may = {block: [bytes(BLOCK)] for block in range(1024)}
    for turn in range(100 if LONG else 3):
        raw, log = m.point / "snapshots/x/x.raw", tmp_path / f"strace{turn}"
        fio_and_kill(m, raw, log, turn)
        last: dict[int, bytes] = {}
        syncs = 0
        for line in log.read_text().splitlines():
            if found := WRITE.search(line):
                block, data = int(found[2]) // BLOCK, bytes.fromhex(found[1].replace("\\x", ""))
                may[block].append(data)
                last[block] = data
            elif SYNCED.search(line):
                may |= {block: [data] for block, data in last.items()}
                last = {}
                syncs += 1
        assert syncs
        log.unlink()
        subprocess.run(["fusermount3", "-uzq", m.point], timeout=20, check=False)
        m = mount(disk)
        content = (m.point / "snapshots/x/x.raw").read_bytes()
        assert len(content) == 1024 * BLOCK
        for block in range(1024):
            for at in range(0, BLOCK, 512):
                sector = content[block * BLOCK + at :][:512]
                assert sector in [data[at : at + 512] for data in may[block]], (turn, block, at)
            may[block] = [content[block * BLOCK :][:BLOCK]]
    assert any(any(versions[0]) for versions in may.values())
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


def test_a_disk_that_has_room_again(mount: Mounter, disk: Path, tmp_path: Path) -> None:
    """What fills it is not the snapshot, and goes away by itself."""
    state, content = tmp_path / "state", bytearray(disk.read_bytes())
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", state], check=True, timeout=20)
    try:
        m = mount(disk)
        (m.point / "snapshots/x").mkdir()
        raw = m.point / "snapshots/x/x.raw"
        with raw.open("r+b", buffering=0) as file:
            content[:MIB] = os.urandom(MIB)
            assert file.write(content[:MIB]) == MIB
            os.fsync(file.fileno())
            filler = state / "filler"
            assert refused(lambda: filler.write_bytes(bytes(8 * MIB))) == errno.ENOSPC
            assert refused(lambda: os.pwrite(file.fileno(), b"x" * MIB, 2 * MIB)) == errno.ENOSPC
            assert os.pread(file.fileno(), MIB, 0) == content[:MIB]
            # Of what was refused some may be there.
            found = os.pread(file.fileno(), MIB, 2 * MIB)
            pairs = zip(found, content[2 * MIB : 3 * MIB], strict=True)
            assert all(byte in (old, ord("x")) for byte, old in pairs)
            filler.unlink()
            content[2 * MIB : 3 * MIB] = os.urandom(MIB)
            assert os.pwrite(file.fileno(), content[2 * MIB : 3 * MIB], 2 * MIB) == MIB
            os.fsync(file.fileno())
        ended(m)
        m = mount(disk)
        assert (m.point / "snapshots/x/x.raw").read_bytes() == content
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
