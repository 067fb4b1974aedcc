"""`extents.json`, and what programs make of files that are made when they are opened."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts import MIB, Mount
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]


def run(*words: object) -> bytes:
    command = [str(w) for w in words]
    return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout


def map_of(path: Path) -> bytes:
    return run("qemu-img", "map", "--output=json", "-f", "raw", path)


@pytest.mark.parametrize("where", ["local", "ssh", "ssh,lazy"])
def test_size_is_true(mount: Mounter, sshd: Sshd, sparse: Path, tmp_path: Path, where: str) -> None:
    if where == "local":
        m = mount(sparse)
    else:
        m = mount(sshd.url(sparse), "-o", sshd.options + where.removeprefix("ssh"))
    path, wanted = m.point / "extents.json", map_of(sparse)
    found = path.stat()
    assert (found.st_size, found.st_blocks) == (len(wanted), -(-len(wanted) // 512))
    run("cp", path, tmp_path / "copy")
    run("tar", "-C", m.point, "-cf", tmp_path / "tar", "extents.json")
    read = [run("cat", path), path.read_bytes(), (tmp_path / "copy").read_bytes()]
    read.append(run("tar", "-xOf", tmp_path / "tar"))
    assert read == [wanted] * 4
    with path.open("rb") as file:
        assert os.lseek(file.fileno(), 3, os.SEEK_DATA) == 3
        assert os.lseek(file.fileno(), 3, os.SEEK_HOLE) == len(wanted)
        with pytest.raises(OSError, match="No such device or address"):
            os.lseek(file.fileno(), len(wanted), os.SEEK_DATA)


def test_image_without_bytes(mount: Mounter, tmp_path: Path) -> None:
    (tmp_path / "x.raw").touch()
    m = mount(tmp_path / "x.raw")
    assert (m.point / "extents.json").read_bytes() == map_of(tmp_path / "x.raw")


@pytest.mark.parametrize("where", ["local", "ssh"])
def test_replaced_source(mount: Mounter, sshd: Sshd, sparse: Path, where: str) -> None:
    m = mount(sparse) if where == "local" else mount(sshd.url(sparse), "-o", sshd.options)
    path = m.point / "extents.json"
    assert path.read_bytes() == map_of(sparse)
    new = sparse.with_name("new")
    with new.open("wb") as file:
        file.truncate(9 * MIB)
        file.seek(MIB)
        file.write(os.urandom(4096))
        os.fsync(file.fileno())
    new.replace(sparse)
    wanted = map_of(sparse)
    assert path.read_bytes() == wanted
    time.sleep(1.1)  # how long the kernel keeps attributes
    assert path.stat().st_size == len(wanted)
    assert (m.point / "disk.raw").stat().st_size == 9 * MIB


def test_what_has_no_size_can_be_read(mount: Mounter, sparse: Path, tmp_path: Path) -> None:
    about = mount(sparse).point / ".imgfs"
    for name in ("status.json", "metrics"):
        assert (about / name).stat().st_size == 0
        run("cp", about / name, tmp_path / name)
        texts = [run("cat", about / name), (about / name).read_bytes()]
        for text in (*texts, (tmp_path / name).read_bytes()):
            assert b"disk" in text
            assert text.endswith(b"\n")
    json.loads((tmp_path / "status.json").read_bytes())
