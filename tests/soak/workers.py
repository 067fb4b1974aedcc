"""What goes on in the mount meanwhile."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.fsx import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, Fsx, fallocate
from tests.soak.gate import Gate, Worker
from tests.soak.world import IMGFS, MIB, SIZE, TIMEOUT_S, Image, World, run

SHOWN = {"qcow2": "qcow2", "vmdk": "vmdk", "vdi": "vdi", "vhd": "vpc", "vhdx": "vhdx"}
MOST_SNAPSHOTS = 6
LARGEST = SIZE * 3 // 2
PATIENCE_S = 60.0
AT_FIRST = ("Connection refused", "connection closed", "Connection lost", "cannot connect")


def same(path: Path, wanted: bytes | bytearray | Path) -> None:
    """Raises AssertionError.  A format may round its disk's size up, with zeroes."""
    data = wanted.read_bytes() if isinstance(wanted, Path) else wanted
    found = path.read_bytes()
    assert len(found) >= len(data), f"{path}: {len(found)} bytes of {len(data)}"
    if found[: len(data)] != data or any(found[len(data) :]):
        at = next((i for i in range(len(data)) if found[i] != data[i]), len(data))
        raise AssertionError(f"{path}: differs at {at} of {len(data)}")


def converted(source: Path, driver: str, target: Path) -> Path:
    run("qemu-img", "convert", "-f", driver, "-O", "raw", source, target)
    return target


class Reader(Worker):
    """Compares what is only read with its reference, in all ways that a program may read it."""

    def __init__(self, world: World, images: list[Image], gate: Gate, seed: int, name: str) -> None:
        super().__init__(name, gate, seed)
        self.world, self.images = world, images
        self.temporary = world.temporary / f"{name}.out"

    def step(self) -> None:
        self.image = self.rng.choice(self.images)
        self.path = self.world.raw(self.image.name)
        few: list[Callable[[], None]] = [self.whole, self.seeks, self.shown, self.sparse]
        if self.rng.random() < 0.9:
            self.any_of(self.buffered, self.direct, self.mapped)
        else:
            self.any_of(*few)

    def settle(self) -> None:
        self.temporary.unlink(missing_ok=True)

    def _compare(self, read: Callable[[int, int], bytes], align: int) -> None:
        size = self.image.size
        with self.image.reference.open("rb") as reference:
            for _ in range(self.rng.randrange(1, 30)):
                length = self.rng.choice([1, 512, 4096, 65536, MIB])
                length = max(align, length)
                offset = self.rng.randrange(size - length + 1) // align * align
                wanted = os.pread(reference.fileno(), length, offset)
                assert read(offset, length) == wanted, f"{length} bytes at {offset}"

    def buffered(self) -> None:
        self.note(f"read {self.path}")
        with self.path.open("rb", buffering=0) as file:
            if self.rng.random() < 0.5:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._compare(lambda at, length: os.pread(file.fileno(), length, at), 1)

    def direct(self) -> None:
        self.note(f"direct {self.path}")
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)

        def read(offset: int, length: int) -> bytes:
            with mmap.mmap(-1, length) as buffer:
                assert os.preadv(fd, [buffer], offset) == length
                return buffer[:]

        try:
            self._compare(read, 4096)
        finally:
            os.close(fd)

    def mapped(self) -> None:
        self.note(f"mmap {self.path}")
        with (
            self.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content,
        ):
            self._compare(lambda at, length: content[at : at + length], 1)

    def whole(self) -> None:
        self.note(f"cp {self.path}")
        run("cp", self.path, self.temporary)
        same(self.temporary, self.image.reference)

    def seeks(self) -> None:
        self.note(f"seek {self.path}")
        data, at, size = self.image.reference.read_bytes(), 0, self.image.size
        with self.path.open("rb") as file:
            while at < size:
                try:
                    start = os.lseek(file.fileno(), at, os.SEEK_DATA)
                except OSError:
                    start = size
                assert not any(data[at:start]), f"a hole at {at}"
                at = os.lseek(file.fileno(), start, os.SEEK_HOLE) if start < size else size

    def shown(self) -> None:
        suffix = self.rng.choice(list(SHOWN))
        source = self.path.with_suffix(f".{suffix}")
        self.note(f"shown {source}")
        same(converted(source, SHOWN[suffix], self.temporary), self.image.reference)

    def sparse(self) -> None:
        source = self.path.parent / "sparse" / self.path.name
        self.note(f"sparse {source}")
        run("cp", source, self.temporary)
        same(self.temporary, self.image.sparse or self.image.reference)


