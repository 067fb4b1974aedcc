"""A local image, mounted: bytes, holes, sizes, and what must be refused."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts import MIB, Mount

Mounter = Callable[..., Mount]


def run(*words: object) -> str:
    command = [str(w) for w in words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def seek(fd: int, offset: int, whence: int) -> int:
    try:
        return os.lseek(fd, offset, whence)
    except OSError as exc:
        assert exc.errno is not None
        return -exc.errno


def test_tree_and_bytes(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse)
    assert sorted(p.name for p in m.point.iterdir()) == [
        ".imgfs", "disk.qcow2", "disk.raw", "disk.stream.vmdk", "disk.vdi", "disk.vhd",
        "disk.vhdx", "disk.vmdk", "extents.json", "original", "partitions", "snapshots",
        "sparse",
    ]  # fmt: skip
    raw = m.point / "disk.raw"
    assert raw.read_bytes() == sparse.read_bytes()
    assert (m.point / "original/disk.img").read_bytes() == sparse.read_bytes()
    mine, theirs = raw.stat(), sparse.stat()
    assert (mine.st_size, mine.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns)
    assert mine.st_blocks * 512 < mine.st_size


def test_qemu_and_cp_agree(mount: Mounter, sparse: Path, tmp_path: Path) -> None:
    raw = mount(sparse).point / "disk.raw"
    wanted = run("qemu-img", "map", "--output=json", "-f", "raw", sparse)
    assert run("qemu-img", "map", "--output=json", "-f", "raw", raw) == wanted
    assert (raw.parent / "extents.json").read_text() == wanted
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", sparse, raw)
    run("cp", raw, tmp_path / "copy")
    run("cmp", sparse, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_blocks <= sparse.stat().st_blocks
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "q")
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", sparse, tmp_path / "q")


def test_seek_table(mount: Mounter, sparse: Path) -> None:
    raw, size = mount(sparse).point / "disk.raw", sparse.stat().st_size
    mine, theirs = os.open(raw, os.O_RDONLY), os.open(sparse, os.O_RDONLY)
    for offset in (0, 1, 8191, 8192, 3 * MIB, 5 * MIB - 1, 5 * MIB, size - 1, size, size + 1):
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            assert seek(mine, offset, whence) == seek(theirs, offset, whence), (offset, whence)
    os.close(mine)
    os.close(theirs)


@pytest.mark.parametrize("size", [0, 1, 4096, 5 * MIB + 13])
def test_empty_and_all_hole(mount: Mounter, tmp_path: Path, size: int) -> None:
    source = tmp_path / "x.raw"
    source.touch()
    os.truncate(source, size)
    raw = mount(source).point / "x.raw"
    assert raw.read_bytes() == bytes(size)
    fd = os.open(raw, os.O_RDONLY)
    assert seek(fd, 0, os.SEEK_DATA) == -errno.ENXIO
    assert seek(fd, 0, os.SEEK_HOLE) == (0 if size else -errno.ENXIO)
    os.close(fd)
    assert raw.stat().st_blocks == 0


def test_direct_mmap_and_locks(mount: Mounter, sparse: Path) -> None:
    raw, data = mount(sparse).point / "disk.raw", sparse.read_bytes()
    fd = os.open(raw, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, MIB)
    assert os.preadv(fd, [buffer], 5 * MIB) == MIB
    assert buffer[:] == data[5 * MIB : 6 * MIB]
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[5 * MIB : 5 * MIB + 100] == data[5 * MIB : 5 * MIB + 100]
    os.close(fd)
    run("qemu-io", "-r", "-f", "raw", "-t", "none", "-c", "read 5M 64k", raw)


def test_native_path_serves_the_reads(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse)
    (m.point / "disk.raw").read_bytes()
    image = m.status()["images"]["disk"]  # type: ignore[index]
    assert image["bytes_native"] >= sparse.stat().st_size
    assert image["bytes_python"] == 0


def test_writing_is_refused(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse)
    for action in (
        lambda: (m.point / "disk.raw").open("r+b"),
        lambda: (m.point / "new").touch(),
        lambda: (m.point / "disk.raw").unlink(),
        lambda: (m.point / "dir").mkdir(),
        lambda: os.truncate(m.point / "disk.raw", 5),
    ):
        with pytest.raises(OSError, match=r"Read-only|not permitted|denied"):
            action()


def test_changed_source_is_noticed(
    mount: Mounter, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh open gives the new bytes, all of them, also of a source that was named relatively."""
    monkeypatch.chdir(tmp_path)
    m = mount(sparse.name)
    raw = m.point / "disk.raw"
    assert raw.read_bytes() == sparse.read_bytes()
    new = tmp_path / "new"
    new.write_bytes(b"n" * (3 * MIB))
    new.replace(sparse)
    assert raw.read_bytes() == b"n" * (3 * MIB)
    assert raw.stat().st_size == 3 * MIB
    with sparse.open("r+b") as file:
        file.write(b"changed in place")
    assert raw.read_bytes() == sparse.read_bytes()
