"""`imgfs copy` to what is there already: devices and NBD exports; and to S3."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_copy import FORMATS, copy, names, refused, same, stored
from tests.mounts import MIB
from tests.servers.nbd import Nbdkit, QemuNbd
from tests.servers.ssh import Sshd
from tests.servers.web import Bucket, Weed

Servers = Callable[..., Any]


def loop(file: Path, size: int) -> str:
    file.write_bytes(os.urandom(size))
    command = ["losetup", "--show", "-f", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """80 MiB of noise."""
    name = loop(tmp_path / "backing", 80 * MIB)
    yield name
    subprocess.run(["losetup", "-d", name], check=True)


def head(path: str | Path, size: int) -> bytes:
    with Path(path).open("rb", buffering=0) as file:
        return file.read(size)


def test_a_block_device(sparse: Path, device: str, tmp_path: Path) -> None:
    size = sparse.stat().st_size
    tail = (tmp_path / "backing").read_bytes()[-15 * MIB :]
    copy(sparse, device, "--verify")
    os.sync()
    assert head(device, size) == sparse.read_bytes()
    found = (tmp_path / "backing").read_bytes()
    assert found[:size] == sparse.read_bytes()
    assert found[-15 * MIB :] == tail
    assert stored(tmp_path / "backing") < 24 * MIB  # what is a hole was given back


@pytest.mark.parametrize("format", FORMATS)
def test_what_does_not_end_with_a_sector(
    out: Path, tmp_path: Path, device: str, format: str
) -> None:
    """The image, or what a format has before and behind its holes."""
    before = (tmp_path / "backing").read_bytes()
    with (out / "a").open("wb") as file:
        file.write(os.urandom(MIB + 1))
        file.truncate(10_000_001)
    copy(out / "a", out / "b", "-O", format)
    copy(out / "a", device, "-O", format, "--verify")
    size = (out / "b").stat().st_size
    found = head(device, 80 * MIB)
    (out / "c").write_bytes(found[:size])
    same(out / "a", out / "c", FORMATS[format])
    assert found[size:] == before[size:]
    os.sync()
    if size > 9 * MIB:
        assert stored(tmp_path / "backing") < 75 * MIB  # what is a hole was given back


def test_a_device_behind_ssh(sparse: Path, device: str, sshd: Sshd) -> None:
    copy(sparse, sshd.url(Path(device)), "-o", sshd.options, "--verify")
    assert head(device, sparse.stat().st_size) == sparse.read_bytes()
    assert not Path(f"{device}.part").exists()


def test_a_device_that_is_too_small(sparse: Path, tmp_path: Path) -> None:
    small = loop(tmp_path / "small", 16 * MIB)
    try:
        before = head(small, 16 * MIB)
        assert f"has {16 * MIB} bytes, and the copy needs" in refused(sparse, small)
        assert head(small, 16 * MIB) == before
        assert "is what would be copied" in refused(small, small)
    finally:
        subprocess.run(["losetup", "-d", small], check=True)


@pytest.mark.parametrize("kind", [Nbdkit, QemuNbd])
def test_an_nbd_export(sparse: Path, servers: Servers, tmp_path: Path, kind: Any) -> None:
    target = tmp_path / "target"
    target.write_bytes(os.urandom(70 * MIB))
    words = ["file", target] if kind is Nbdkit else ["-f", "raw", "--discard=unmap", target]
    server = servers(kind, *words, write=True)
    copy(sparse, server.url(), "--verify")
    assert head(target, sparse.stat().st_size) == sparse.read_bytes()
    assert stored(target) < 12 * MIB


def scripted(servers: Servers, target: Path, write: str, *flush: str) -> str:
    """An export of the file, 70 MiB, that is written by a command of ours."""
    target.touch()
    os.truncate(target, 70 * MIB)
    to = f"dd of={target} conv=notrunc status=none"
    read = f"dd if={target} bs=$3 skip=$4 count=1 iflag=skip_bytes,fullblock status=none"
    words = [f"get_size=echo {70 * MIB}", f"pread={read}", "can_write=exit 0"]
    words += [f"pwrite={to} bs=$3 seek=$4 oflag=seek_bytes iflag=fullblock; {write.format(to=to)}"]
    url: str = servers(Nbdkit, "eval", *words, *flush, write=True).url()
    return url


def test_an_nbd_export_that_loses_a_bit(sparse: Path, servers: Servers, tmp_path: Path) -> None:
    place = 5 * MIB + 100
    spoil = f'if [ "$4" = {5 * MIB} ]; then printf x | {{to}} bs=1 seek={place}; fi'
    url = scripted(servers, tmp_path / "target", spoil, "can_flush=exit 0", "flush=sync")
    with sparse.open("r+b") as file:
        file.seek(place)
        file.write(b"y")
    assert f"differs from disk.img at byte {place}" in refused(sparse, url, "--verify")
    copy(sparse, url)  # without it nobody notices


def test_a_server_that_cannot_sync(sparse: Path, servers: Servers, tmp_path: Path) -> None:
    target = tmp_path / "target"
    url = scripted(servers, target, ":", "can_flush=exit 3", "can_fua=echo none")
    done = copy(sparse, url, "--verify")
    assert "no flush: what was written may not survive a crash" in done.stderr
    assert head(target, sparse.stat().st_size) == sparse.read_bytes()


def test_an_export_that_cannot_be_written(sparse: Path, servers: Servers, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(bytes(70 * MIB))
    server = servers(Nbdkit, "file", target)
    assert "read-only" in refused(sparse, server.url())


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    server = Weed(tmp_path_factory.mktemp("weed"))
    yield server
    server.stop()


def test_s3(
    sparse: Path, weed: Weed, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Bucket(weed).put("first", b"x")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", weed.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", weed.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", weed.secret)
    copy(sparse, "s3://images/some where/a.raw", "--verify")
    done = copy(sparse, "s3://images/b/", "-O", "qcow2", "--resume")
    assert "starts at its beginning" in done.stderr
    copy("s3://images/some where/a.raw", "s3://images/b/disk.qcow2", f"{out}/")
    assert names(out) == ["a.raw", "disk.raw"]
    for name in names(out):
        same(sparse, out / name)
    assert stored(out / "a.raw") < 5 * MIB  # zeroes came, and became holes
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x" * 20)
    assert "secret key is not" in refused(sparse, "s3://images/c.raw")
