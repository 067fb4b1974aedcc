"""`imgfs copy --dask` when something is lost on the way: a worker, the client, the scheduler."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_copy import copy, images, names, refused, same
from tests.images import fill
from tests.mounts import IMGFS, MIB
from tests.servers.dask_cluster import Cluster
from tests.servers.ports import free_port

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
long = pytest.mark.skipif(not LONG, reason="takes its time")


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose workers a test takes away."""
    cluster = Cluster(tmp_path_factory.mktemp("dask"))
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(some: Cluster) -> Iterator[Cluster]:
    """With two workers."""
    some.forget()
    while len(some.workers) < 2:
        some.worker()
    yield some


class Copying:
    """A copy under way; `events` are those that have come."""

    def __init__(self, *words: object) -> None:
        command = [*IMGFS, "copy", "--progress=json", *map(str, words)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.events: list[dict[str, Any]] = []

    def until(self, is_so: Callable[[dict[str, Any]], bool]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            if is_so(self.events[-1]):
                return
        assert self.process.stderr is not None
        raise AssertionError(self.process.stderr.read())

    def end(self, code: int = 0) -> str:
        """What it says of errors."""
        said, errors = self.process.communicate(timeout=60)
        self.events += [json.loads(line) for line in said.splitlines()]
        assert self.process.returncode == code, errors
        return errors.decode()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    @property
    def notes(self) -> list[str]:
        return [event["text"] for event in self.events if event["event"] == "note"]


@pytest.fixture
def copying() -> Iterator[Callable[..., Copying]]:
    """Begins one, which ends with the test."""
    begun: list[Copying] = []

    def begin(*words: object) -> Copying:
        begun.append(Copying(*words))
        return begun[-1]

    yield begin
    for each in begun:
        each.kill()


def is_begun(event: dict[str, Any]) -> bool:
    return event["event"] == "progress" and bool(event["done"])


def test_a_worker_in_the_middle_of_an_image(
    cluster: Cluster, tmp_path: Path, out: Path, state: Path, copying: Callable[..., Copying]
) -> None:
    image = tmp_path / "disk.img"
    fill(image, 48 * MIB)
    cluster.be_slow()
    under_way = copying("--dask", cluster.file, image, out / "a.raw", "--verify")
    under_way.until(is_begun)
    cluster.wait_for(lambda: len(cluster.shares) > 3)
    victim = next(w for w in cluster.workers if w.pid == cluster.shares[-1][0])
    cluster.end(victim)
    under_way.end()
    assert (out / "a.raw").read_bytes() == image.read_bytes()
    assert names(out) == ["a.raw"] and list(state.iterdir()) == []
    assert any("was lost" in note for note in under_way.notes)
    lost = cluster.shares_of(victim.pid)[-1]
    assert [start for _, start in cluster.shares].count(lost) == 2
    assert under_way.events[-2]["done"] == under_way.events[-2]["verified"] == 48 * MIB


def test_a_worker_in_the_middle_of_a_batch(
    cluster: Cluster, tmp_path: Path, out: Path, copying: Callable[..., Copying]
) -> None:
    made = images(tmp_path / "pool", 8)
    cluster.be_slow()
    under_way = copying("--dask", cluster.file, f"{tmp_path / 'pool'}/", out, "-O", "qcow2")
    under_way.until(lambda event: event["event"] == "done")
    cluster.end(cluster.workers[0])
    under_way.end()
    assert under_way.events[-1] == {"event": "end", "images": 8, "copied": 8, "failed": 0}
    assert names(out) == [f"disk{n}.qcow2" for n in range(8)]
    for path in made:
        same(path, out / f"{path.stem}.qcow2", "qcow2")


@long
def test_a_worker_that_a_nanny_starts_again(
    tmp_path: Path, out: Path, copying: Callable[..., Copying]
) -> None:
    cluster = Cluster(tmp_path / "dask")
    image = tmp_path / "disk.img"
    fill(image, 24 * MIB)
    cluster.be_slow()
    try:
        nanny = cluster.worker("--nanny", "--preload", str(cluster.directory / "preload.py"))
        under_way = copying("--dask", cluster.file, image, out / "a.raw")
        under_way.until(is_begun)
        os.kill(cluster.shares[-1][0], signal.SIGKILL)
        under_way.end()
        assert (out / "a.raw").read_bytes() == image.read_bytes()
        assert len({pid for pid, _ in cluster.shares}) == 2
        cluster.end(nanny, signal.SIGTERM)
    finally:
        cluster.stop()


@long
def test_a_worker_that_comes_back(
    tmp_path: Path, out: Path, copying: Callable[..., Copying]
) -> None:
    """It was thought dead, and its share given to another: it ends, and writes no more."""
    cluster = Cluster(tmp_path / "dask", DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL="5s")
    image = tmp_path / "disk.img"
    fill(image, 32 * MIB)
    cluster.be_slow()
    try:
        cluster.worker(), cluster.worker()
        under_way = copying("--dask", cluster.file, image, out / "a.raw")
        under_way.until(is_begun)
        victim = next(w for w in cluster.workers if w.pid == cluster.shares[-1][0])
        victim.send_signal(signal.SIGSTOP)
        under_way.end()
        found = (out / "a.raw").stat()
        assert (out / "a.raw").read_bytes() == image.read_bytes()
        victim.send_signal(signal.SIGCONT)
        victim.wait(60)
        after = (out / "a.raw").stat()
        assert (after.st_mtime_ns, after.st_ino) == (found.st_mtime_ns, found.st_ino)
        assert names(out) == ["a.raw"]
    finally:
        cluster.stop()


@pytest.mark.parametrize("how", [signal.SIGINT, *([signal.SIGKILL] if LONG else [])])
def test_the_client(
    cluster: Cluster,
    tmp_path: Path,
    out: Path,
    state: Path,
    how: int,
    copying: Callable[..., Copying],
) -> None:
    """Workers end what they do; and --resume goes on."""
    image = tmp_path / "disk.img"
    fill(image, 48 * MIB)
    cluster.be_slow()
    words = ("--dask", cluster.file, image, out / "a.raw")
    under_way = copying(*words)
    under_way.until(lambda event: event["event"] == "progress" and event["done"] > 12 * MIB)
    under_way.process.send_signal(how)
    assert under_way.process.wait(20) == (130 if how == signal.SIGINT else -how)
    under_way.process.communicate()
    if how == signal.SIGKILL:
        time.sleep(3)
    begun, part = len(cluster.shares), (out / "a.raw.part").stat().st_mtime_ns
    time.sleep(2)
    assert (len(cluster.shares), (out / "a.raw.part").stat().st_mtime_ns) == (begun, part)
    assert names(out) == ["a.raw.part"]
    cluster.forget()
    said = copy(*words, "--resume", "--verify").stderr
    assert " were there" in said
    assert len(cluster.shares) < 11
    assert (out / "a.raw").read_bytes() == image.read_bytes()
    assert names(out) == ["a.raw"] and list(state.iterdir()) == []


@long
def test_what_cannot_go_on_starts_again(
    cluster: Cluster, tmp_path: Path, out: Path, copying: Callable[..., Copying]
) -> None:
    image = tmp_path / "disk.img"
    fill(image, 24 * MIB)
    cluster.be_slow()
    words = ("--dask", cluster.file, image, out / "a.raw")
    under_way = copying(*words)
    under_way.until(lambda event: event["event"] == "progress" and event["done"] > 4 * MIB)
    under_way.process.send_signal(signal.SIGTERM)
    under_way.process.communicate(timeout=20)
    cluster.forget()
    (out / "a.raw.part").write_bytes(os.urandom(24 * MIB + 32))
    assert "what was written before is not there any more" in copy(*words, "--resume").stderr
    assert (out / "a.raw").read_bytes() == image.read_bytes()
    assert "nothing is left of an earlier copy" in copy(*words, "--resume").stderr


@long
def test_the_scheduler(tmp_path: Path, out: Path, copying: Callable[..., Copying]) -> None:
    cluster = Cluster(tmp_path / "dask")
    image = tmp_path / "disk.img"
    fill(image, 24 * MIB)
    cluster.be_slow()
    try:
        worker = cluster.worker()
        under_way = copying("--dask", cluster.file, image, out / "a.raw")
        under_way.until(is_begun)
        cluster.end(cluster.scheduler)
        errors = under_way.end(1)
        assert errors == "imgfs: the Dask scheduler was lost; --resume goes on\n"
        worker.wait(30)
    finally:
        cluster.stop()
    assert names(out) == ["a.raw.part"]


def test_a_source_that_changes(
    cluster: Cluster, tmp_path: Path, out: Path, state: Path, copying: Callable[..., Copying]
) -> None:
    image = tmp_path / "disk.img"
    fill(image, 24 * MIB)
    cluster.be_slow()
    under_way = copying("--dask", cluster.file, image, out / "a.raw")
    under_way.until(is_begun)
    os.utime(image)
    errors = under_way.end(1)
    assert errors.count("\n") == 1 and "changed" in errors
    assert "a.raw" not in names(out)
    assert list(state.iterdir()) == []


def test_workers_that_see_something_else(cluster: Cluster, tmp_path: Path, out: Path) -> None:
    image = tmp_path / "disk.img"
    fill(image, 48 * MIB)
    cluster.be_slow()
    hide = f'mount -t tmpfs none {shlex.quote(str(out))} && exec "$@"'
    other = cluster.worker(before=("unshare", "-m", "sh", "-c", hide, "sh"))
    assert "do all workers see that directory?" in refused(
        "--dask", cluster.file, image, out / "a.raw"
    )
    cluster.end(other)
    # Elsewhere, but as much: else the file would have another size already.
    preload = (
        "from imgfs.extents import from_data_ranges\n"
        "from imgfs.sources.local.file import FileSource\n"
        f"ranges = [({12 * MIB}, {60 * MIB})]\n"
        "async def other(self, offset, length):\n"
        "    return from_data_ranges(iter(ranges), self.size).clip(offset, offset + length)\n"
        "FileSource._extents = other\n"
    )
    os.truncate(image, 60 * MIB)
    other = cluster.worker(preload=preload)
    said = refused("--dask", cluster.file, image, out / "a.qcow2")
    assert "its holes are not told as where the copy was begun" in said
    cluster.end(other)


def test_two_at_one_place(
    cluster: Cluster, tmp_path: Path, out: Path, copying: Callable[..., Copying]
) -> None:
    image = tmp_path / "disk.img"
    fill(image, 24 * MIB)
    cluster.be_slow(60)
    under_way = copying("--dask", cluster.file, image, out / "a.raw")
    cluster.wait_for(lambda: len(cluster.shares) == 2)
    assert "another imgfs copies there" in refused("--dask", cluster.file, image, out / "a.raw")
    assert "another imgfs copies there" in refused(image, out / "a.raw")
    cluster.forget()
    under_way.end()
    assert (out / "a.raw").read_bytes() == image.read_bytes()


def test_clusters_that_cannot_be_used(tmp_path: Path, out: Path) -> None:
    image = tmp_path / "disk.img"
    fill(image, MIB)
    words = (image, out / "a.raw", "-o", "timeout=2")
    began = time.monotonic()
    nowhere = f"127.0.0.1:{free_port()}"
    assert f"{nowhere}: no Dask scheduler" in refused("--dask", nowhere, *words)
    assert "not a Dask scheduler's file" in refused("--dask", tmp_path / "no.json", *words)
    for text in ("127.0.0.1:x", "carrier-pigeon://x:1"):
        assert "not a Dask scheduler's address" in refused("--dask", text, *words)
    assert time.monotonic() - began < 60
    cluster = Cluster(tmp_path / "dask")
    try:
        before = "import imgfs; imgfs.__version__ = '0.0.9'\n"
        worker = cluster.worker(preload=before)
        said = refused("--dask", cluster.file, *words)
        assert "has imgfs 0.0.9, and the client 0.1.0; they must be the same" in said
        cluster.end(worker)
        (cluster.directory / "imgfs.py").write_text("raise ModuleNotFoundError('imgfs')\n")
        cluster.worker("--no-nanny", PYTHONPATH=str(cluster.directory))
        assert "has no imgfs" in refused("--dask", cluster.file, *words)
    finally:
        cluster.stop()
    assert names(out) == []


def test_without_dask(tmp_path: Path, out: Path) -> None:
    image = tmp_path / "disk.img"
    fill(image, MIB)
    program = (
        "import sys\n"
        "class Never:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'distributed':\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Never())\n"
        "from imgfs.cli.main import main\n"
        "main()\n"
    )
    words = [sys.executable, "-c", program, "copy", "--dask", "x", str(image), str(out / "a")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "imgfs: --dask needs dask.distributed, and distributed is not there: "
        "pip install 'imgfs[dask]'\n"
    )