class Snapshots(Worker):
    """Takes, nests, writes, renames, converts and deletes snapshots whose names begin alike."""

    def __init__(self, world: World, image: Image, gate: Gate, seed: int, name: str) -> None:
        super().__init__(name, gate, seed)
        self.world, self.image = world, image
        self.base = image.reference.read_bytes()
        self.prefix = name.rpartition(" ")[2]
        self.models: dict[tuple[str, ...], bytearray] = {}
        self.temporary = world.temporary / f"{name.replace(' ', '-')}.out"
        self.taken = 0

    def directory(self, path: tuple[str, ...]) -> Path:
        inside = "/".join(f"snapshots/{name}" for name in path)
        return self.world.point / self.image.name / inside

    def raw(self, path: tuple[str, ...]) -> Path:
        return self.directory(path) / f"{path[-1]}.raw"

    def step(self) -> None:
        actions = [self.write, self.write, self.take, self.look]
        if self.models:
            self.rng.choice([*actions, self.write, self.delete, self.rename, self.delta])()
        else:
            self.take()

    def pick(self) -> tuple[str, ...]:
        return self.rng.choice(list(self.models))

    def children(self, path: tuple[str, ...]) -> list[tuple[str, ...]]:
        return [each for each in self.models if len(each) > len(path) and each[: len(path)] == path]

    def take(self) -> None:
        if len(self.models) >= MOST_SNAPSHOTS:
            return self.delete()
        above = self.pick() if self.models and self.rng.random() < 0.7 else ()
        self.taken += 1
        path = (*above, f"{self.prefix}{self.taken}")
        self.note(f"mkdir {'/'.join(path)}")
        self.directory(path).mkdir()
        self.models[path] = bytearray(self.models[above] if above else self.base)
        return None

    def delete(self) -> None:
        leaves = [path for path in self.models if not self.children(path)]
        self.remove(self.rng.choice(leaves))

    def remove(self, path: tuple[str, ...]) -> None:
        """The kernel tells of a close after it returned: until then its directory is busy."""
        self.note(f"rmdir {'/'.join(path)}")
        deadline = time.monotonic() + 10
        while True:
            try:
                self.directory(path).rmdir()
                break
            except OSError as exc:
                if exc.errno != 16 or time.monotonic() > deadline:  # EBUSY
                    raise
            time.sleep(0.05)
        del self.models[path]

    def rename(self) -> None:
        path = self.pick()
        self.taken += 1
        fresh = (*path[:-1], f"{self.prefix}{self.taken}")
        self.note(f"mv {'/'.join(path)} {fresh[-1]}")
        self.directory(path).rename(self.directory(fresh))
        for each in [path, *self.children(path)]:
            self.models[(*fresh, *each[len(path) :])] = self.models.pop(each)

    def write(self) -> None:
        if not self.models:
            return
        path = self.pick()
        self.note(f"write {'/'.join(path)}")
        fsx = Fsx(self.raw(path), self.rng.randrange(1 << 30))
        assert fsx.model == self.models[path], "it is not what was written before"
        fsx.run(self.rng.randrange(10, 150))
        if not SIZE // 2 < len(fsx.model) < LARGEST:
            os.truncate(self.raw(path), SIZE)
            fsx.model[:] = fsx.model[:SIZE].ljust(SIZE, b"\0")
        self.models[path] = fsx.model

    def look(self) -> None:
        if not self.models:
            return
        path = self.pick()
        suffix = self.rng.choice(list(SHOWN))
        source = self.directory(path) / self.rng.choice(["", "sparse"]) / f"{path[-1]}.{suffix}"
        self.note(f"look {source}")
        run("sync", self.raw(path))
        same(converted(source, SHOWN[suffix], self.temporary), self.models[path])

    def delta(self) -> None:
        path = self.pick()
        source = self.directory(path) / f"{path[-1]}.delta.qcow2"
        self.note(f"delta {source}")
        run("sync", self.raw(path))
        run("cp", source, self.temporary)
        backing = ["-F", "raw", "-b", self.image.reference]
        run("qemu-img", "rebase", "-u", "-f", "qcow2", *backing, self.temporary)
        whole = self.temporary.with_suffix(".whole")
        same(converted(self.temporary, "qcow2", whole), self.models[path])
        whole.unlink()

    def check(self) -> None:
        """All of it, as a program sees it that has nothing in the page cache."""
        for path, model in self.models.items():
            with self.raw(path).open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                found = file.read()
            assert found == model, "/".join(path)

    def settle(self) -> None:
        self.temporary.unlink(missing_ok=True)
        self.check()
        if self.gate.keeps:
            return
        for path in sorted(self.models, key=len, reverse=True):
            self.remove(path)


