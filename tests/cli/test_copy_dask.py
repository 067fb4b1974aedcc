"""`imgfs copy --dask`: a batch, and shares of one image, by the workers of a real cluster."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.copying.engine import PIECE
from imgfs.copying.shares import divide
from imgfs.extents import from_data_ranges
from tests.cli.test_copy import copy, images, names, same, stored
from tests.images import scatter
from tests.mounts import MIB
from tests.servers.dask_cluster import Cluster
from tests.servers.nbd import Nbdkit
from tests.servers.ssh import Sshd
from tests.servers.web import Bucket, Weed

Servers = Callable[..., Any]
LONG = bool(os.environ.get("IMGFS_TEST_LONG"))


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    server = Weed(tmp_path_factory.mktemp("weed"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, weed: Weed) -> Iterator[Cluster]:
    """A cluster with two workers."""
    directory = tmp_path_factory.mktemp("dask")
    cluster = Cluster(directory)
    environment = {"XDG_STATE_HOME": str(directory / "state"), "AWS_ENDPOINT_URL": weed.endpoint}
    environment |= {"AWS_ACCESS_KEY_ID": weed.key, "AWS_SECRET_ACCESS_KEY": weed.secret}
    Bucket(weed).put("first", b"x")
    try:
        for _ in range(2):
            cluster.worker(**environment)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(two: Cluster) -> Cluster:
    two.forget()
    return two


def by(cluster: Cluster) -> tuple[str, str]:
    return ("--dask", str(cluster.file))


def test_a_batch(cluster: Cluster, tmp_path: Path, out: Path, state: Path, sparse: Path) -> None:
    made = images(tmp_path / "pool", 5)
    made[2].write_bytes(b"QFI\xfb" + bytes(3) + b"\x09" + bytes(100))
    manifest = tmp_path / "images.toml"
    manifest.write_text(
        '[images.one]\nsource = "disk.img"\n[images.two]\n'
        'command = ["nbdkit", "-r", "file", "disk.img"]\n'
    )
    words = [manifest, f"{made[0].parent}/disk[0-4].img", f"{out}/", "--verify", "--progress=json"]
    done = copy(*by(cluster), *words, code=1)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1] == {"event": "end", "images": 7, "copied": 6, "failed": 1}
    for event in (event for event in events if event["event"] == "done"):
        assert event["done"] == event["data"] == event["verified"]
    first, line = done.stderr.splitlines()
    assert first == "imgfs: 1 of 7 failed:"
    assert "disk2.img: " in line and "(on tcp://127.0.0.1:" in line
    for path in (each for each in made if each is not made[2]):
        assert (out / f"{path.stem}.raw").read_bytes() == path.read_bytes()
    same(sparse, out / "one.raw")
    same(sparse, out / "two.raw")
    assert stored(out / "one.raw") < 5 * MIB
    assert names(out) == sorted(["one.raw", "two.raw", *(f"disk{n}.raw" for n in (0, 1, 3, 4))])
    assert list(state.iterdir()) == []
    assert not (cluster.directory / "state/imgfs/copies").exists()
    assert cluster.shares == []  # small ones are copied whole


def test_what_is_relative_and_what_is_said(cluster: Cluster, tmp_path: Path, out: Path) -> None:
    """Words are as the client means them, wherever a worker runs."""
    (tmp_path / "base.img").write_bytes(os.urandom(MIB))
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "gone.img", "-F", "raw", "-u"]
    subprocess.run([*command, tmp_path / "top.qcow2", "1M"], check=True)
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        copy(*by(cluster), "-o", "backing=base.img", "top.qcow2", "out/a.vmdk", "-j", "1")
        copy(*by(cluster), "nbd+command:nbdkit -r file base.img", "out/b.raw")
    finally:
        os.chdir(here)
    same(tmp_path / "base.img", out / "a.vmdk", "vmdk")
    same(tmp_path / "base.img", out / "b.raw")


FORMATS = ["raw", "qcow2", *(["vmdk", "stream.vmdk", "vdi", "vhd", "vhdx"] if LONG else [])]


@pytest.mark.parametrize("format", FORMATS)
def test_shares_make_the_same_file(
    cluster: Cluster, tmp_path: Path, out: Path, state: Path, format: str
) -> None:
    image = tmp_path / "disk.img"
    scatter(image, 80 * MIB, 40 * MIB)
    once, again = out / f"a.{format}", tmp_path / f"a.{format}"
    done = copy(*by(cluster), image, once, "--verify")
    assert "disk: 4" in done.stderr and "compared" in done.stderr
    assert len(cluster.shares) > 4
    same(image, once, {"stream.vmdk": "vmdk", "vhd": "vpc"}.get(format, format))
    assert names(out) == [once.name] and list(state.iterdir()) == []
    if format == "qcow2":
        copy(image, again)
        assert once.read_bytes() == again.read_bytes()
    assert stored(once) < 45 * MIB


@pytest.mark.parametrize("where", ["ssh", "nbd"])
def test_shares_to_servers(
    cluster: Cluster, tmp_path: Path, out: Path, sshd: Sshd, servers: Servers, where: str
) -> None:
    image, target = tmp_path / "disk.img", out / "a.raw"
    scatter(image, 48 * MIB, 24 * MIB)
    place = sshd.url(target)
    if where == "nbd":
        target.write_bytes(os.urandom(48 * MIB))
        place = servers(Nbdkit, "file", target, tcp=True, write=True).url()
    copy(*by(cluster), "-o", sshd.options, sshd.url(image), place, "--verify")
    assert target.read_bytes() == image.read_bytes()
    assert stored(target) < 30 * MIB
    assert len(cluster.shares) > 4
    assert len({pid for pid, _ in cluster.shares}) == 2
    assert names(out) == ["a.raw"]


@pytest.mark.skipif(not LONG, reason="takes its time")
def test_an_export_for_one_alone(
    cluster: Cluster, tmp_path: Path, out: Path, servers: Servers
) -> None:
    image, target = tmp_path / "disk.img", out / "a.raw"
    scatter(image, 48 * MIB, 24 * MIB)
    target.write_bytes(os.urandom(48 * MIB))
    words = ("--filter=multi-conn", "file", target, "multi-conn-mode=disable")
    copy(*by(cluster), image, servers(Nbdkit, *words, tcp=True, write=True).url())
    assert target.read_bytes() == image.read_bytes()
    copy(*by(cluster), image, servers(Nbdkit, "file", target, write=True).url())
    assert cluster.shares == []


@pytest.mark.skipif(not LONG, reason="takes its time")
def test_without_free_blocks(cluster: Cluster, tmp_path: Path, out: Path) -> None:
    disk = tmp_path / "fs.img"
    disk.write_bytes(os.urandom(64 * MIB))
    command = ["mkfs.ext4", "-q", "-F", "-E", "nodiscard", "-d", tmp_path / "tree", disk]
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(os.urandom(20 * MIB))
    subprocess.run(command, check=True, timeout=60)
    copy(*by(cluster), disk, out / "a.qcow2", "--sparse", "--verify")
    copy(disk, out / "b.qcow2", "--sparse")
    assert len(cluster.shares) > 4
    command = ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2"]
    subprocess.run([*command, out / "a.qcow2", out / "b.qcow2"], check=True, timeout=60)


def test_s3_and_secrets(
    cluster: Cluster, tmp_path: Path, weed: Weed, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker has those of its environment; those of a file come with the image, and rule."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    image = tmp_path / "disk.img"
    scatter(image, 24 * MIB, 12 * MIB)
    copy(*by(cluster), image, "s3://images/a.raw", "--verify")
    assert cluster.shares == []
    manifest = tmp_path / "images.toml"
    for secret in (weed.secret, "x" * 20):
        manifest.write_text(
            f'[images.a]\nsource = "s3://images/a.raw"\ns3.endpoint = "{weed.endpoint}"\n'
            f's3.access_key = "{weed.key}"\ns3.secret_key = "{secret}"\n'
        )
        manifest.chmod(0o600)
        code = int(secret != weed.secret)
        done = copy(*by(cluster), manifest, f"{out}/", code=code)
        assert ("secret key is not" in done.stderr) == bool(code)
    assert weed.secret not in cluster.log
    same(image, out / "a.raw")


RANGES = st.lists(st.tuples(st.integers(1, 9 * MIB), st.integers(1, 9 * MIB)), max_size=12)


@given(RANGES, st.integers(1, 12 * MIB), st.integers(0, MIB))
def test_dividing(pairs: list[tuple[int, int]], step: int, tail: int) -> None:
    ranges, at = [], 0
    for gap, length in pairs:
        ranges.append((at + gap, at + gap + length))
        at += gap + length
    extents = from_data_ranges(iter(ranges), at + tail)
    found = divide(extents, step)
    ends = [share.end for share in found]
    assert [share.start for share in found] == [0, *ends[:-1]]
    assert ends[-1] == at + tail
    assert all(end % PIECE == 0 for end in ends[:-1])
    for share in found:
        inside = extents.clip(share.start, share.end).data_ranges()
        assert share.data == sum(end - start for start, end in inside)
        assert share.data < step + 2 * PIECE
    assert all(share.data for share in found[:-1])
