"""qemu on the mount's files: every cache mode and way of I/O, and its block jobs.

With cache=none qemu 7.2 aborts, and a virtual machine with it, at a hole whose edge is not a
multiple of 4096 bytes.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.formats import qemu
from tests.mounts import MIB, Mount

from .qmp import Qemu

pytestmark = pytest.mark.timeout(600)
Mounter = Callable[..., Mount]
LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CACHES = {
    "none": (True, False),
    "directsync": (True, False),
    "writeback": (False, False),
    "writethrough": (False, False),
    "unsafe": (False, True),
}
AIOS = ("threads", "native", "io_uring")
#: With these qemu 7.2 never ends at a last sector that is not whole, wherever the file is.
HANGS = [("io_uring", cache) for cache, (direct, _) in CACHES.items() if not direct]


@dataclass
class File:
    path: Path
    kind: str = "raw"

    def __str__(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"


def run(*words: object) -> None:
    command = [str(word) for word in words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=90, env={**os.environ, "PATH": PATH}
    )
    assert done.returncode == 0, (command, done.stderr)


def has(aio: str) -> bool:
    """Can this qemu, on this kernel, do it?"""
    opened = subprocess.run(
        ["qemu-io", "-r", "-i", aio, "-n", "-f", "raw", "-c", "quit", "/usr/bin/env"],
        capture_output=True,
        timeout=60,
    )
    return opened.returncode == 0


@pytest.fixture(scope="module")
def ways() -> list[str]:
    return [aio for aio in AIOS if has(aio)]


@pytest.fixture
def files(mount: Mounter, tmp_path: Path) -> dict[str, File]:
    """Files whose holes have odd edges, by what makes them odd."""
    made = tmp_path / "made"
    made.mkdir()
    vhd, mbr, ext, odd = (made / name for name in ("v.vhd", "mbr.img", "ext.img", "odd.img"))
    qemu.img("create", "-q", "-f", "vpc", "-o", "force_size=on", vhd, "16M")
    qemu.io(vhd, "vpc", "write -P 5 2097664 512", "write -P 6 10M 1536", "write -P 7 0 1k")
    with mbr.open("wb") as file:
        file.truncate(32 * MIB)
    table = "label: dos\nstart=63,size=50000,type=83\n"
    subprocess.run(["sfdisk", "-q", mbr], input=table.encode(), check=True, env={"PATH": PATH})
    rng = random.Random(1)
    with mbr.open("r+b") as file:
        for at in (100, 300, 301, 5000):
            file.seek(at * 4096)
            file.write(rng.randbytes(3 * 4096))
    with ext.open("wb") as file:
        file.truncate(32 * MIB)
    run("mkfs.ext4", "-q", "-F", "-b", "1024", ext)
    with odd.open("wb") as file:
        file.truncate(5 * MIB + 1000)
        for at in (0, 70_000, 3 * MIB + 512, 5 * MIB):
            file.seek(at)
            file.write(rng.randbytes(777))
    points = {path.stem: mount(path).point for path in (vhd, mbr, ext, odd)}
    for name in ("v", "odd"):
        (points[name] / "snapshots/x").mkdir()
    return {
        "vhd": File(points["v"] / "v.raw"),
        "snapshot": File(points["v"] / "snapshots/x/x.raw"),
        "odd snapshot": File(points["odd"] / "snapshots/x/x.raw"),
        "partition": File(points["mbr"] / "partitions/1.raw"),
        "sparse": File(points["ext"] / "sparse/ext.raw"),
        "odd": File(points["odd"] / "odd.raw"),
        "original": File(points["v"] / "original/v.vhd"),
        **{
            f"odd {kind}": File(points["odd"] / f"odd.{kind}", {"vhd": "vpc"}.get(kind, kind))
            for kind in ("qcow2", "vmdk", "vdi", "vhd", "vhdx")
        },
        "sparse qcow2": File(points["ext"] / "sparse/ext.qcow2", "qcow2"),
    }


def contents(file: File, scratch: Path) -> bytes:
    """What the file, or the disk in it, holds: by way of a plain copy."""
    copy = scratch / f"copy.{file.kind}"
    shutil.copyfile(file.path, copy)
    return copy.read_bytes() if file.kind == "raw" else qemu.raw(copy, file.kind)


def padded(content: bytes) -> bytes:
    """qemu's disks are whole sectors."""
    return content + bytes(-len(content) % 512)


