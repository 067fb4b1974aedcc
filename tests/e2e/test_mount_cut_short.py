"""What lies below a mount is cut short, or cannot be read: the right errno, and one plain line."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.formats import qemu
from tests.mounts import MIB

from .foreground import foreground

SIZE = 16 * MIB


def error_of(path: Path, offset: int) -> int:
    """The errno of a read, 0 if it has none."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.pread(fd, 64 << 10, offset)
    except OSError as exc:
        return exc.errno or -1
    finally:
        os.close(fd)
    return 0


def make_raw(path: Path) -> Path:
    path.write_bytes(os.urandom(SIZE))
    return path


def make_image(pool: Path, kind: str) -> tuple[Path, Path]:
    """An image, and the file to be cut, which has its last bytes."""
    raw = make_raw(pool / "x.raw")
    if kind == "raw":
        return raw, raw
    if kind == "backing":
        top = pool / "top.qcow2"
        qemu.img("create", "-q", "-f", "qcow2", "-b", "x.raw", "-F", "raw", top)
        return top, raw
    options = ["-o", "subformat=twoGbMaxExtentFlat"] if kind == "flat" else []
    format = {"flat": "vmdk", "vhd": "vpc"}.get(kind, kind)
    image = pool / f"y.{'vmdk' if kind == 'flat' else kind}"
    qemu.img("convert", "-f", "raw", "-O", format, *options, raw, image)
    raw.unlink()
    return image, pool / "y-f001.vmdk" if kind == "flat" else image


KINDS = ["raw", "qcow2", "vdi", "vmdk", "vhd", "vhdx", "backing", "flat"]


@pytest.mark.parametrize("kind", KINDS)
def test_cut_is_stale_at_once(own_directories: None, tmp_path: Path, kind: str) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    image, file = make_image(pool, kind)
    with foreground(image, tmp_path) as m:
        views = [m.point / f"{image.stem}.raw", m.point / f"{image.stem}.vdi"]
        views += [] if kind in ("backing", "flat") else [m.point / "original" / image.name]
        fds = [os.open(path, os.O_RDONLY) for path in views]
        for fd in fds:
            assert len(os.pread(fd, 4096, 0)) == 4096
        os.truncate(file, MIB)
        for fd, path in zip(fds, views, strict=True):
            with pytest.raises(OSError) as raised:
                os.pread(fd, 64 << 10, 8 * MIB)
            assert raised.value.errno == errno.ESTALE, path
            os.close(fd)
        m.refuse_bugs()


def test_cut_base_of_a_snapshot(own_directories: None, tmp_path: Path) -> None:
    image = make_raw(tmp_path / "x.raw")
    with foreground(image, tmp_path) as m:
        (m.point / "snapshots/s").mkdir()
        fd = os.open(m.point / "snapshots/s/s.raw", os.O_RDONLY)
        assert len(os.pread(fd, 4096, 0)) == 4096
        os.truncate(image, MIB)
        with pytest.raises(OSError) as raised:
            os.pread(fd, 64 << 10, 8 * MIB)
        assert raised.value.errno == errno.ESTALE
        os.close(fd)
        m.refuse_bugs()


def test_cut_before_its_extents_are_known(own_directories: None, tmp_path: Path) -> None:
    """What lies behind the end of a shorter file is no hole."""
    image = make_raw(tmp_path / "x.raw")
    with foreground(image, tmp_path, "-o", "write=through") as m:
        os.truncate(image, MIB)
        assert error_of(m.point / "x.raw", 8 * MIB) in (errno.ESTALE, 0)
        assert (m.point / "x.raw").read_bytes() == image.read_bytes()
        m.refuse_bugs()


@contextmanager
def failing(
    directory: Path, image: Path, error: str
) -> Iterator[tuple[Path, Callable[[bool], None]]]:
    """The image as a file whose reads fail while that is switched on."""
    point, switch = directory / "bad", directory / "switch"
    point.mkdir()
    file = point / image.name
    kit = ["nbdkit", "--exit-with-parent", "--filter=error", "file", str(image)]
    kit += [f"error-pread={error}", "error-pread-rate=100%", f"error-pread-file={switch}"]
    process = subprocess.Popen(["nbdfuse", str(file), "[", *kit, "]"], stderr=subprocess.DEVNULL)

    def set_to(on: bool) -> None:
        switch.touch() if on else switch.unlink()

    try:
        until = time.monotonic() + 20
        while not (file.exists() and file.stat().st_size) and time.monotonic() < until:
            time.sleep(0.05)
        yield file, set_to
    finally:
        subprocess.run(["fusermount3", "-uzq", str(file)], timeout=20, check=False)
        subprocess.run(["fusermount3", "-uzq", str(point)], timeout=20, check=False)
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("kind", ["raw", "qcow2", "backing", "flat"])
def test_bad_sector(own_directories: None, tmp_path: Path, kind: str) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    image, file = make_image(pool, kind)
    stored = file.rename(tmp_path / file.name)
    with failing(tmp_path, stored, "EIO") as (bad, switch):
        file.symlink_to(bad)
        with foreground(image, tmp_path) as m:
            raw = m.point / f"{image.stem}.raw"
            assert error_of(raw, 0) == 0
            switch(True)
            assert error_of(raw, 12 * MIB) == errno.EIO
            assert error_of(m.point / f"{image.stem}.vhdx", 12 * MIB) == errno.EIO
            text = m.text()
            assert f"{file.name}: Input/output error" in text, text
            m.refuse_bugs()
            switch(False)
            assert error_of(raw, 12 * MIB) == 0
