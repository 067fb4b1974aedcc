"""Damage to what earlier mounts left: a mount shows right bytes, or says which file is damaged."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.damage import LONG, flipped, swapped
from tests.mounts import MIB, Mount, imgfs
from tests.servers.ssh import Sshd

from .test_mount_pinned import hostile

Mounter = Callable[..., Mount]
BLOCK = 64 << 10
SHORT = [("cut", "source"), ("ones", "checks"), ("flipped", "blocks"), ("flipped", "extents")]


def cached(root: Path) -> Iterator[tuple[str, Path, bytes]]:
    """A file of the cache, and what becomes of it."""
    for path in sorted(root.glob("*/*")):
        good = path.read_bytes()
        if not good:
            continue  # a lock
        rng = random.Random(path.name)
        yield "cut", path, good[: len(good) // 2]
        yield "emptied", path, b""
        yield "zeroes", path, bytes(len(good))
        # What was "all zero" in the first version of `checks`, of 32 and of 64 bits.
        yield "ones", path, b"\1\0\0\0\0\0\0\0" * (len(good) // 8)
        yield "ones", path, b"\1\0\0\0" * (len(good) // 4)
        yield "flipped", path, flipped(good, rng.randrange(len(good)), rng.randrange(8))
        for length in (8, 4096, BLOCK):
            if 2 * length <= len(good):
                first, second = sorted(rng.sample(range(len(good) // length), 2))
                yield "swapped", path, swapped(good, first * length, second * length, length)


@pytest.mark.timeout(900)
def test_the_cache(mount: Mounter, sshd: Sshd, tmp_path: Path) -> None:
    source = tmp_path / "disk.img"
    with source.open("wb") as file:
        file.write(os.urandom(9 * BLOCK) + bytes(3 * BLOCK) + os.urandom(2 * BLOCK + 99))
        file.truncate(40 * BLOCK)
        file.seek(33 * BLOCK + 7)
        file.write(os.urandom(2 * BLOCK))
    os.utime(source, (1_700_000_000, 1_700_000_000))

    def shown() -> None:
        m = mount(sshd.url(source), "-o", sshd.options)
        subprocess.run(["cmp", source, m.point / "disk.raw"], check=True, timeout=60)
        assert imgfs("umount", m.point).returncode == 0
        m.point.rmdir()

    shown()
    (root,) = tmp_path.glob("cache/imgfs")
    good = tmp_path / "good"
    shutil.copytree(root, good)
    names = set()
    for what, path, content in cached(good):
        if not LONG and (what, path.name) not in SHORT:
            continue
        shutil.rmtree(root)
        shutil.copytree(good, root)
        (root / path.relative_to(good)).write_bytes(content)
        names.add(path.name)
        checked = imgfs("cache", "check")
        if (what, path.name) in (("cut", "source"), ("flipped", "blocks"), ("flipped", "extents")):
            assert checked.returncode == 1, (what, path)
        if what != "flipped" or path.name != "blocks":
            # Not after `check`, which forgets what is bad.
            (root / path.relative_to(good)).write_bytes(content)
        shown()
    assert {"source", "checks", "blocks"} <= names


def test_a_pin(mount: Mounter, tmp_path: Path) -> None:
    disk, victim = tmp_path / "disk.img", tmp_path / "victim.raw"
    disk.write_bytes(bytes(MIB))
    victim.write_bytes(b"secret" * (MIB // 6))
    m = mount(disk, "-o", "write=through")
    with (m.point / "disk.raw").open("r+b") as raw:
        raw.write(hostile(disk, victim))
    assert imgfs("umount", m.point).returncode == 0
    m.point.rmdir()
    pins = sorted((tmp_path / "state/imgfs").glob("raw*/*"))
    assert len(pins) == 2
    good = pins[0].read_bytes()
    damages = [b"", flipped(good, 3, 1), None]
    damages += [b"x", good[:-9], bytes(len(good))] if LONG else []
    for content in damages:
        for path in pins:
            path.write_bytes(content or b"")
        if content is None:
            pins[0].unlink()
        m = mount(disk, says="was raw when imgfs wrote to it, and stays raw")
        assert (m.point / "disk.raw").read_bytes() == disk.read_bytes()
        assert imgfs("umount", m.point).returncode == 0
        m.point.rmdir()


@pytest.mark.timeout(900)
def test_what_is_beside_the_layers(mount: Mounter, tmp_path: Path) -> None:
    disk, other = tmp_path / "disk.img", tmp_path / "other.img"
    for path in (disk, other):
        path.write_bytes(os.urandom(MIB))
        for name in ("x", "y"):
            assert imgfs("snapshot", "create", path, name).returncode == 0
    (ours,) = (tmp_path / "state/imgfs").glob("disk*")
    (theirs,) = (tmp_path / "state/imgfs").glob("other*")
    layers = {path.name for path in (ours / "layers").iterdir()}
    for name in ("base", "snapshots"):
        good = (ours / name).read_bytes()
        half, lost = good[: len(good) // 2], b"\n".join(good.splitlines()[:-1])
        damages = [lost, (theirs / name).read_bytes()]
        damages += [b"", half, flipped(good, 40, 1)] if LONG else []
        for content in damages:
            (ours / name).write_bytes(content)
            done = imgfs("snapshot", "create", disk, "z")
            if done.returncode == 0:  # nobody knows whether there were more, but there is room
                assert name == "snapshots"
                assert imgfs("snapshot", "delete", disk, "z").returncode == 0
            else:
                assert done.stderr.startswith(f"imgfs: {ours / name}: ")
                assert done.stderr.count("\n") == 1
            said = imgfs("snapshot", "list")
            assert f"{ours / name}: " in said.stderr
            if name == "snapshots":
                assert (
                    f"{ours / name}: has damaged records" in imgfs("snapshot", "list", disk).stderr
                )
            m = mount(disk)
            assert (m.point / "disk.raw").read_bytes() == disk.read_bytes()
            found = {path.name for path in (m.point / "snapshots").iterdir()}
            assert found <= {"x", "y"}
            for each in found:
                try:
                    content = (m.point / f"snapshots/{each}/{each}.raw").read_bytes()
                except OSError:
                    continue
                assert content == disk.read_bytes()
            assert imgfs("umount", m.point).returncode == 0
            m.point.rmdir()
            # Nothing that a damaged record may name is swept.
            assert layers <= {path.name for path in (ours / "layers").iterdir()}
            (ours / name).write_bytes(good)
    m = mount(disk)
    for name in ("x", "y"):
        shown = m.point / f"snapshots/{name}/{name}.raw"
        assert shown.read_bytes() == disk.read_bytes()
    assert imgfs("umount", m.point).returncode == 0


@pytest.mark.parametrize("name", ["base", "snapshots"])
def test_the_first_version(mount: Mounter, tmp_path: Path, name: str) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(os.urandom(MIB))
    assert imgfs("snapshot", "create", disk, "x").returncode == 0
    (directory,) = (tmp_path / "state/imgfs").glob("disk*")
    path = directory / name
    text = b'{"version": 1, "records": 0}'
    path.write_bytes(b"%08x%s%s\n" % (zlib.crc32(text), b"\n" if name == "base" else b" ", text))
    said = f"imgfs: {path}: version 1 is of another imgfs, and this one knows version 2; "
    for words in (("list",), ("create", disk, "y"), ("commit", disk, "x")):
        done = imgfs("snapshot", *words)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), words
        assert done.stderr.startswith(said)
    m = mount(disk)
    assert (m.point / "disk.raw").read_bytes() == disk.read_bytes()
    with pytest.raises(OSError, match="not supported"):
        (m.point / "snapshots/y").mkdir()
    assert imgfs("umount", m.point).returncode == 0