def walked(path: Path) -> None:
    """Holes have aligned edges, are zeroes, and st_blocks says that there are some."""
    content, size = path.read_bytes(), path.stat().st_size
    assert len(content) == size
    fd = os.open(path, os.O_RDONLY)
    try:
        at, data = 0, 0
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                start = size
            assert not any(content[at:start])
            if start == size:
                break
            end = os.lseek(fd, start, os.SEEK_HOLE)
            assert start % 4096 == 0 and (end % 4096 == 0 or end == size)
            data += end - start
            at = end
    finally:
        os.close(fd)
    if data < size:
        assert path.stat().st_blocks * 512 < size


def test_holes_of_every_file(files: dict[str, File]) -> None:
    for file in files.values():
        walked(file.path)


def test_past_the_page_cache(files: dict[str, File], tmp_path: Path) -> None:
    out = tmp_path / "out.raw"
    for name, file in files.items():
        wanted = contents(file, tmp_path)
        qemu.img("convert", "-T", "none", "-f", file.kind, "-O", "raw", file.path, out)
        assert out.read_bytes() == padded(wanted), name
        out.unlink()
        direct = f"driver={file.kind},file.driver=file,file.filename={file.path}"
        qemu.img("map", "--output=json", "--image-opts", f"{direct},file.cache.direct=on")
        again = tmp_path / "again.raw"
        again.write_bytes(wanted)
        qemu.img("compare", "-T", "none", "-f", file.kind, "-F", "raw", file.path, again)


@pytest.mark.parametrize("tool", ["cp", "qemu-img", "tar", "rsync"])
def test_copies_keep_the_holes(files: dict[str, File], tmp_path: Path, tool: str) -> None:
    for name in ("vhd", "snapshot", "partition", "sparse", "odd"):
        file = files[name].path
        copy = tmp_path / "copy" / file.name
        copy.parent.mkdir(exist_ok=True)
        if tool == "cp":
            run("cp", "--sparse=auto", file, copy)
        elif tool == "qemu-img":
            run("qemu-img", "convert", "-f", "raw", "-O", "raw", file, copy)
        elif tool == "tar":
            run("tar", "-C", file.parent, "-Scf", tmp_path / "tar", file.name)
            run("tar", "-C", copy.parent, "-Sxf", tmp_path / "tar")
        else:
            run("rsync", "-S", file, copy)
        wanted = file.read_bytes()
        found = copy.read_bytes()
        assert found == (padded(wanted) if tool == "qemu-img" else wanted), name
        assert copy.stat().st_blocks * 512 < len(wanted), name


def options(file: File, cache: str, aio: str) -> str:
    direct, unflushed = CACHES[cache]
    words = [f"driver={file.kind},file.driver=file,file.filename={file.path},file.aio={aio}"]
    words += [f"cache.direct={'on' if direct else 'off'}"]
    words += [f"cache.no-flush={'on' if unflushed else 'off'}"]
    return ",".join(words)


def product(ways: list[str]) -> list[tuple[str, str]]:
    """Cache modes and ways of I/O; native needs O_DIRECT."""
    found = [
        (cache, aio)
        for cache, aio in itertools.product(CACHES, ways)
        if aio != "native" or CACHES[cache][0]
    ]
    return found if LONG else found[::3]


