"""A directory as a SOURCE: one directory an image, and the plain files beside them."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs.views.showing import SHOWN
from tests.mounts import MIB, Mount, imgfs
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]


@pytest.fixture
def pool(tmp_path: Path, sparse: Path) -> Path:
    """Two images, two that would share a name, and files that are none."""
    pool = tmp_path / "pool"
    pool.mkdir()
    sparse.rename(pool / "disk.img")
    for name in ("same.raw", "same.IMG", "notes.txt", "originals.img", ".imgfs.raw"):
        (pool / name).write_bytes(name.encode() * 1000)
    (pool / "directory.img").mkdir()
    os.mkfifo(pool / "pipe.img")
    return pool


@pytest.fixture(params=["local", "ssh"])
def mounted(request: pytest.FixtureRequest, mount: Mounter, pool: Path) -> Mount:
    if request.param == "local":
        return mount(f"{pool}/")
    sshd: Sshd = request.getfixturevalue("sshd")
    return mount(sshd.url(pool) + "/", "-o", sshd.options)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def states(m: Mount) -> dict[str, str]:
    images: dict[str, dict[str, str]] = m.status()["images"]  # type: ignore[assignment]
    return {name: image["state"] for name, image in images.items()}


def test_names(mounted: Mount, pool: Path) -> None:
    found = names(mounted.point)
    assert found == sorted(
        [".imgfs", "originals", "disk", "same.raw", "same.IMG", "%originals", "%.imgfs"]
    )
    for name, file in (("disk", "disk.img"), ("same.IMG", "same.IMG"), ("%.imgfs", ".imgfs.raw")):
        directory = mounted.point / name
        shown = [f"{name}{extension}" for extension in (".raw", *SHOWN)]
        assert names(directory) == sorted(
            [*shown, "original", "extents.json", "partitions", "snapshots", "sparse"]
        )
        assert (directory / f"{name}.raw").read_bytes() == (pool / file).read_bytes()
        assert names(directory / "original") == [file]
    originals = mounted.point / "originals"
    assert "notes.txt" in names(originals)
    for file in ("notes.txt", "disk.img", "same.raw"):
        assert (originals / file).read_bytes() == (pool / file).read_bytes()
    with pytest.raises(FileNotFoundError):
        (mounted.point / "notes").stat()


def test_looking_opens_nothing(mounted: Mount) -> None:
    for path in mounted.point.iterdir():
        path.stat()
    names(mounted.point / "disk")
    names(mounted.point / "originals")
    assert set(states(mounted).values()) == {"not opened yet"}
    (mounted.point / "disk/disk.raw").stat()
    assert states(mounted)["disk"] == "open"
    assert list(states(mounted).values()).count("open") == 1


def test_follows_the_directory(mounted: Mount, pool: Path) -> None:
    kept = (mounted.point / "disk/disk.raw").open("rb")
    wanted = (pool / "disk.img").read_bytes()
    (pool / "new.img").write_bytes(b"new" * 1000)
    (pool / "notes.txt").unlink()
    (pool / "same.raw").unlink()
    os.utime(pool, (time.time() - 10, time.time() - 10))  # as if it had been a while ago
    deadline = time.monotonic() + 15
    while "new" not in names(mounted.point):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    found = names(mounted.point)
    assert "same" in found and "same.raw" not in found and "same.IMG" not in found
    assert "notes.txt" not in names(mounted.point / "originals")
    assert (mounted.point / "new/new.raw").read_bytes() == b"new" * 1000
    with kept:
        assert kept.read() == wanted


def test_looks_are_true(mount: Mounter, sshd: Sshd, tmp_path: Path, sparse: Path) -> None:
    """Size and blocks of a file that was only looked at are those of the one that is read."""
    pool = tmp_path / "pool"
    pool.mkdir()
    sparse.rename(pool / "a.img")
    for name in ("b.qcow2", "c.qcow2", "d.vmdk", "e.vhdx", "f.vdi", "g.vhd"):
        kind = {"vhd": "vpc"}.get(name[2:], name[2:])
        words = ["qemu-img", "convert", "-f", "raw", "-O", kind, pool / "a.img", pool / name]
        subprocess.run(words, check=True)
    m = mount(sshd.url(pool) + "/", "-o", sshd.options)
    files = [path for image in "abcdefg" for path in m.point.glob(f"{image}/**/*.*")]
    assert len(files) == 7 * (2 + 1 + 2 * len(SHOWN) + 1)
    looked = {path: (path.stat().st_size, path.stat().st_blocks) for path in files}
    assert all(blocks for _, blocks in looked.values())
    # cp looks for the holes that there are.  Of what is stored, blocks of zeroes that were found by
    # reading, for a table say, are holes too, and come later.
    for path in [path for path in files if path.parent.name != "original"]:
        with path.open("rb") as file:
            size, blocks = looked[path]
            assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == size or blocks * 512 < size, path
    for path in files:
        if path.name == "extents.json":
            continue
        with path.open("rb") as file:
            content = file.read()
            assert len(content) == looked[path][0], path
            found = os.fstat(file.fileno())
            assert (found.st_size, found.st_blocks) == looked[path], path
            # All that is not zero counts.
            assert len(content) - content.count(0) <= found.st_blocks * 512, path
    time.sleep(1.1)  # what the kernel knows of them is asked for again
    for path in files:
        assert (path.stat().st_size, path.stat().st_blocks) == looked[path], path


def test_names_of_any_bytes_and_length(mount: Mounter, sshd: Sshd, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    odd = [b"caf\xe9.img", b"new\nline.img", b"a b#c?d%41.img", b"-o.img", b"x" * 251 + b".img"]
    for name in odd:
        (pool / os.fsdecode(name)).write_bytes(name)
    for source, options in ((f"{pool}/", ()), (sshd.url(pool) + "/", ("-o", sshd.options))):
        m = mount(source, *options)
        shown = [name for name in names(m.point) if name not in (".imgfs", "originals")]
        assert len(shown) == len(odd)
        contents = {(m.point / name / f"{name}.raw").read_bytes() for name in shown}
        assert contents == set(odd)
        assert {os.fsencode(n) for n in names(m.point / "originals")} == set(odd)


def test_what_is_no_directory(sshd: Sshd, sparse: Path, tmp_path: Path, mount: Mounter) -> None:
    point = tmp_path / "point"
    point.mkdir()
    for source in (f"{sparse}/", f"{tmp_path}/missing/"):
        done = imgfs(source, point)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    for path in (sparse, tmp_path / "missing"):
        done = imgfs(sshd.url(path) + "/", point, "-o", sshd.options)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_one_missing_image_is_not_the_others(mounted: Mount, pool: Path) -> None:
    names(mounted.point)
    (pool / "same.raw").unlink()
    with pytest.raises(FileNotFoundError):
        (mounted.point / "same.raw/same.raw.raw").read_bytes()
    assert (mounted.point / "disk/disk.raw").read_bytes() == (pool / "disk.img").read_bytes()


def test_many_images(mount: Mounter, sshd: Sshd, tmp_path: Path) -> None:
    """ls -l of all of it; more images than a server gives file handles."""
    pool = tmp_path / "pool"
    pool.mkdir()
    count = 1000 if os.environ.get("IMGFS_TEST_LONG") else 200
    for i in range(count):
        with (pool / f"{i}.img").open("wb") as file:
            file.truncate(MIB)
            file.write(str(i).encode())
    m = mount(sshd.url(pool) + "/", "-o", sshd.options)
    begun = time.monotonic()
    done = subprocess.run(
        ["ls", "-lR", m.point], capture_output=True, text=True, timeout=100, check=True
    )
    print(f"ls -lR of {count} images: {time.monotonic() - begun:.2f} s")
    status = (Path("/proc") / str(m.pid) / "status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]
    print(f"{peak >> 10} MiB at most")
    assert peak << 10 < 80 * MIB + count * (60 << 10)
    # The disk, the file twice, and the disk in sparse/.
    assert done.stdout.count(f" {MIB} ") == 4 * count
    assert set(states(m).values()) == {"open"}
    # Nothing is on disk of what was only looked at, but for the first, which taught us the server.
    kept = [path for path in (tmp_path / "cache/imgfs").iterdir() if path.is_dir()]
    assert len(kept) <= 1
    for i in range(0, count, 7):
        with (m.point / f"{i}/{i}.raw").open("rb") as file:
            assert file.read(4).rstrip(b"\0") == str(i).encode()[:4]
