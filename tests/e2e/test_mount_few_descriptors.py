"""A mount of more images than it may have descriptors, and one that gets too few of them."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import time
from pathlib import Path

import pytest

from tests.formats import qemu
from tests.mounts import IMGFS
from tests.servers.ssh import Sshd

from .foreground import Foreground, foreground

IMAGES = 300


def fill(pool: Path, count: int) -> dict[str, bytes]:
    """Images by turns raw and qcow2, and what is at the beginning of each."""
    pool.mkdir()
    template = pool.parent / "one.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", template, "1M")
    qemu.io(template, "qcow2", "write -P 7 0 64k")
    stored = template.read_bytes()
    at = stored.index(b"\7" * 4096)
    heads: dict[str, bytes] = {}
    for number in range(count):
        name, mark = f"disk{number:03}", f"{number:8}".encode() * 512
        heads[name] = mark
        if number % 2:
            (pool / f"{name}.qcow2").write_bytes(stored[:at] + mark + stored[at + 4096 :])
        else:
            with (pool / f"{name}.img").open("wb") as file:
                file.write(mark)
                file.truncate(1 << 20)
    return heads


def head_of(m: Foreground, name: str) -> bytes:
    with (m.point / name / f"{name}.raw").open("rb", buffering=0) as file:
        return os.pread(file.fileno(), 4096, 0)


@pytest.mark.parametrize("options", [(), ("-o", "write=through")])
def test_more_images_than_descriptors(
    own_directories: None, tmp_path: Path, options: tuple[str, ...]
) -> None:
    heads = fill(tmp_path / "pool", IMAGES)
    with foreground(f"{tmp_path}/pool/", tmp_path, *options, files=256) as m:
        done = subprocess.run(
            "ls -l */", shell=True, cwd=m.point, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        for _ in range(2):
            for name, head in heads.items():
                assert head_of(m, name) == head, name
        # Also when all are open at once.
        opened = {
            name: (m.point / name / f"{name}.raw").open("rb", buffering=0)
            for name in list(heads)[: 200 if not options else 100]
        }
        for name, file in opened.items():
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), 4096, 0) == heads[name]
        for file in opened.values():
            file.close()
        assert m.descriptors() < 256
        m.refuse_bugs()


def test_behind_ssh(own_directories: None, sshd: Sshd, tmp_path: Path) -> None:
    heads = fill(tmp_path / "pool", 150)
    with foreground(
        f"{sshd.url(tmp_path / 'pool')}/", tmp_path, "-o", sshd.options, files=160
    ) as m:
        for name, head in heads.items():
            assert head_of(m, name) == head, name
        m.refuse_bugs()


def test_recovers_when_there_are_some_again(own_directories: None, tmp_path: Path) -> None:
    heads = fill(tmp_path / "pool", 20)
    with foreground(f"{tmp_path}/pool/", tmp_path) as m:
        names = list(heads)
        assert head_of(m, names[0]) == heads[names[0]]
        before = resource.prlimit(m.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(m.pid, resource.RLIMIT_NOFILE, (5, before[1]))
        for name in names[10:12]:
            with pytest.raises(OSError) as raised:
                head_of(m, name)
            assert raised.value.errno == errno.EMFILE
        assert "ulimit -n" in m.text()
        resource.prlimit(m.pid, resource.RLIMIT_NOFILE, before)
        for name, head in heads.items():
            assert head_of(m, name) == head, name
        m.refuse_bugs()


@pytest.mark.parametrize("where", ["file", "directory", "ssh"])
def test_replaced_images_are_let_go(
    own_directories: None, sshd: Sshd, tmp_path: Path, where: str
) -> None:
    pool = tmp_path / "pool"
    fill(pool, 2)
    image, path = pool / "disk000.img", tmp_path / "mnt/disk000.raw"
    source, options = str(image), ()
    if where == "directory":
        source, path = f"{pool}/", tmp_path / "mnt/disk000/disk000.raw"
    elif where == "ssh":
        source, options = sshd.url(image), ("-o", sshd.options)  # type: ignore[assignment]
    with foreground(source, tmp_path, *options) as m:

        def change(number: int) -> None:
            content = f"{number:8}".encode() * (1 << 17)
            new = tmp_path / "new"
            new.write_bytes(content)
            # A server may know the time in whole seconds only.
            os.utime(new, (1_700_000_000 + number, 1_700_000_000 + number))
            new.replace(image)
            until = time.monotonic() + 20
            while True:
                try:
                    found = path.read_bytes()
                except OSError as exc:
                    assert exc.errno in (errno.ESTALE, errno.ENOENT)
                    found = b""
                if found == content or time.monotonic() > until:
                    break
            assert found == content

        for number in range(3):
            change(number)
        before = m.descriptors()
        for number in range(3, 23):
            change(number)
        until = time.monotonic() + 20
        while m.descriptors() > before + 5 and time.monotonic() < until:
            time.sleep(0.5)
        assert m.descriptors() <= before + 5
        assert len([name for name in m.held() if "disk000" in name]) <= 2
        m.refuse_bugs()


def test_forgotten_images_take_no_memory(own_directories: None, tmp_path: Path) -> None:
    """Of those that were looked at only some are kept, and all can be looked at again."""
    heads = fill(tmp_path / "pool", 900)
    with foreground(f"{tmp_path}/pool/", tmp_path) as m:

        def unopened() -> int:
            images = subprocess.run(
                ["grep", "-c", "not opened yet", m.point / ".imgfs/status.json"],
                capture_output=True,
                text=True,
                timeout=20,
            )
            return int(images.stdout)

        subprocess.run("ls -l */ >/dev/null", shell=True, cwd=m.point, check=True, timeout=120)
        until = time.monotonic() + 30
        while unopened() < 200 and time.monotonic() < until:
            time.sleep(0.5)
        assert unopened() >= 200
        with (m.point / "disk000/disk000.raw").open("rb", buffering=0) as held:
            inode = os.fstat(held.fileno()).st_ino
            for name, head in heads.items():
                assert head_of(m, name) == head, name
            # What is open stays, whatever is looked at meanwhile.
            os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(held.fileno(), 4096, 0) == heads["disk000"]
            assert (m.point / "disk000/disk000.raw").stat().st_ino == inode
        m.refuse_bugs()


def test_single_image_with_very_few(own_directories: None, tmp_path: Path) -> None:
    """One that cannot be mounted says why."""
    heads = fill(tmp_path / "pool", 1)
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 7; exec "$@"', "sh", *IMGFS, f"{tmp_path}/pool/disk000.img", "mnt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert heads and done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("change", ["rename", "unlink"])
def test_an_open_file_stays_itself(own_directories: None, tmp_path: Path, change: str) -> None:
    """Descriptors of idle files are closed, but not of one that is open for writing: its name may
    lead elsewhere by the time that it is written again."""
    pool = tmp_path / "pool"
    heads = fill(pool, IMAGES)
    path, moved = pool / "disk000.img", tmp_path / "moved"
    with foreground(f"{pool}/", tmp_path, "-o", "write=through", files=256) as m:
        with (m.point / "originals/disk000.img").open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"before", 0)
            os.fsync(file.fileno())
            with path.open("rb") as kept:
                for name, head in list(heads.items())[1:]:
                    assert head_of(m, name) == head, name
                if change == "rename":
                    path.rename(moved)
                else:
                    path.unlink()
                os.pwrite(file.fileno(), b"after!", 100)
                os.fsync(file.fileno())
                assert os.pread(file.fileno(), 6, 100) == b"after!"
                assert os.pread(kept.fileno(), 106, 0)[100:] == b"after!"
        m.refuse_bugs()