class Through(Worker):
    """Writes through to a source whose server comes and goes.

    What an fsync that failed may have lost is written again, as a careful program does.
    """

    def __init__(self, world: World, image: Image, gate: Gate, seed: int, name: str) -> None:
        super().__init__(name, gate, seed)
        self.world, self.image = world, image
        self.path = world.raw(image.name)
        self.model = bytearray(image.reference.read_bytes())
        self.unsynced: list[tuple[int, int]] = []
        self.fd = -1
        self.failed = 0

    def step(self) -> None:
        if self.fd < 0:
            self.note("open")
            self.fd = os.open(self.path, os.O_RDWR)
        length = int(self.rng.choice((100, 512, 4096, 70_000, 1_000_000)) * self.rng.random()) + 1
        offset = self.rng.randrange(len(self.model) - length)
        offset -= offset % self.rng.choice((1, 512, 4096))
        if self.rng.random() < 0.5:
            self.read(offset, length)
        elif self.rng.random() < 0.9:
            self.write(offset, length)
        else:
            self.sync()
            if self.rng.random() < 0.3:
                self.close()
        self.gate.sleep(self.rng.random() * 0.05)

    def write(self, offset: int, length: int) -> None:
        self.note(f"write {offset} {length}")
        kind = self.rng.random()
        data = self.rng.randbytes(length) if kind < 0.8 else bytes(length)
        self.model[offset : offset + length] = data
        self.unsynced.append((offset, length))
        try:
            if kind < 0.9:
                assert os.pwrite(self.fd, data, offset) == length
            else:
                mode = PUNCH_HOLE if kind < 0.95 else ZERO_RANGE
                fallocate(self.fd, mode | KEEP_SIZE, offset, length)
        except OSError as exc:
            self.again(exc)

    def read(self, offset: int, length: int) -> None:
        self.note(f"read {offset} {length}")
        wanted = self.model[offset : offset + length]
        try:
            if os.pread(self.fd, length, offset) == wanted:
                return
            assert any(o < offset + length and offset < o + n for o, n in self.unsynced)
            os.fsync(self.fd)
        except OSError as exc:
            self.again(exc)
        found = os.pread(self.fd, length, offset)
        assert found == wanted, f"other bytes at {offset}, and no fsync said so"

    def sync(self) -> None:
        self.note("fsync")
        try:
            os.fsync(self.fd)
            self.unsynced.clear()
        except OSError as exc:
            self.again(exc)

    def again(self, why: OSError) -> None:
        """Write anew all that is not known to be durable."""
        self.failed += 1
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self.note(f"again {why}")
            try:
                if self.fd >= 0:
                    fd, self.fd = self.fd, -1
                    os.close(fd)
            except OSError:
                pass  # of what was known to have failed
            try:
                self.fd = os.open(self.path, os.O_RDWR)
                for offset, length in self.unsynced:
                    os.pwrite(self.fd, self.model[offset : offset + length], offset)
                os.fsync(self.fd)
                self.unsynced.clear()
                return
            except OSError as exc:
                if time.monotonic() > deadline:
                    raise
                why = exc
            time.sleep(0.3)

    def close(self) -> None:
        if self.fd < 0:
            return
        fd, self.fd = self.fd, -1
        try:
            os.close(fd)
            self.unsynced.clear()
        except OSError as exc:
            self.again(exc)

    def settle(self) -> None:
        if self.fd >= 0:
            self.sync()
            self.close()
        if self.fd >= 0:  # opened again for what had failed
            self.close()
        same(self.path, self.model)
        same(self.world.far_file(self.image.name), self.model)


