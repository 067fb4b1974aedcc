"""`import imgfs`: images in a program, under trio and without it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import trio

import imgfs
from tests.mounts import MIB
from tests.servers.ssh import Sshd


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_under_trio(sparse: Path, sshd: Sshd) -> None:
    content = sparse.read_bytes()
    key, known = (str(sshd.directory / name) for name in ("user", "known"))

    async def main() -> None:
        options = imgfs.Options(key=key, known_hosts=known)
        async with imgfs.open_image(sshd.url(sparse), options) as image:
            assert (image.size, image.formats) == (len(content), ("raw",))
            assert image.url == sshd.url(sparse)
            extents = await image.extents()
            assert 0 < extents.stored_bytes() < image.size
            for start, end in extents.data_ranges():
                assert await image.read(start, end - start) == content[start:end]
            part = await image.extents(MIB, 4 * MIB)
            assert (part.start, part.end) == (MIB, 5 * MIB)
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    for at in range(0, 8 * MIB, MIB):
                        nursery.start_soon(image.read, at, MIB)

    trio.run(main)


def test_every_format_is_the_same_disk(sparse: Path, tmp_path: Path) -> None:
    formats = {"qcow2": "qcow2", "vmdk": "vmdk", "stream.vmdk": "vmdk", "vdi": "vdi"}
    formats |= {"vhd": "vpc", "vhdx": "vhdx", "raw": "raw"}
    with imgfs.plain.open_image(sparse) as image:
        for format, name in formats.items():
            shown, file = image.shown_as(format), tmp_path / "file"
            file.write_bytes(shown.read(0, shown.size))
            compare = ["qemu-img", "compare", "-q", "-f", "raw", "-F", name, sparse, file]
            subprocess.run(compare, check=True, timeout=60)
        with pytest.raises(imgfs.ImgfsError, match="name one of raw, qcow2"):
            image.shown_as("zip")


def test_what_a_qcow2_holds(sparse: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", sparse, file], check=True, timeout=60)
    with imgfs.plain.open_image(file) as image:
        assert image.formats == ("qcow2",)
        size = sparse.stat().st_size  # qemu rounds it up to a sector
        assert image.read(0, size) == sparse.read_bytes()
        assert image.stored.read(0, 4) == b"QFI\xfb"
        assert image.stored.size == file.stat().st_size


def test_partitions_and_free_space(tmp_path: Path) -> None:
    disk, volume = tmp_path / "disk.img", tmp_path / "fs"
    for path, size in ((disk, 40 * MIB), (volume, 32 * MIB)):
        path.touch()
        os.truncate(path, size)
    subprocess.run(["mkfs.ext4", "-q", volume], check=True, timeout=60)
    junk = bytearray(volume.read_bytes())
    junk[26 * MIB : 27 * MIB] = os.urandom(MIB)  # nothing is stored there
    table = "label: dos\nstart=2048,size=65536\n"
    sfdisk = ["sfdisk", "--quiet", "--force", str(disk)]
    subprocess.run(sfdisk, input=table, text=True, check=True, timeout=30)
    with disk.open("r+b") as file:
        file.seek(MIB)
        file.write(junk)
    with imgfs.plain.open_image(disk) as image:
        assert list(image.partitions()) == ["1"]
        part = image.partitions()["1"]
        assert part.read(0, part.size) == junk
        assert image.sparse().read(27 * MIB, MIB) == bytes(MIB)
        assert part.sparse().read(26 * MIB, MIB) == bytes(MIB)
        assert image.sparse().shown_as("qcow2").read(0, 4) == b"QFI\xfb"


def test_snapshots(sparse: Path) -> None:
    command = [sys.executable, "-m", "imgfs.cli.main", "snapshot", "create", str(sparse)]
    for name in ("x", "x/y"):
        subprocess.run([*command, name], check=True, timeout=30)
    with imgfs.plain.open_image(sparse) as image:
        assert image.snapshots() == ["x", "x/y"]
        with image.snapshot("x") as snapshot:
            assert snapshot.read(0, image.size) == sparse.read_bytes()
            with image.snapshot("x") as again:  # who reads disturbs nobody who reads
                assert again.read(0, 8192) == snapshot.read(0, 8192)
            delete = [*command[:-2], "delete", str(sparse), "x/y"]
            done = subprocess.run(delete, capture_output=True, text=True, timeout=30, check=False)
            assert (done.returncode, done.stderr) == (0, "")
            delete = [*command[:-2], "delete", str(sparse), "x"]
            done = subprocess.run(delete, capture_output=True, text=True, timeout=30, check=False)
            assert done.returncode == 1
            assert f"process {os.getpid()}" in done.stderr
        with pytest.raises(imgfs.ImgfsError, match="no snapshot"), image.snapshot("z"):
            pass


def test_errors_come_as_they_are(sparse: Path) -> None:
    with pytest.raises(imgfs.ImgfsError, match="no such file"), imgfs.plain.open_image("/nowhere"):
        pass
    with imgfs.plain.open_image(sparse) as image:
        with pytest.raises(imgfs.ImgfsError, match="outside of"):
            image.read(image.size, 1)
        assert image.read(image.size, 0) == b""
    with pytest.raises(KeyError), imgfs.plain.open_image(sparse):
        raise KeyError
    assert "imgfs" not in {thread.name for thread in threading.enumerate()}


def test_from_many_threads(sparse: Path) -> None:
    content, found = sparse.read_bytes(), {}
    with imgfs.plain.open_image(sparse) as image:

        def work(at: int) -> None:
            found[at] = image.read(at, MIB)

        threads = [threading.Thread(target=work, args=(at,)) for at in range(0, 16 * MIB, MIB)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert found == {at: content[at : at + MIB] for at in range(0, 16 * MIB, MIB)}


def test_the_import_is_cheap() -> None:
    code = "import sys, imgfs; print([m for m in ('trio', 'click', 'asyncio') if m in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = imgfs.nothing  # type: ignore[attr-defined]


def test_a_type_checker_knows_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import imgfs\n"
        "async def main() -> int:\n"
        "    async with imgfs.open_image('x', imgfs.Options(format='raw')) as image:\n"
        "        reveal_type(await image.read(0, 1))\n"
        "        reveal_type(await image.partitions())\n"
        "        return image.size\n"
        "with imgfs.plain.open_image('x') as plain:\n"
        "    reveal_type(plain.extents())\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--strict", str(program)]
    where = Path(__file__).parents[1]
    done = subprocess.run(mypy, capture_output=True, text=True, timeout=100, cwd=where, check=False)
    assert done.returncode == 0, done.stdout
    for name in ('"bytes"', "imgfs.library.DiskImage]", "imgfs.extents.ExtentList"):
        assert name in done.stdout


def test_under_asyncio_it_says_what_to_use(sparse: Path) -> None:
    async def work() -> None:
        async with imgfs.open_image(sparse):
            pass

    with pytest.raises(imgfs.ImgfsError, match=r"use imgfs\.plain\.open_image"):
        asyncio.run(work())
