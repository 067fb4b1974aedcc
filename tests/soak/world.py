"""What a soak runs on: servers, images of all kinds behind them, and one mount of all of these."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.images import scatter
from tests.soak.servers import ServersProcess

MIB = 1 << 20
SIZE = 24 * MIB
DATA = 10 * MIB
CACHE = 32 * MIB
TIMEOUT_S = 60
IMGFS = [sys.executable, "-m", "imgfs.cli.main"]


def run(*words: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Raises CalledProcessError, with what was said in its notes: where it hung, too."""
    command = [str(word) for word in words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        said, _ = process.communicate()
    if process.returncode:
        error = subprocess.CalledProcessError(process.returncode, command, said)
        error.add_note(said)
        raise error
    return subprocess.CompletedProcess(command, 0, said)


@dataclass(frozen=True)
class Image:
    """`reference` has the bytes that NAME.raw has, for as long as nobody writes through."""

    name: str
    url: str
    reference: Path
    sparse: Path | None = None  #: what sparse/NAME.raw must have
    options: str = ""  #: for a command that uses the source without the mount

    @property
    def size(self) -> int:
        return self.reference.stat().st_size


class World:
    """Everything is below `work`, and taken down by `close`."""

    def __init__(self, work: Path, limits: Sequence[str] = ()) -> None:
        """`limits` are words before the command that mounts; see `limited`."""
        self.work = work
        self.limits = limits
        self.point = work / "mount"
        self.state, self.cache, self.temporary = (work / n for n in ("state", "cache", "tmp"))
        for name in ("mount", "tmp", "www", "far", "reference"):
            (work / name).mkdir()
        os.environ["XDG_STATE_HOME"] = str(self.state)
        os.environ["XDG_CACHE_HOME"] = str(self.cache)
        os.environ["TMPDIR"] = str(self.temporary)
        os.environ["PYTHONFAULTHANDLER"] = "1"
        for name in ("STATE_DIRECTORY", "CACHE_DIRECTORY"):
            os.environ.pop(name, None)
        self._make_files()
        self.servers = ServersProcess(work)
        self.images = self._images(self.servers.call("urls"))
        self._write_toml()
        self.process: subprocess.Popen[bytes] | None = None

    def _make_files(self) -> None:
        far = self.work / "far"
        names = {"here": self.work / "here.qcow2", "web": self.work / "www/web.img"}
        names |= {name: far / f"{name}.img" for name in ("far", "nbd", "through", "export")}
        for seed, name in enumerate(("far", "nbd", "through", "export", "here")):
            reference = self.work / "reference" / name
            scatter(reference, SIZE, DATA, seed)
            if name == "here":
                run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", reference, names[name])
            else:
                run("cp", reference, names[name])
        self._make_filesystem(names["web"])
        run("cp", names["web"], self.work / "reference/web")
        run(*IMGFS, "copy", "--no-progress", "--sparse", names["web"], self.work / "reference/free")
        run("e2fsck", "-fn", self.work / "reference/free")
        os.sync()

    def _make_filesystem(self, image: Path) -> None:
        """With what was there before in its free space."""
        image.write_bytes(random.Random(9).randbytes(SIZE))
        content = self.work / "content"
        content.mkdir()
        for number in range(20):
            (content / f"file {number}").write_bytes(os.urandom(300_000))
        run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", "-d", content, image)

    @property
    def login(self) -> dict[str, Path]:
        return {"known_hosts": self.work / "sshd/known", "key": self.work / "sshd/user"}

    def _images(self, urls: dict[str, str]) -> dict[str, Image]:
        reference = self.work / "reference"
        ssh = ",".join(f"{name}={path}" for name, path in self.login.items())
        options = {"far": ssh, "through": ssh, "nbd": "identity=soak", "export": "identity=export"}
        return {
            name: Image(
                name,
                url,
                reference / name,
                reference / "free" if name == "web" else None,
                ",".join([f"timeout={TIMEOUT_S}", *filter(None, [options.get(name)])]),
            )
            for name, url in urls.items()
        }

    def _write_toml(self) -> None:
        more = {
            "far": "hard = true",
            "nbd": 'identity = "soak"',
            "export": 'identity = "export"\nwrite = "through"',
            "through": 'write = "through"',
        }
        tables = [
            f'[images.{name}]\nsource = "{image.url}"\n{more.get(name, "")}\n'
            for name, image in self.images.items()
        ]
        login = "".join(f'{name} = "{path}"\n' for name, path in self.login.items())
        defaults = f"[defaults]\ntimeout = {TIMEOUT_S}\n{login}"
        (self.work / "images.toml").write_text("\n".join([defaults, *tables]))

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def raw(self, name: str) -> Path:
        return self.point / name / f"{name}.raw"

    def mount(self) -> None:
        with (self.work / "log").open("ab") as log:
            words = [self.work / "images.toml", self.point, "-f", "-o", f"cache_size={CACHE}"]
            command = [*self.limits, *IMGFS, "mount", "-v", *map(str, words)]
            self.process = subprocess.Popen(command, stderr=log, stdout=log)
        deadline = time.monotonic() + 30
        while not self.point.is_mount():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.work / "log").read_text())
            time.sleep(0.05)
        # Who asks for an image for the first time while its server is away is told so.
        for name in self.images:
            assert self.raw(name).stat().st_size == SIZE

    def umount(self) -> None:
        assert self.process is not None
        run(*IMGFS, "umount", self.point)
        if self.process.wait(30):
            raise RuntimeError(f"the mount ended with {self.process.returncode}")
        self.process = None

    def far_file(self, name: str) -> Path:
        """Where the source of an image behind a server is."""
        return self.work / "far" / f"{name}.img"

    def layers(self) -> list[Path]:
        """What is kept of snapshots."""
        return list(self.state.glob("imgfs/*/layers/*"))

    def close(self) -> None:
        if self.process is not None:
            # If it is ending, it may say why.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(3 * TIMEOUT_S)
            print(f"the mount's process: {self.process.returncode}", flush=True)
            subprocess.run(["fusermount3", "-uzq", self.point], check=False)
            self.process.kill()
            self.process.wait()
        self.servers.close()


@contextlib.contextmanager
def world(work: Path, limits: Sequence[str] = ()) -> Iterator[World]:
    built = World(work, limits)
    try:
        yield built
    finally:
        built.close()


@contextlib.contextmanager
def limited(memory: int | None, descriptors: int | None) -> Iterator[list[str]]:
    """Words that begin a command in a process of so many bytes, page cache included, and files.

    The memory is a control group's, of version 1 or 2.
    """
    words = [] if descriptors is None else ["prlimit", f"--nofile={descriptors}:{descriptors}"]
    if memory is None:
        yield words
        return
    old = Path("/sys/fs/cgroup/memory")
    group = (old if old.is_dir() else old.parent) / f"imgfs-soak-{os.getpid()}"
    group.mkdir()
    try:
        limit = "memory.limit_in_bytes" if old.is_dir() else "memory.max"
        (group / limit).write_text(str(memory))
        join = f'echo $$ >{group}/cgroup.procs; exec "$@"'
        yield ["sh", "-c", join, "sh", *words]
    finally:
        with contextlib.suppress(OSError):  # a process that did not end is told of elsewhere
            group.rmdir()
