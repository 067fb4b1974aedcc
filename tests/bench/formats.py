"""Virtual disks read and shown by imgfs and by qemu, in turn, in one run.

    .venv/bin/python -m tests.bench.formats [--rounds 5] [--seconds 2] [--shown] [--json FILE]

Needs fio, qemu-img and qemu-storage-daemon (qemu-system-common).  Sources are local, and in the
page cache; what a mount has in it of its own is dropped before each copy.

shown      `cp` of NAME.qcow2 of a raw image, and `qemu-img convert -O qcow2` of that image, and of
           NAME.raw, as who has no such name would do it for an image elsewhere; `cp` of the image
           itself, which reads and writes as the first does, with no FUSE between; `cp` of
           NAME.vdi, and of xmount's
decoded    `cp` of NAME.raw of a qcow2, and of qemu-storage-daemon's FUSE export of it
random     4 KiB reads past the page cache, of the same two
opening    a qcow2 of 16 TiB with a thousand clusters here and there: a mount that has only begun is
           asked for st_blocks, for which all tables are read; milliseconds
tables     entries a second, of tables of a qcow2 in which no entry continues the one before,
           until all is in the view's map

Prints medians and imgfs's ratio to its peers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import trio

from imgfs.sources.local.file import open_file
from imgfs.views.opening import open_chain
from imgfs.views.raw import RawView
from imgfs.views.through import StoredView
from tests.bench.read import SIZE, fio, served, through_imgfs
from tests.bench.report import Report, installed, parser_of, run_bench
from tests.big_qcow2 import CLUSTER, scattered, write_qcow2
from tests.images import fill

ENTRIES = 1 << 20
RANDOM = {
    "4 KiB random QD1": ["--rw=randread", "--bs=4k", "--ioengine=psync"],
    "4 KiB random QD16": ["--rw=randread", "--bs=4k", "--ioengine=libaio", "--iodepth=16"],
}
EXPORT = "qemu-storage-daemon"
CONVERT = "qemu-img convert"
CONVERT_MOUNTED = "qemu-img convert of NAME.raw"


def exported(image: Path, work: Path) -> contextlib.AbstractContextManager[Path]:
    path = work / "export"
    block = f"driver=qcow2,node-name=n,read-only=on,file.driver=file,file.filename={image}"
    export = f"type=fuse,id=e,node-name=n,mountpoint={path}"
    return served(path, [EXPORT, "--blockdev", block, "--export", export])


@contextlib.contextmanager
def through_xmount(source: Path, work: Path, out: str) -> Iterator[Path]:
    point = work / f"xmount-{source.stem}-{out}"
    point.mkdir()
    words = ["xmount", "-o", "no_allow_other", "--in", "raw", source, "--out", out, point]
    subprocess.run(words, check=True, timeout=30, capture_output=True)
    try:
        yield point / f"{source.stem}.{out}"
    finally:
        subprocess.run(["fusermount3", "-uzq", point], check=False, capture_output=True)


def timed(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def forget(path: Path) -> None:
    """Drop what the page cache has of a file of a mount."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def copy(path: Path, target: Path, *options: str) -> float:
    try:
        return timed(lambda: subprocess.run(["cp", *options, path, target], check=True))
    finally:
        target.unlink()


def copy_cold(path: Path, target: Path) -> float:
    """Seconds of a `cp` of what no page cache has of the mount."""
    forget(path)
    return copy(path, target)


def convert(image: Path, target: Path) -> float:
    words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, target]
    try:
        return timed(lambda: subprocess.run(words, check=True))
    finally:
        target.unlink()


async def nobody(view: StoredView, name: str) -> StoredView:
    raise AssertionError(name)


async def mapped(path: Path) -> float:
    """Seconds until all of a disk's map is known."""
    # With the file's own holes there would be no data at all.
    source = await open_file(str(path), extents=False)
    begun = time.perf_counter()
    chain = await open_chain("disk", RawView(source), nobody)
    await chain.disk.prepare()
    taken = time.perf_counter() - begun
    await source.aclose()
    return taken


@contextlib.contextmanager
def sources(work: Path) -> Iterator[tuple[Path, Path, Path, Path]]:
    """Raw, qcow2, 16 TiB, and one with long tables; the last two have no bytes but their tables."""
    raw, disk, huge, dense = (work / name for name in ("r.img", "d.qcow2", "h.qcow2", "t.qcow2"))
    fill(raw, SIZE)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk], check=True)
    write_qcow2(huge, 16 << 40, scattered(16 << 40, 1000))
    places = {index: index * 7919 % ENTRIES for index in range(ENTRIES)}
    write_qcow2(dense, ENTRIES * CLUSTER, places)
    for path in (raw, disk):
        path.read_bytes()
    yield raw, disk, huge, dense


def measure(work: Path, options: argparse.Namespace, report: Report) -> None:
    target = work / "target"
    with contextlib.ExitStack() as stack:
        raw, disk, huge, dense = stack.enter_context(sources(work))
        of_raw = stack.enter_context(through_imgfs(raw, work))
        of_disk = stack.enter_context(through_imgfs(disk, work))
        export = stack.enter_context(exported(disk, work))
        shown = of_raw.with_suffix(".qcow2")
        vdis = {"imgfs": of_raw.with_suffix(".vdi")}
        for name, peer in installed({"xmount": through_xmount}).items():
            vdis[name] = stack.enter_context(peer(raw, work, "vdi"))
        for _ in range(options.rounds):
            what = "cp of a shown qcow2"
            report.note(what, "MB/s", "imgfs", SIZE / copy_cold(shown, target) / 1e6)
            report.note(what, "MB/s", CONVERT, SIZE / convert(raw, target) / 1e6)
            forget(of_raw)
            report.note(what, "MB/s", CONVERT_MOUNTED, SIZE / convert(of_raw, target) / 1e6)
            # Without copy_file_range(2), which there is not from one file system to another.
            taken = copy(raw, target, "--reflink=never")
            report.note(what, "MB/s", "the file", SIZE / taken / 1e6)
            if options.shown:
                continue
            for name, path in vdis.items():
                report.note("cp of a shown vdi", "MB/s", name, SIZE / copy_cold(path, target) / 1e6)
            for name, path in (("imgfs", of_disk), (EXPORT, export)):
                taken = copy_cold(path, target)
                report.note("cp of a decoded qcow2", "MB/s", name, SIZE / taken / 1e6)
            for what, words in RANDOM.items():
                for name, path in (("imgfs", of_disk), (EXPORT, export)):
                    rate = fio(path, words, options.seconds)
                    report.note(f"decoded qcow2: {what}", "IOPS", name, rate)
            with through_imgfs(huge, work) as path:
                report.note("opening and stat of 16 TiB", "ms", "imgfs", 1e3 * timed(path.stat))
            path.parent.rmdir()
            rate = ENTRIES / trio.run(mapped, dense)
            report.note("table entries mapped", "entries/s", "imgfs", rate)


def main() -> None:
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--shown", action="store_true", help="cp of a shown qcow2, and no more")
    run_bench(parser, measure)


if __name__ == "__main__":
    main()
