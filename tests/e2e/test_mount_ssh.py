"""An image behind a real sshd: bytes, holes, what goes wrong, and the cache's bound."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images import fill
from tests.mounts import MIB, Mount, imgfs, kill_readers_of
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]


def remote(mount: Mounter, sshd: Sshd, path: Path, *options: str) -> Path:
    words = ",".join((sshd.options, *options))
    m = mount(sshd.url(path), "-o", words)
    return m.point / (path.stem + ".raw")


def run(*words: object) -> str:
    command = [str(w) for w in words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_bytes_and_holes(mount: Mounter, sshd: Sshd, sparse: Path, tmp_path: Path) -> None:
    raw = remote(mount, sshd, sparse)
    wanted = run("qemu-img", "map", "--output=json", "-f", "raw", sparse)
    assert run("qemu-img", "map", "--output=json", "-f", "raw", raw) == wanted
    run("cp", raw, tmp_path / "copy")
    run("cmp", sparse, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_blocks <= sparse.stat().st_blocks
    assert raw.stat().st_mtime_ns == sparse.stat().st_mtime_ns
    assert raw.read_bytes() == sparse.read_bytes()


def test_without_extents_all_is_data(mount: Mounter, sshd: Sshd, sparse: Path) -> None:
    raw = remote(mount, sshd, sparse, "extents=off")
    assert raw.stat().st_blocks * 512 >= raw.stat().st_size
    assert raw.read_bytes() == sparse.read_bytes()
    # Blocks that turned out to be zeroes are holes now.
    fd = os.open(raw, os.O_RDONLY)
    assert os.lseek(fd, 10 * MIB, os.SEEK_HOLE) == 10 * MIB
    os.close(fd)


def test_hostile_name(mount: Mounter, sshd: Sshd, sparse: Path, tmp_path: Path) -> None:
    path = tmp_path / "- $(x) 'a\" \n;é.img"
    sparse.rename(path)
    m = mount(sshd.url(tmp_path) + "/-%20$(x)%20'a%22%20%0a;%c3%a9.img", "-o", sshd.options)
    raw = m.point / f"{path.stem}.raw"
    assert raw.read_bytes() == path.read_bytes()
    assert raw.stat().st_blocks * 512 < raw.stat().st_size


def test_refusals_are_one_line(sshd: Sshd, sparse: Path, tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    key = f"[127.0.0.1]:{sshd.port} {' '.join(Path(f'{other}.pub').read_text().split()[:2])}\n"
    (tmp_path / "wrong").write_text(key)
    known = f"known_hosts={sshd.directory / 'known'}"
    identity = f"key={sshd.directory / 'user'}"
    cases = [
        (sshd.url(sparse), f"known_hosts={tmp_path / 'wrong'},{identity}", "host key"),
        (sshd.url(sparse), f"{known},key={other}", "refused the login"),
        (sshd.url(tmp_path / "missing"), sshd.options, "no such file"),
        (sshd.url(tmp_path), sshd.options, "is a directory"),
        ("ssh://root@127.0.0.1:1/x", sshd.options, "refused"),
        (sshd.url(sparse), sshd.options + ",cache_size=lots", "not a size"),
    ]
    for source, options, text in cases:
        done = imgfs(source, point, "-o", options)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert text in done.stderr
    assert not point.is_mount()


def test_server_dies_and_comes_back(mount: Mounter, sshd: Sshd, sparse: Path) -> None:
    raw = remote(mount, sshd, sparse, "timeout=2")
    fd = os.open(raw, os.O_RDONLY | os.O_DIRECT)
    sshd.stop()
    begun = time.monotonic()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.pread(fd, 4096, 5 * MIB)
    assert time.monotonic() - begun < 10
    sshd.start()
    assert raw.read_bytes() == sparse.read_bytes()
    os.close(fd)


@pytest.mark.parametrize("options", ["", ",hard,timeout=1"], ids=["soft", "hard"])
def test_sshd_restarted_in_the_middle_of_a_copy(
    mount: Mounter, sshd: Sshd, tmp_path: Path, options: str
) -> None:
    """The copy finishes: soft waits for `timeout`, hard for longer than that."""
    source, copy = tmp_path / "big.img", tmp_path / "copy"
    fill(source, 192 * MIB)
    m = mount(sshd.url(source), "-o", sshd.options + options)
    copying = subprocess.Popen(["cp", m.point / "big.raw", copy], stderr=subprocess.PIPE)
    for part in (30, 90):
        while not copy.exists() or copy.stat().st_size < part * MIB:
            assert copying.poll() is None
            time.sleep(0.002)
        sshd.stop()
        time.sleep(3 if options else 1)
        assert copying.poll() is None  # in the middle
        sshd.start()
    _, said = copying.communicate(timeout=60)
    assert (copying.returncode, said) == (0, b"")
    run("cmp", source, copy)


def test_kill_ends_a_reader_of_a_frozen_server(mount: Mounter, sshd: Sshd, sparse: Path) -> None:
    raw = remote(mount, sshd, sparse)
    raw.stat()
    fd = os.open(raw, os.O_RDONLY)
    kill_readers_of(raw, sshd.send)
    assert os.pread(fd, 4096, 5 * MIB) == sparse.read_bytes()[5 * MIB : 5 * MIB + 4096]
    os.close(fd)


def test_replaced_source_gives_new_bytes_only(mount: Mounter, sshd: Sshd, sparse: Path) -> None:
    raw = remote(mount, sshd, sparse)
    assert raw.read_bytes() == sparse.read_bytes()
    new = sparse.with_name("new")
    new.write_bytes(os.urandom(4 * MIB + 7))
    new.replace(sparse)
    assert raw.read_bytes() == sparse.read_bytes()


@pytest.mark.parametrize("where", ["local", "ssh"])
def test_open_file_of_a_replaced_source_gives_estale(
    mount: Mounter, sshd: Sshd, sparse: Path, where: str
) -> None:
    """Also what the kernel had cached of it, and also where the new one is shorter."""
    source, options = (sparse, ()) if where == "local" else (sshd.url(sparse), (sshd.options,))
    m = mount(source, *(word for option in options for word in ("-o", option)))
    raw = m.point / "disk.raw"
    with raw.open("rb", buffering=0) as old:
        assert len(old.read(MIB)) == MIB
        new = sparse.with_suffix(".new")
        new.write_bytes(b"new" * 1000)
        new.replace(sparse)
        assert raw.read_bytes() == b"new" * 1000  # finds out
        time.sleep(0.3)  # the kernel is told in the background
        for offset in (0, 4096, 10 * MIB, 64 * MIB):
            old.seek(offset)
            with pytest.raises(OSError) as caught:
                old.read(100)
            assert caught.value.errno == errno.ESTALE
        assert raw.read_bytes() == b"new" * 1000
