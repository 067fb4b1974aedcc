"""sparse/ and partitions/ of real disks: what is free is gone, and all files are there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from imgfs.views.showing import SHOWN
from tests.mounts import MIB, Mount, imgfs
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]

START, SIZE = MIB, 100 * MIB  # of the first partition


def run(*words: object) -> str:
    command = [str(w) for w in words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@contextmanager
def loop_mounted(
    image: Path, point: Path, *, offset: int = 0, options: str = "ro", size: int = SIZE
) -> Iterator[Path]:
    words = [f"--offset={offset}", *([f"--sizelimit={size}"] if offset else [])]
    device = run("losetup", "-f", "--show", *(["-r"] if "ro" in options else []), *words, image)
    try:
        point.mkdir(exist_ok=True)
        run("mount", "-o", options, device.strip(), point)
        try:
            yield point
        finally:
            run("umount", point)
    finally:
        run("losetup", "-d", device.strip())


def sums(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.is_file()
    }


@pytest.fixture
def used(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A disk with a GPT, an ext4 with 6 MiB of files and 40 MiB that were deleted, and a gap."""
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(128 * MIB)
    table = f"label: gpt\nstart={START // 512}, size={SIZE // 512}\n"
    subprocess.run(["sfdisk", "-q", disk], input=table.encode(), timeout=20, check=True)
    run("mkfs.ext4", "-q", "-E", f"offset={START}", disk, f"{SIZE // 1024}k")
    with loop_mounted(disk, tmp_path / "fs", offset=START, options="rw") as fs:
        (fs / "kept").write_bytes(os.urandom(6 * MIB))
        (fs / "gone").write_bytes(os.urandom(40 * MIB))
        os.sync()
        (fs / "gone").unlink()
        found = sums(fs)
    fd = os.open(disk, os.O_WRONLY)
    os.pwrite(fd, b"between the partitions", START + SIZE + 4096)
    os.fsync(fd)
    os.close(fd)
    return disk, found


def image(m: Mount) -> dict[str, Any]:
    (found,) = m.status()["images"].values()  # type: ignore[attr-defined]
    return dict(found)


def test_deleted_files_are_holes(
    mount: Mounter, used: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    disk, files = used
    m = mount(disk)
    assert disk.stat().st_blocks * 512 > 46 * MIB
    copy = tmp_path / "copy.raw"
    run("cp", m.point / "sparse/disk.raw", copy)
    assert copy.stat().st_blocks * 512 < 14 * MIB
    run("e2fsck", "-fn", f"{copy}?offset={START}")
    with loop_mounted(copy, tmp_path / "fs", offset=START) as fs:
        assert sums(fs) == files
    content = copy.read_bytes()
    assert content[START + SIZE + 4096 :].startswith(b"between the partitions")
    assert content[:START] == disk.read_bytes()[:START]
    compare_all(m.point / "sparse/disk.raw", copy)


def compare_all(raw: Path, copy: Path) -> None:
    """All files beside it hold the same disk, and none of the free blocks."""
    for extension in SHOWN:
        kind = {".stream.vmdk": "vmdk", ".vhd": "vpc"}.get(extension, extension[1:])
        shown = raw.with_suffix(extension)
        for other in (raw, copy):
            said = run("qemu-img", "compare", "-f", "raw", "-F", kind, other, shown)
            assert "identical" in said, (extension, said)
        # One that is not sparse inside is sparse outside.
        stat = shown.stat()
        assert min(stat.st_size, stat.st_blocks * 512) < 32 * MIB, extension


def test_partitions_are_files(
    mount: Mounter, used: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    disk, files = used
    m = mount(disk)
    assert [path.name for path in (m.point / "partitions").iterdir()] == ["1.raw"]
    part = m.point / "partitions/1.raw"
    assert part.stat().st_size == SIZE
    assert part.read_bytes() == disk.read_bytes()[START : START + SIZE]
    with loop_mounted(part, tmp_path / "fs") as fs:
        assert sums(fs) == files


def test_over_ssh(
    mount: Mounter, sshd: Sshd, used: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    disk, _ = used
    m = mount(sshd.url(disk), "-o", f"{sshd.options},helpers=python3")
    run("cp", m.point / "sparse/disk.raw", tmp_path / "copy.raw")
    local = mount(disk)
    run("cmp", tmp_path / "copy.raw", local.point / "sparse/disk.raw")


def test_a_filesystem_in_use_is_left_whole(
    mount: Mounter, used: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    disk, _ = used
    crashed = tmp_path / "crashed.img"
    with loop_mounted(disk, tmp_path / "fs", offset=START, options="rw") as fs:
        (fs / "new").write_bytes(b"x" * MIB)
        os.sync()
        run("cp", disk, crashed)
    m = mount(crashed)
    assert "left_whole" not in image(m)  # nobody has looked yet
    assert (m.point / "sparse/crashed.raw").read_bytes() == crashed.read_bytes()
    (why,) = image(m)["left_whole"].values()
    (content,) = json.loads(imgfs("info", "--json", crashed).stdout)["contents"]
    assert why == content["left_whole"] != ""


def test_a_snapshot_has_them_too(
    mount: Mounter, used: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    disk, files = used
    m = mount(disk)
    work = m.point / "snapshots/work"
    work.mkdir()
    with loop_mounted(work / "work.raw", tmp_path / "fs", offset=START, options="rw") as fs:
        (fs / "kept").unlink()
        (fs / "new").write_bytes(b"new" * 1000)
        found = sums(fs)
    copy = tmp_path / "copy.raw"
    run("cp", work / "sparse/work.raw", copy)
    assert copy.stat().st_blocks * 512 < 8 * MIB
    with loop_mounted(copy, tmp_path / "fs", offset=START) as fs:
        assert sums(fs) == found
    assert sums_of(m.point / "partitions/1.raw", tmp_path) == files
    compare_all(work / "sparse/work.raw", copy)


def sums_of(part: Path, tmp_path: Path) -> dict[str, str]:
    with loop_mounted(part, tmp_path / "fs") as fs:
        return sums(fs)


@pytest.mark.parametrize("option", ["lazy", "soft"])
def test_looking_at_the_directory_reads_nothing(
    mount: Mounter, sshd: Sshd, sparse: Path, option: str
) -> None:
    m = mount(sshd.url(sparse), "-o", f"{sshd.options},{option}")
    fetched = image(m).get("bytes_fetched")
    for directory in (".", "sparse", "snapshots"):
        list((m.point / directory).iterdir())
    assert m.point / "sparse/disk.raw" in (m.point / "sparse").iterdir()
    assert image(m).get("bytes_fetched") == fetched
    assert (image(m)["state"] == "not opened yet") == (option == "lazy")
    assert "left_whole" not in image(m)