def test_reading_in_every_mode(files: dict[str, File], ways: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.raw"
    names = files if LONG else ("vhd", "odd", "snapshot", "sparse", "odd qcow2")
    for name in names:
        wanted = padded(contents(files[name], tmp_path))
        for cache, aio in product(ways):
            if files[name].path.stat().st_size % 512 and (aio, cache) in HANGS:
                continue
            qemu.img(
                "convert", "-T", cache, "-O", "raw", "--image-opts",
                options(files[name], cache, aio), out,
            )  # fmt: skip
            assert out.read_bytes() == wanted, (name, cache, aio)
            out.unlink()


def test_writing_in_every_mode(files: dict[str, File], ways: list[str], tmp_path: Path) -> None:
    """Over a snapshot, odd ranges and zeroes; then a whole disk with holes of its own."""
    rng = random.Random(2)
    file = files["snapshot"]
    model = bytearray(contents(file, tmp_path))
    for cache, aio in product(ways):
        commands = []
        for _ in range(12):
            length = 512 * rng.randint(1, 400)
            at = 512 * rng.randrange((len(model) - length) // 512)
            byte = rng.randrange(256)
            commands += ["-c", f"write {'-z -u' if not byte % 4 else f'-P {byte}'} {at} {length}"]
            model[at : at + length] = bytes([byte if byte % 4 else 0]) * length
        run("qemu-io", "-t", cache, "--image-opts", *commands, options(file, cache, aio))
        assert file.path.read_bytes() == model, (cache, aio)
        walked(file.path)
        disk = tmp_path / "disk.raw"
        qemu.img("create", "-q", "-f", "raw", disk, str(len(model)))
        qemu.io(disk, "raw", *qemu.scribble(rng, len(model), 8))
        qemu.img(
            "convert", "-n", "-t", cache, "-T", "none", "-f", "raw", disk,
            "--target-image-opts", options(file, cache, aio),
        )  # fmt: skip
        model[:] = disk.read_bytes()
        assert file.path.read_bytes() == model, (cache, aio)
        walked(file.path)


DIRECT = {"direct": True, "no-flush": False}


def node(name: str, path: Path, *, read_only: bool = False) -> dict[str, object]:
    file = {"driver": "file", "filename": str(path), "cache": DIRECT}
    return {"driver": "raw", "node_name": name, "read_only": read_only, "file": file}


@pytest.mark.parametrize(
    "job", ["drive-backup", "drive-mirror", "blockdev-backup", "blockdev-mirror"]
)
def test_jobs_that_copy(files: dict[str, File], tmp_path: Path, job: str) -> None:
    """From the mount, as the disk of a virtual machine with cache=none, and to it."""
    completes = job.endswith("mirror")
    source, target = files["snapshot"].path, tmp_path / "target.raw"
    wanted = source.read_bytes()
    names = ["snapshot", *(["vhd", "partition", "sparse", "odd"] if LONG else ["partition"])]
    with Qemu(tmp_path) as vm:
        for number, name in enumerate(names):
            source = files[name].path
            wanted = source.read_bytes()
            with target.open("wb") as file:
                file.truncate(len(padded(wanted)))
            vm.do("blockdev-add", **node(f"s{number}", source, read_only=name != "snapshot"))
            words: dict[str, object] = {"job_id": f"j{number}", "device": f"s{number}"}
            if job.startswith("drive"):
                words |= {"target": str(target), "format": "raw", "mode": "existing"}
            else:
                vm.do("blockdev-add", **node(f"t{number}", target))
                words |= {"target": f"t{number}"}
            vm.job(job, completes=completes, sync="full", **words)
            assert target.read_bytes() == padded(wanted), name
        # The other way: the disk of a machine goes into a snapshot of a mount.
        disk = tmp_path / "disk.raw"
        size = files["snapshot"].path.stat().st_size
        qemu.img("create", "-q", "-f", "raw", disk, str(size))
        qemu.io(disk, "raw", *qemu.scribble(random.Random(3), size, 8))
        vm.do("blockdev-add", **node("disk", disk))
        words = {"job_id": "back", "device": "disk"}
        if job.startswith("drive"):
            vm.do("blockdev-del", node_name="s0")  # it has the target open
            path = str(files["snapshot"].path)
            words |= {"target": path, "format": "raw", "mode": "existing"}
        else:
            words |= {"target": "s0"}
        vm.job(job, completes=completes, sync="full", **words)
    assert files["snapshot"].path.read_bytes() == disk.read_bytes()
    walked(files["snapshot"].path)


@pytest.mark.parametrize("name", ["vhd", "partition", "sparse", "odd qcow2"])
def test_block_stream(files: dict[str, File], tmp_path: Path, name: str) -> None:
    """What is on the mount goes into the overlay of a machine that runs."""
    base, top = files[name], tmp_path / "top.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", "-b", base.path, "-F", base.kind, top)
    qemu.io(top, "qcow2", "write -P 9 100k 70k", "write -P 8 1M 1k")
    wanted = qemu.raw(top, "qcow2")
    drive = f"file={top},format=qcow2,cache=none,id=d,if=none"
    with Qemu(tmp_path, "-drive", drive) as vm:
        vm.job("block-stream", completes=False, device="d", job_id="j")
    assert "backing file" not in qemu.img("info", top)
    assert qemu.raw(top, "qcow2") == wanted


def test_block_commit(files: dict[str, File], tmp_path: Path) -> None:
    """What a machine wrote over a snapshot goes into it."""
    base = files["snapshot"].path
    middle, top = tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", middle)
    qemu.io(middle, "qcow2", "write -P 9 100k 70k", "write -z 0 64k", "write -P 8 1M 1k")
    qemu.img("create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
    qemu.io(top, "qcow2", "write -P 7 3M 100k")
    wanted = qemu.raw(top, "qcow2")
    drive = f"file={top},format=qcow2,cache=none,id=d,if=none"
    with Qemu(tmp_path, "-drive", drive) as vm:
        vm.job("block-commit", completes=True, device="d", job_id="j")
    assert padded(base.read_bytes()) == wanted
    walked(base)