class Copier(Worker):
    """Copies images out of their sources, and out of the mount, in turn interrupted."""

    def __init__(self, world: World, images: list[Image], gate: Gate, seed: int) -> None:
        super().__init__("copies", gate, seed)
        self.world, self.images = world, images
        self.out = world.temporary / "copies"

    def step(self) -> None:
        image = self.rng.choice(self.images)
        driver = self.rng.choice(["raw", *SHOWN.values()])
        suffix = {"vpc": "vhd"}.get(driver, driver)
        self.out.mkdir(exist_ok=True)
        target = self.out / f"copy.{suffix}"
        source = image.url if self.rng.random() < 0.7 else str(self.world.raw(image.name))
        words = [*IMGFS, "copy", "--no-progress", source, target]
        words += ["-o", image.options] if source == image.url else []
        self.note(f"copy {source} {target}")
        if self.rng.random() < 0.3:
            self.note(f"interrupted {source} {target}")
            process = subprocess.Popen([str(w) for w in words], stderr=subprocess.DEVNULL)
            time.sleep(self.rng.uniform(0.3, 2.5))
            process.send_signal(self.rng.choice([signal.SIGKILL, signal.SIGTERM]))
            process.wait(30)
        if not target.exists():
            self.copy(words)
        if driver == "raw":
            same(target, image.reference)
        else:
            same(converted(target, driver, self.out / "whole"), image.reference)
        for path in self.out.iterdir():
            path.unlink()
        self.gate.sleep(self.rng.random() * 2)

    def copy(self, words: list[object]) -> None:
        """A server that is away when it is asked for the first time is an error, later not."""
        for _ in range(10):
            self.note("resumed")
            try:
                run(*words, "--resume", timeout=2 * TIMEOUT_S)
                return
            except subprocess.CalledProcessError as exc:
                if not any(word in exc.output for word in AT_FIRST):
                    raise
            time.sleep(1)
        raise AssertionError("the server never came back")

    def settle(self) -> None:
        if self.out.exists():
            assert not list(self.out.iterdir())
            self.out.rmdir()


class Chaos(Worker):
    """Restarts, kills and stops servers; ends readers; has the mount's file read again."""

    def __init__(self, world: World, gate: Gate, seed: int, every_s: float) -> None:
        super().__init__("chaos", gate, seed)
        self.world, self.every_s = world, every_s

    def step(self) -> None:
        self.gate.sleep(self.rng.uniform(0.5, 1.5) * self.every_s)
        if self.gate.is_closed:
            return
        self.any_of(
            self.restart, self.restart, self.restart, self.stall, self.stall, self.kill_sessions,
            self.kill_reader, self.reload, self.check_cache, self.status,
        )  # fmt: skip

    def restart(self) -> None:
        self.away("restart", ["sshd", "nbd", "export", "nginx"])

    def stall(self) -> None:
        self.away("stall", ["sshd", "nbd", "export"])

    def away(self, how: str, names: list[str]) -> None:
        name = self.rng.choice(names)
        self.note(f"{how}-{name}")
        self.world.servers.call(how, name, self.rng.choice([0, 0.2, 1, 4]))

    def kill_sessions(self) -> None:
        self.note("sessions-killed")
        self.world.servers.call("kill_sessions")

    def kill_reader(self) -> None:
        name = self.rng.choice(["far", "web", "nbd", "here"])
        self.note(f"reader-killed {name}")
        words = ["dd", f"if={self.world.raw(name)}", "of=/dev/null", "bs=1M", "iflag=direct"]
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        time.sleep(self.rng.uniform(0, 0.1))
        process.kill()
        process.wait(20)

    def reload(self) -> None:
        self.note("SIGHUP")
        os.kill(self.world.pid, signal.SIGHUP)

    def check_cache(self) -> None:
        self.note("cache-check")
        run(*IMGFS, "cache", "list")
        run(*IMGFS, "cache", "check")

    def status(self) -> None:
        self.note("status")
        for name in ("status.json", "metrics"):
            assert (self.world.point / ".imgfs" / name).read_bytes()
        (self.world.point / "far/extents.json").read_bytes()


def all_workers(world: World, gate: Gate, seed: int, every_s: float) -> list[Worker]:
    images = world.images
    fixed = [images[name] for name in ("here", "far", "web", "nbd")]
    found: list[Worker] = [Reader(world, fixed, gate, seed, f"reader-{n}") for n in (1, 2)]
    for name in ("here", "far", "nbd"):
        for prefix in ("a", "b"):
            found.append(
                Snapshots(world, images[name], gate, seed, f"snapshots of {name} {prefix}")
            )
    for name in ("through", "export"):
        found.append(Through(world, images[name], gate, seed, f"writes to {name}"))
    found.append(Copier(world, fixed, gate, seed))
    found.append(Chaos(world, gate, seed, every_s))
    random.Random(seed).shuffle(found)
    return found
