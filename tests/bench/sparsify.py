"""One guest's disk sparsified by imgfs and by virt-sparsify, in turn, in one run.

    .venv/bin/python -m tests.bench.sparsify [--rounds 1] [--deleted 1536] [--json FILE]

As root, with e2fsprogs and guestfs-tools (virt-sparsify).  The disk has 8 GiB, a GPT and an ext4
with some files, and between them --deleted MiB of others that were deleted.  Three times the used
and the deleted bytes must fit in --work.

libguestfs is told LIBGUESTFS_BACKEND=direct and, where there is no KVM, force_tcg, unless the
environment says otherwise.  It boots the kernel in /boot, or what SUPERMIN_KERNEL and
SUPERMIN_MODULES name: .guest/boot/vmlinuz-VERSION and .guest/lib/modules/VERSION of tests/run.sh
will do, after `depmod -b .guest VERSION`; /lib/modules must be there, if only empty.

Measured are of each: seconds, all in all (imgfs: mount, cp, umount; --in-place: the copy that it
works on first, as it writes to what it is given); MiB that the result has allocated; the most that
stood in the directories for temporary and cached files meanwhile.  Each result must pass e2fsck
and have the disk's files, and the disk must be what it was.  The last lines say what must hold.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.report import MIB, Report, add_options
from tests.servers.ssh import Sshd

SIZE = 8192 * MIB
START = MIB
FILE = 4 * MIB
KEPT = 96  # files
CACHE = 64 * MIB
SECONDS, ALLOCATED, TEMPORARY = "all", "allocated", "temporary files, at most"

IMGFS = [sys.executable, "-m", "imgfs.cli.main"]


@dataclass(frozen=True)
class Job:
    disk: Path
    target: Path
    work: Path
    sshd: Sshd


@dataclass(frozen=True)
class Sample:
    seconds: float
    allocated: int  #: bytes of the result
    temporary: int  #: bytes, at the worst moment


def run(*words: object, text: str = "") -> str:
    done = subprocess.run([str(w) for w in words], input=text, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words}: {done.stdout}{done.stderr}")
    return done.stdout


def imgfs(job: Job, source: object, *options: object) -> None:
    point = job.work / "mount"
    point.mkdir(exist_ok=True)
    run(*IMGFS, source, point, *options)
    try:
        run("cp", point / f"sparse/{job.disk.name}", job.target)
    finally:
        run(*IMGFS, "umount", point)


def local(job: Job) -> None:
    imgfs(job, job.disk)


def over_ssh(job: Job) -> None:
    imgfs(job, job.sshd.url(job.disk), "-o", f"{job.sshd.options},cache_size={CACHE}")


def copying(job: Job) -> None:
    run("virt-sparsify", "--quiet", "--format", "raw", job.disk, job.target)


def in_place(job: Job) -> None:
    run("cp", job.disk, job.target)
    run("virt-sparsify", "--quiet", "--format", "raw", "--in-place", job.target)


PEERS: dict[str, Callable[[Job], None]] = {
    "imgfs": local,
    "imgfs over ssh": over_ssh,
    "virt-sparsify": copying,
    "cp, virt-sparsify --in-place": in_place,
}


@contextlib.contextmanager
def mounted(disk: Path, point: Path, *, write: bool = False) -> Iterator[Path]:
    words = [
        f"--offset={START}",
        f"--sizelimit={SIZE - 2 * MIB}",
        *([] if write else ["--read-only"]),
    ]
    device = run("losetup", "--find", "--show", *words, disk).strip()
    try:
        point.mkdir(exist_ok=True)
        run("mount", "-o", "rw" if write else "ro", device, point)
        try:
            yield point
        finally:
            run("umount", point)
    finally:
        run("losetup", "--detach", device)


def make_disk(disk: Path, deleted: int) -> None:
    """Kept and deleted files take turns, so that the free space is in pieces."""
    with disk.open("wb") as file:
        file.truncate(SIZE)
    run(
        "sfdisk",
        "--quiet",
        disk,
        text=f"label: gpt\nstart={START // 512}, size={SIZE // 512 - 4096}\n",
    )
    run("mkfs.ext4", "-q", "-E", f"offset={START}", disk, f"{(SIZE - 2 * MIB) // 1024}k")
    count = deleted // FILE
    with mounted(disk, disk.with_suffix(".fs"), write=True) as root:
        gone: list[Path] = []
        for index in range(KEPT):
            (root / f"kept {index}").write_bytes(os.urandom(FILE))
            while len(gone) * KEPT < count * (index + 1):
                gone.append(root / f"gone {len(gone)}")
                gone[-1].write_bytes(os.urandom(FILE))
            os.sync()
        for path in gone:
            path.unlink()


def files_of(disk: Path) -> dict[str, str]:
    run("e2fsck", "-fn", f"{disk}?offset={START}")
    with mounted(disk, disk.with_suffix(".fs")) as root:
        paths = sorted(path for path in root.iterdir() if path.is_file())
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


class Watching:
    """The most that stood below a directory while the block ran."""

    def __init__(self, directory: Path) -> None:
        self.most = 0
        self._directory = directory
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            with contextlib.suppress(OSError):  # it went while we looked
                self.most = max(self.most, sum(map(allocated, self._directory.rglob("*"))))

    def __enter__(self) -> Watching:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def measured(job: Job, peer: Callable[[Job], None], temporary: Path) -> Sample:
    job.target.unlink(missing_ok=True)
    run("sync")
    with Watching(temporary) as watching:
        begun = time.monotonic()
        peer(job)
        seconds = time.monotonic() - begun
    run("sync")
    return Sample(seconds, allocated(job.target), watching.most)


def verdicts(report: Report) -> list[tuple[str, bool]]:
    def found(what: str, name: str) -> float:
        return report.rows[what].median(name)

    def faster(other: str) -> float:
        return found(SECONDS, "imgfs") / found(SECONDS, other)

    copied, far, cache = "cp, virt-sparsify --in-place", "imgfs over ssh", CACHE // MIB
    more = found(ALLOCATED, far) / found(ALLOCATED, copied) - 1
    kept, files = found(TEMPORARY, far), found(TEMPORARY, "imgfs")
    return [
        (f"over ssh: {more:+.2%} allocated against --in-place (at most +2 %)", more <= 0.02),
        (f"over ssh: {kept:.1f} MiB kept, of which {cache} MiB are cache", kept <= cache * 1.1),
        (f"local: {files:.2f} MiB of temporary files (none)", files < 1),
        (f"local: {faster('virt-sparsify'):.1%} of virt-sparsify (less than a tenth)",
         faster("virt-sparsify") < 0.1),
        (f"local: {faster(copied):.1%} of a copy and --in-place (less than a third)",
         faster(copied) < 1 / 3),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, rounds=1)
    parser.add_argument("--deleted", type=int, default=1536, help="MiB")
    parser.add_argument("--work", type=Path, help="a directory on the disk to be measured")
    words = parser.parse_args()
    report = Report()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # gigabytes must not be left
    with tempfile.TemporaryDirectory(dir=words.work) as directory:
        work = Path(directory)
        temporary = work / "tmp"
        os.environ.setdefault("LIBGUESTFS_BACKEND", "direct")
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            os.environ.setdefault("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
        for name in ("TMPDIR", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
            os.environ[name] = str(temporary / name)
            (temporary / name).mkdir(parents=True)
        # Its appliance is made once for all disks, and not here.
        os.environ["LIBGUESTFS_CACHEDIR"] = str(work)
        (work / "sshd").mkdir()
        sshd = Sshd(work / "sshd")
        try:
            job = Job(work / "disk.raw", work / "copy.raw", work, sshd)
            bench(job, words, temporary, report)
        finally:
            sshd.stop()
    report.finish(words.json)
    for text, holds in verdicts(report):
        print(f"{'yes' if holds else 'NO ':3} {text}")


def bench(job: Job, words: argparse.Namespace, temporary: Path, report: Report) -> None:
    make_disk(job.disk, words.deleted * MIB)
    print(f"{job.disk}: {allocated(job.disk) / MIB:.0f} MiB allocated", flush=True)
    files = files_of(job.disk)
    before = job.disk.stat()
    run("libguestfs-test-tool")
    for _ in range(words.rounds):
        for name, peer in PEERS.items():
            sample = measured(job, peer, temporary)
            report.note(SECONDS, "s", name, sample.seconds)
            report.note(ALLOCATED, "MiB", name, sample.allocated / MIB)
            report.note(TEMPORARY, "MiB", name, sample.temporary / MIB)
            if files_of(job.target) != files:
                raise SystemExit(f"{name}: the files are not what they were")
            after = job.disk.stat()
            if (after.st_mtime_ns, after.st_ctime_ns) != (before.st_mtime_ns, before.st_ctime_ns):
                raise SystemExit(f"{name}: wrote to the disk")
            job.target.unlink()


if __name__ == "__main__":
    main()
