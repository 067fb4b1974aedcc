"""Random operations on all that a mount lets be written: by fsx, by fio and by hypothesis."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.fsx import Fsx
from tests.mounts import MIB, Mount, imgfs
from tests.servers.nbd import QemuNbd
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]
LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
KINDS = ("snapshot", "child", "file", "ssh", "nbd")  # the last three: write=through

pytestmark = pytest.mark.timeout(36000 if LONG else 120)


class Writable:
    """An image behind a mount, and in it, at `path`, what can be written.

    `source` is where that ends up when it is not a snapshot.
    """

    def __init__(self, mount: Mounter, kind: str, image: Path, url: str, *options: str) -> None:
        self.mount = mount
        self.words = (url, "-o", ",".join(options)) if options else (url,)
        self.mounted = mount(*self.words)
        self.source = None if kind in ("snapshot", "child") else image
        self.resizes = kind != "nbd"
        self.original = image.read_bytes()
        self.inside = Path("disk.raw")
        self._is_child = kind == "child"
        self._taken = 0

    @property
    def path(self) -> Path:
        return self.mounted.point / self.inside

    @property
    def other(self) -> Path | None:
        """A file of the mount that stays as it is."""
        return self.mounted.point / "disk.raw" if self.source is None else None

    def renew(self) -> None:
        """The file has its original content again."""
        if self.source is not None:
            with self.path.open("r+b") as file:
                if self.resizes:
                    file.truncate(0)
                file.write(self.original)
            return
        self._taken += 1
        name = f"x{self._taken}"
        self.inside = Path("snapshots", name, f"{name}.raw")
        self.path.parent.mkdir()
        if self._is_child:
            with self.path.open("r+b") as file:
                file.write(self.original[::-1])
            self.take_child(("child",))
            with self.path.open(
                "r+b"
            ) as parent:  # to be written over, which the child does not see
                parent.write(bytes(len(self.original)))
            self.inside = self.inside.parent / "snapshots/child/child.raw"
            with self.path.open("r+b") as file:
                file.write(self.original)

    def take_child(self, names: tuple[str, ...]) -> Path:
        """The file of a new snapshot of the snapshot."""
        directory = self.path.parent.joinpath("snapshots", *names)
        directory.mkdir()
        return directory / f"{names[-1]}.raw"

    def remount(self) -> None:
        assert imgfs("umount", self.mounted.point, timeout=60).returncode == 0
        self.mounted = self.mount(*self.words)


@pytest.fixture
def writable(
    request: pytest.FixtureRequest, mount: Mounter, sshd: Sshd, tmp_path: Path
) -> Iterator[Writable]:
    kind = request.param
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(MIB if kind == "nbd" else MIB + 777))
    if kind in ("snapshot", "child"):
        yield Writable(mount, kind, image, str(image))
    elif kind == "file":
        yield Writable(mount, kind, image, str(image), "write=through")
    elif kind == "ssh":
        yield Writable(mount, kind, image, sshd.url(image), sshd.options, "write=through")
    else:
        server = QemuNbd(tmp_path / "nbd", "-f", "raw", "--discard=unmap", image, write=True)
        try:
            yield Writable(mount, kind, image, server.url(), "write=through")
        finally:
            server.stop()


@pytest.mark.parametrize("writable", KINDS, indirect=True)
def test_fsx(writable: Writable) -> None:
    writable.renew()
    for seed in range(20 if LONG else 1):
        fsx = Fsx(writable.path, seed, resizes=writable.resizes, other=writable.other)
        fsx.run(50_000 if LONG else 500)
        writable.remount()
        assert writable.path.read_bytes() == fsx.model, seed
        if writable.source is not None:
            assert writable.source.read_bytes() == fsx.model, seed
        print(f"fsx: seed {seed} done", flush=True)


HOWS = (
    ("--ioengine=libaio", "--direct=1", "--iodepth=16", "--bs=4k"),
    ("--ioengine=psync", "--bsrange=512-20k", "--fsync=32"),
    ("--ioengine=mmap", "--bs=4k", "--fsync=64"),
)


@pytest.mark.parametrize("writable", KINDS if LONG else ("child", "ssh"), indirect=True)
def test_fio_verifies(writable: Writable) -> None:
    writable.renew()

    def fio(seed: int, *words: str) -> None:
        command = ["fio", "--name=x", f"--filename={writable.path}", f"--size={MIB}", *words]
        command += ["--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", f"--randseed={seed}"]
        command += ["--verify_state_save=0"]  # it would go to the working directory
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    for seed in range(300 if LONG else 3):
        how = HOWS[seed % 3]
        fio(seed, *how, "--end_fsync=1")
        if seed % 30 == 1:
            writable.remount()
        fio(seed, *how, "--verify_only")


class Machine(RuleBasedStateMachine):
    """What one program does with the file, and what else happens, against bytes in memory."""

    writable: Writable

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Path, bytes]] = []

    @initialize()
    def start(self) -> None:
        self.writable.renew()
        writable = self.writable
        self.fsx = Fsx(writable.path, 0, resizes=writable.resizes, other=writable.other)

    @rule(
        what=st.sampled_from(
            ["read", "write", "direct", "copy", "map_read", "map_write", "punch", "zero"]
        ),
        start=st.integers(0, 5000).flatmap(lambda at: st.sampled_from([at, at * 512, at * 4096])),
        length=st.integers(1, 9000) | st.sampled_from([512, 4096, 8192, 65536, 300_000]),
    )
    def change(self, what: str, start: int, length: int) -> None:
        size = len(self.fsx.model)
        if size == 0:
            return
        start %= size
        getattr(self.fsx, what)(start, min(length, size - start))

    @precondition(lambda self: self.writable.source is None)
    @rule(
        start=st.integers(0, 2 * MIB) | st.integers(0, 512).map(lambda n: n * 4096),
        length=st.integers(1, 9000) | st.sampled_from([4096, 65536, 2 * MIB]),
    )
    def copy_from_the_base(self, start: int, length: int) -> None:
        self.fsx.copy_from_other(start, length)

    @precondition(lambda self: self.writable.resizes)
    @rule(size=st.integers(0, 2 * MIB) | st.integers(0, 512).map(lambda n: n * 4096))
    def truncate(self, size: int) -> None:
        self.fsx.truncate(size)

    @precondition(lambda self: self.writable.resizes)
    @rule(beyond=st.integers(0, 10_000), length=st.integers(1, 10_000))
    def write_behind_the_end(self, beyond: int, length: int) -> None:
        self.fsx.model += bytes(beyond)
        self.fsx.write(len(self.fsx.model), length)

    @rule()
    def sync(self) -> None:
        self.fsx.sync()

    @rule()
    def drop_what_the_kernel_has(self) -> None:
        self.fsx.sync()
        os.posix_fadvise(self.fsx.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    @rule()
    def seek(self) -> None:
        if self.fsx.model:
            self.fsx.seek()

    @rule()
    def reopen(self) -> None:
        self.fsx.reopen()

    @rule()
    def remount(self) -> None:
        os.close(self.fsx.fd)
        self.writable.remount()
        self.fsx.path, self.fsx.other = self.writable.path, self.writable.other
        self.fsx.fd = os.open(self.fsx.path, os.O_RDWR)
        inside = [(self.writable.mounted.point / path, data) for path, data in self.kept]
        for path, data in inside:
            assert path.read_bytes() == data, path
        if self.writable.source is not None:
            assert self.writable.source.read_bytes() == self.fsx.model

    @precondition(lambda self: self.writable.source is None and len(self.kept) < 3)
    @rule()
    def take_a_child(self) -> None:
        """Which stays as it is."""
        name = f"c{len(self.kept)}"
        child = self.writable.take_child((name,))
        assert child.read_bytes() == self.fsx.model
        self.kept.append((child.relative_to(self.writable.mounted.point), bytes(self.fsx.model)))

    @precondition(lambda self: self.writable.source is None)
    @rule()
    def look_at_the_other_views(self) -> None:
        """Another file of the snapshot shows what was synced."""
        self.fsx.sync()
        path = self.writable.path
        if self.fsx.model:
            assert (path.parent / "sparse" / path.name).read_bytes() == self.fsx.model

    @invariant()
    def has_its_size(self) -> None:
        assert os.fstat(self.fsx.fd).st_size == len(self.fsx.model)

    def teardown(self) -> None:
        self.fsx.end()


@pytest.mark.parametrize("writable", KINDS if LONG else ("child", "file", "ssh"), indirect=True)
def test_anything_in_any_order(writable: Writable) -> None:
    Machine.writable = writable
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=300 if LONG else 2,
            stateful_step_count=60 if LONG else 25,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # to shrink takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
