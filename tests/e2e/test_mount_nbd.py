"""Images behind real NBD servers: bytes, holes, what is requested, and what goes wrong."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mounts import MIB, Mount, imgfs, kill_readers_of
from tests.servers.nbd import Nbdkit, QemuNbd

Mounter = Callable[..., Mount]
Maker = Callable[..., Any]


def run(*words: object) -> str:
    command = [str(w) for w in words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def qemu_map(path: object) -> str:
    return run("qemu-img", "map", "--output=json", "-f", "raw", path)


def test_nbdkit_file(mount: Mounter, servers: Maker, sparse: Path, tmp_path: Path) -> None:
    server = servers(Nbdkit, "file", sparse)
    raw = mount(server.url()).point / "disk.raw"
    assert qemu_map(raw) == qemu_map(sparse)
    run("cp", raw, tmp_path / "copy")
    run("cmp", sparse, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_blocks <= sparse.stat().st_blocks
    assert raw.read_bytes() == sparse.read_bytes()


def test_qcow2_behind_qemu_nbd(
    mount: Mounter, servers: Maker, sparse: Path, tmp_path: Path
) -> None:
    qcow2 = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", sparse, qcow2)
    server = servers(QemuNbd, "-f", "qcow2", "-x", "pool/vm.img", qcow2)
    m = mount(server.url(b"pool/vm.img"))
    raw = m.point / "vm.raw"
    assert (m.point / "original/vm.img").stat().st_size == raw.stat().st_size
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, qcow2)
    run("cp", raw, tmp_path / "copy")
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "copy", sparse)
    # qemu's map of the qcow2 is in clusters.
    assert (tmp_path / "copy").stat().st_blocks * 512 < 5 * MIB
    with (tmp_path / "copy").open("rb") as file:
        assert os.lseek(file.fileno(), 30 * MIB, os.SEEK_DATA) == 64 * MIB


def test_holes_are_never_requested(
    mount: Mounter, servers: Maker, sparse: Path, tmp_path: Path
) -> None:
    log = tmp_path / "requests"
    server = servers(Nbdkit, "--filter=log", "file", sparse, f"logfile={log}")
    raw = mount(server.url()).point / "disk.raw"
    run("cp", raw, tmp_path / "copy")
    run("cmp", sparse, raw)
    data = [(0, 8192), (5 * MIB, 8 * MIB), (20 * MIB, 20 * MIB + 4096), (64 * MIB, 64 * MIB + 1000)]
    asked = 0
    for at, length in re.findall(r" Read id=.* offset=(0x\w+) count=(0x\w+)", log.read_text()):
        start, end = int(at, 16), int(at, 16) + int(length, 16)
        assert any(a <= start and end <= b for a, b in data), (start, end)
        asked += end - start
    assert asked == sum(b - a for a, b in data)
    assert log.read_text().count(" Extents id=") == 1


def test_command(mount: Mounter, servers: Maker, sparse: Path, tmp_path: Path) -> None:
    here = Path.cwd()
    os.chdir(sparse.parent)
    try:
        m = mount(f"nbd+command:nbdkit -r file {sparse.name}")
    finally:
        os.chdir(here)
    raw = m.point / "disk.raw"
    assert raw.read_bytes() == sparse.read_bytes()
    assert qemu_map(raw) == qemu_map(sparse)
    # Others may see what is mounted, but not a command's arguments.
    mounted = run("findmnt", "-n", "-o", "SOURCE", m.point).strip()
    assert mounted == "nbd+command:nbdkit"
    (child,) = map(int, Path(f"/proc/{m.pid}/task/{m.pid}/children").read_text().split())
    assert imgfs("umount", m.point).returncode == 0
    assert not Path(f"/proc/{child}").exists()


def test_command_ends_with_a_mount_that_is_killed(mount: Mounter, servers: Maker) -> None:
    m = mount("nbd+command:nbdkit -r memory 1M")
    (child,) = map(int, Path(f"/proc/{m.pid}/task/{m.pid}/children").read_text().split())
    os.kill(m.pid, signal.SIGKILL)
    stat, deadline = Path(f"/proc/{child}/stat"), time.monotonic() + 5
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_refusals_are_one_line(servers: Maker, sparse: Path, tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    strict = ["--filter=exportname", "file", sparse, "exportname=a", "exportname-strict=true"]
    server = servers(Nbdkit, *strict)
    cases = [
        (server.url(b"b"), "", "no such export"),
        (f"nbd+unix:///?socket={tmp_path}/none", "", "No such file"),
        (server.url(b"a"), "identity=", "has no value"),
        ("nbd+command:nbdkit file no-such.img", "", "no-such.img"),
        ("nbd://me:secret@kool/", "", "password"),
    ]
    for source, options, text in cases:
        done = imgfs(source, point, "-o", options)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert text in done.stderr
        assert "secret" not in done.stderr
    assert not point.is_mount()


def test_server_dies_and_comes_back(mount: Mounter, servers: Maker, sparse: Path) -> None:
    """Open files cannot know whether it is the same image; a fresh open reads it."""
    server = servers(Nbdkit, "file", sparse)
    raw = mount(server.url(), "-o", "timeout=2").point / "disk.raw"
    fd = os.open(raw, os.O_RDONLY | os.O_DIRECT)
    assert os.pread(fd, 4096, 0) == sparse.read_bytes()[:4096]
    server.stop()
    begun = time.monotonic()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.pread(fd, 4096, 5 * MIB)
    assert time.monotonic() - begun < 10
    server.start()
    time.sleep(1.1)  # the cache remembers an error for a second
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        os.pread(fd, 4096, 5 * MIB)
    os.close(fd)
    assert raw.read_bytes() == sparse.read_bytes()


def test_with_a_pin_open_files_go_on(mount: Mounter, servers: Maker, sparse: Path) -> None:
    server = servers(Nbdkit, "file", sparse)
    m = mount(server.url(), "-o", "timeout=5,identity=v1")
    raw = m.point / "disk.raw"
    assert "v1" in str(m.status())
    fd = os.open(raw, os.O_RDONLY | os.O_DIRECT)
    assert os.pread(fd, 4096, 0) == sparse.read_bytes()[:4096]
    server.stop()
    server.start()
    assert os.pread(fd, 4096, 5 * MIB) == sparse.read_bytes()[5 * MIB : 5 * MIB + 4096]
    os.close(fd)


def test_kill_ends_a_reader_of_a_frozen_server(
    mount: Mounter, servers: Maker, sparse: Path
) -> None:
    server = servers(Nbdkit, "file", sparse)
    raw = mount(server.url()).point / "disk.raw"
    raw.stat()
    kill_readers_of(raw, server.send)
    assert raw.read_bytes() == sparse.read_bytes()


def test_info_and_map(servers: Maker, sparse: Path) -> None:
    server = servers(Nbdkit, "file", sparse)
    done = imgfs("info", server.url())
    assert (done.returncode, done.stderr) == (0, "")
    assert "identity: none" in done.stdout
    done = imgfs("map", "--json", server.url())
    # qemu 8.2 and later tell of each range that it is not compressed, too.
    said = qemu_map(sparse).replace(' "compressed": false,', "")
    assert (done.stdout, done.stderr) == (said, "")


@pytest.mark.parametrize("turn", range(3))
def test_random_bytes_are_the_same_everywhere(
    mount: Mounter, servers: Maker, tmp_path: Path, turn: int
) -> None:
    """Copied, served to several readers at once, and read from the cache afterwards."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(64 * MIB))
    server = servers(QemuNbd, "-f", "raw", image)
    done = imgfs("copy", server.url(), tmp_path / "copy.raw", "--no-progress", timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    run("cmp", image, tmp_path / "copy.raw")
    pinned = ("-o", f"identity={turn}")
    m = mount(server.url(), *pinned)
    raw = m.point / "disk.raw"
    readers = [subprocess.Popen(["cmp", "-s", image, raw]) for _ in range(2)]
    dd = ["dd", f"if={raw}", f"of={tmp_path / 'direct'}", "bs=1M", "iflag=direct", "status=none"]
    readers.append(subprocess.Popen(dd))
    assert [reader.wait(60) for reader in readers] == [0, 0, 0]
    run("cmp", image, tmp_path / "direct")
    assert imgfs("umount", m.point).returncode == 0
    raw = mount(server.url(), *pinned).point / "disk.raw"
    raw.stat()
    server.send(signal.SIGSTOP)  # so all of it comes from the cache
    try:
        run("cmp", image, raw)
    finally:
        server.send(signal.SIGCONT)


def test_local_files_pay_for_no_libnbd(sparse: Path) -> None:
    script = f"""
import sys
sys.argv = ["imgfs", "info", {str(sparse)!r}]
from imgfs.cli.main import main
try:
    main()
except SystemExit:
    pass
assert "nbd" not in sys.modules and "imgfs.sources.nbd.source" not in sys.modules
"""
    run(sys.executable, "-c", script)
