"""Images of all formats in a mount, against qemu-img; and those that are damaged or not whole."""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.formats import qemu
from tests.mounts import MIB, Mount, imgfs
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]
SIZE = 12 * MIB

#: The file, and the options that qemu makes it with.
IMAGES = {
    "q.qcow2": "",
    "small.qcow2": "cluster_size=4k",
    "old.qcow2": "compat=0.10",
    "sub.qcow2": "extended_l2=on,cluster_size=128k",
    "sparse.vmdk": "",
    "flat.vmdk": "subformat=monolithicFlat",
    "parts.vmdk": "subformat=twoGbMaxExtentSparse",
    "flats.vmdk": "subformat=twoGbMaxExtentFlat",
    "dynamic.vdi": "",
    "static.vdi": "static=on",
    "dynamic.vhd": "force_size=on",
    "fixed.vhd": "subformat=fixed,force_size=on",
    "dynamic.vhdx": "",
    "fixed.vhdx": "subformat=fixed",
}
SHOWN = (".qcow2", ".vmdk", ".stream.vmdk", ".vdi", ".vhd", ".vhdx")


def kind(path: Path) -> str:
    return "vpc" if path.suffix == ".vhd" else path.suffix[1:]


def zeroes(text: str) -> list[tuple[int, int]]:
    """Where a map says that there are zeroes, joined."""
    found: list[tuple[int, int]] = []
    for entry in json.loads(text):
        start, end = entry["start"], entry["start"] + entry["length"]
        if entry["zero"] and found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        elif entry["zero"]:
            found.append((start, end))
    return found


@pytest.mark.parametrize("where", ["local", "ssh"])
def test_all_formats(mount: Mounter, sshd: Sshd, tmp_path: Path, where: str) -> None:
    pool, rng = tmp_path / "pool", random.Random(4)
    pool.mkdir()
    for name, options in IMAGES.items():
        path = pool / name
        path = path.with_stem(f"{path.stem}-{path.suffix[1:]}")
        more = ["-o", options] if options else []
        qemu.img("create", "-q", "-f", kind(path), *more, path, str(SIZE))
        qemu.io(path, kind(path), *qemu.scribble(rng, SIZE, 6))
    images = [path for path in sorted(pool.iterdir()) if path.stem.endswith(path.suffix[1:])]
    assert len(images) == len(IMAGES)
    words = () if where == "local" else ("-o", sshd.options)
    m = mount(f"{pool}/" if where == "local" else sshd.url(pool) + "/", *words)
    for path in images:
        directory = m.point / path.stem
        raw = directory / f"{path.stem}.raw"
        wanted = qemu.raw(path, kind(path))
        assert raw.read_bytes() == wanted, path
        told = zeroes((directory / "extents.json").read_text())
        assert all(not any(wanted[start:end]) for start, end in told), path
        if kind(path) not in ("vpc", "vhdx"):  # there qemu does not look for the file's holes
            assert told == zeroes(qemu.img("map", "--output=json", "-f", kind(path), path)), path
        for extension in SHOWN:
            shown = directory / (path.stem + extension)
            if extension != ".vhd":  # which qemu cannot check
                qemu.img("check", "-f", kind(shown), shown)
            qemu.img("compare", "-f", kind(shown), "-F", "raw", shown, raw)


def fails(path: Path) -> int | None:
    with pytest.raises(OSError) as raised:
        path.read_bytes()
    return raised.value.errno


@pytest.mark.parametrize(
    "backing", ["gone.raw", "../base.raw", "nbd://127.0.0.1:1/x", "disk.qcow2"]
)
def test_a_backing_file_that_cannot_be_had(mount: Mounter, tmp_path: Path, backing: str) -> None:
    path = tmp_path / "pool" / "disk.qcow2"
    path.parent.mkdir()
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    below = "qcow2" if backing == path.name else "raw"
    qemu.img("create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", below, path, "1M")
    m = mount(path, says="only original/ can be read")
    assert fails(m.point / "disk.raw") == errno.EIO
    assert (m.point / "original/disk.qcow2").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("options", ["backing=nope.img", "format=vmdk"])
def test_an_option_that_is_wrong_mounts_nothing(tmp_path: Path, options: str) -> None:
    path, point = tmp_path / "disk.qcow2", tmp_path / "point"
    point.mkdir()
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    qemu.img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path, "1M")
    done = imgfs(path, point, "-o", options)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert not point.is_mount()


def test_an_image_that_is_cut(mount: Mounter, tmp_path: Path) -> None:
    """What is not damaged can be read."""
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", path, "4M")
    qemu.io(path, "qcow2", "write -P 3 0 4M")
    with path.open("r+b") as file:
        file.truncate(2_000_000)
    m = mount(path)
    with (m.point / "disk.raw").open("rb", buffering=0) as raw:
        assert raw.read(MIB) == bytes([3]) * MIB
        raw.seek(3 * MIB)
        with pytest.raises(OSError) as raised:
            raw.read(4096)
    assert raised.value.errno == errno.EIO
    assert fails(m.point / "disk.vdi") == errno.EIO
    assert (m.point / "original/disk.qcow2").read_bytes() == path.read_bytes()
