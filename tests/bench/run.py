"""All benches, one after the other, and the table of what they found.

    .venv/bin/python -m tests.bench.run [--quick] [--only NAME]… [--sparsify] [--lock FILE]
    .venv/bin/python -m tests.bench.run --from tests/bench/results.json

Each script is a process of its own.  What it found is kept in --results, beside what others found
before, so one can be run again alone, and the table of all is made anew: the whole of it in
contrib/figures.md, the rows in SHORT between the markers in README.md.  --from makes the tables of
what is kept, and runs nothing.  virt-sparsify takes ten minutes, and is left as it was unless
--sparsify is there.  With --lock each script waits for that lock (flock), and holds it.

Exits with 1 when a script failed, or when a peer is ahead in a row and REASONS has no sentence for
it; these rows are listed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import table
from tests.bench.report import PROGRAMS

TOP = Path(__file__).parents[2]
RESULTS = TOP / "tests/bench/results.json"
README, WHOLE = TOP / "README.md", TOP / "contrib/figures.md"


@dataclass(frozen=True)
class Script:
    title: str
    words: str
    quick: str
    is_slow: bool = False


SCRIPTS = {
    "read": Script(
        "A local image", "--rounds 3 --seconds 1.5", "--rounds 1 --seconds 0.5"
    ),
    "write": Script("Writes on a snapshot", "--rounds 3", "--rounds 1 --size 128"),
    "formats": Script(
        "Formats", "--rounds 3 --seconds 1.5", "--rounds 1 --seconds 0.5"
    ),
    "ssh": Script(
        "A mount over ssh", "--rounds 3", "--rounds 1 --data 128 --sparse 1024"
    ),
    "copy": Script(
        "imgfs copy", "--rounds 3", "--rounds 1 --data 128 --sparse 1024 --many 8"
    ),
    "nbd": Script("NBD", "--rounds 3", "--rounds 1 --data 128 --sparse 1024"),
    "http": Script("http", "--rounds 3 --data 512", "--rounds 1 --data 128"),
    "latency": Script(
        "A long line",
        "--rounds 1 --delays 20 200 --data 1024 --seconds 9",
        "--rounds 1 --delays 20 --data 256 --seconds 3 --count 5",
    ),
    "scale": Script(
        "Scale",
        "--rounds 1",
        "--rounds 1 --tib 4 --extents 50000 --images 50 --deep 10",
    ),
    "many": Script("Many images over ssh", "--rounds 1", "--rounds 1 --images 50"),
    "sparsify": Script("Free space", "--rounds 1", "--rounds 1 --deleted 256", is_slow=True),
}  # fmt: skip

#: What README shows.
SHORT = [
    ("read", "4 KiB random*"),
    ("read", "1 MiB sequential"),
    ("read", "buffered, cold"),
    ("write", "4 KiB random QD16, fresh"),
    ("write", "4 KiB write + fsync, fresh"),
    ("formats", "cp of*"),
    ("ssh", "*: copy"),
    ("copy", "a sparse image over ssh"),
    ("copy", "* images over ssh, *"),
    ("nbd", "*: copy"),
    ("http", "copy"),
    ("latency", "*: sequential"),
    ("sparsify", "all"),
    ("many", "*, time"),
    ("scale", "*, time"),
    ("scale", "*: peak memory"),
]

#: Why a peer is ahead: `bench: what: peer`, with * and ?; the first that fits.
REASONS: dict[str, str] = {
    "*: the file": "the file itself, without FUSE between",
    "*: the proxy alone": "the line itself, with nothing at either end",
    "scale: *peak memory: *": "Python alone takes 28 MiB before it has opened anything",
    "scale: *mount and stat, time: *": "Python takes a third of a second to start, and a mount "
    "knows the whole map before it says st_blocks, which qemu leaves at what its file takes",
    "*, with the mount: *": "to start Python, connect and mount takes half a second, once a mount; "
    "the peer is one process that copies and ends (`imgfs copy` is such a one)",
    "ssh: *: CPU of the client: *": "what comes is decrypted in OpenSSL for Python, and written to "
    "the cache and to the copy; the peers keep no cache",
    "ssh: dense: copy: *": "on loopback the processors are the line: what comes is decrypted in "
    "Python's process, and written to the cache and then to the copy; the peers keep no cache",
    "ssh: *: CPU of the server: *": "a helper is started on the server once, to say where there is "
    "data, which shows with little of it; and sftp-server copies what ssh cat passes on",
    "http: CPU: *": "what comes is written to the cache and to the copy; the peers keep no cache",
    "http: copy: *": "curl and nbdcopy write the file themselves, without a mount and a cache "
    "between",
    "nbd: *: nbdcopy": "nbdcopy writes the file itself, or reads into nothing, without a mount and "
    "a cache between",
    "copy: *tunnel*": "the peer runs an nbdkit on the server, which must be installed and started "
    "there, and speaks NBD in OpenSSH's tunnel; imgfs needs an sshd",
    "copy: peak memory: *": "Python and asyncssh alone take 40 MiB; what is on its way is bounded",
    "ssh: *: tunnel, nbdkit file*": "the peer runs an nbdkit on the server, which must be "
    "installed and started there; imgfs needs an sshd",
    "formats: cp of a shown *: *": "cp has one thread, which reads through FUSE's page cache, made "
    "of pages of 4 KiB, and then writes; qemu-img reads and writes at the same time, and makes one "
    "copy less",
    "nbd: dense: read: nbdfuse": "level: the rounds of either scatter by more than that",
    "write: 1 MiB sequential, *: qemu-storage-daemon": "level: the rounds of either scatter by "
    "more than that; both make one copy into the page cache",
    "latency: *: 4 KiB random: *": "what is above the line's delay is work in Python, 1 to 3 ms on "
    "an idle machine",
    "*write + fsync*: qemu-storage-daemon": "each fsync of a snapshot is two of the disk's: the "
    "data, and then the record that says where it is; qemu's metadata of a cluster that is there "
    "already does not change",
}

VERSIONS = {
    "fio": ["fio", "--version"],
    "qemu-img": ["qemu-img", "--version"],
    "qemu-storage-daemon": ["qemu-storage-daemon", "--version"],
    "nbdkit": ["nbdkit", "--version"],
    "nbdcopy": ["nbdcopy", "--version"],
    "nbdfuse": ["nbdfuse", "--version"],
    "ssh": ["ssh", "-V"],
    "sshfs": ["sshfs", "--version"],
    "rclone": ["rclone", "version"],
    "rsync": ["rsync", "--version"],
    "curl": ["curl", "--version"],
    "xmount": ["xmount", "--version"],
    "virt-sparsify": ["virt-sparsify", "--version"],
}


def version(words: list[str]) -> str | None:
    """The first number with a dot in what it says of itself."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return None
    found = re.search(r"v?(\d+\.\d[\w.]*)", done.stdout + done.stderr)
    return found[1] if found else None


def machine() -> dict[str, Any]:
    cpu = next(
        (
            text.partition(":")[2].strip()
            for text in Path("/proc/cpuinfo").read_text().splitlines()
            if text.startswith("model name")
        ),
        platform.machine(),
    )
    versions = {name: version(words) for name, words in VERSIONS.items()}
    return {
        "cores": os.cpu_count(),
        "cpu": cpu,
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30),
        "kernel": platform.release(),
        "versions": {name: text for name, text in versions.items() if text is not None},
    }


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(name: str, words: str, lock: Path | None) -> dict[str, Any] | None:
    """What the script found; None when it failed."""
    command = ["python", "-m", f"tests.bench.{name}", *shlex.split(words)]
    with tempfile.TemporaryDirectory() as work, locked(lock):
        file = Path(work) / "json"
        print(f"== {shlex.join(command)}", flush=True)
        done = subprocess.run([sys.executable, *command[1:], "--json", file], cwd=TOP, check=False)
        if done.returncode:
            return None
        found: dict[str, Any] = json.loads(file.read_text())
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"command": shlex.join(command), "date": today, **machine(), **found}


def benches_of(kept: dict[str, Any]) -> list[table.Bench]:
    return [
        table.Bench(name, script.title, table.rows_of(kept[name]), kept[name])
        for name, script in SCRIPTS.items()
        if name in kept
    ]


def tables(kept: dict[str, Any]) -> tuple[str, str]:
    """README, with its table as it must be, and the page of all figures."""
    benches = benches_of(kept)
    readme = table.put_between_markers(README.read_text(), table.short(benches, SHORT, REASONS))
    return readme, table.whole(benches, REASONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, less data")
    parser.add_argument("--only", action="append", choices=SCRIPTS, metavar="NAME")
    parser.add_argument("--sparsify", action="store_true", help="virt-sparsify, too")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--from", type=Path, dest="kept", metavar="FILE", help="run nothing")
    parser.add_argument("--lock", type=Path, metavar="FILE")
    options = parser.parse_args()
    file = options.kept or options.results
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    failed, begun = [], time.monotonic()
    for name, script in SCRIPTS.items() if options.kept is None else ():
        if options.only is None and script.is_slow and not options.sparsify:
            continue
        if options.only is not None and name not in options.only:
            continue
        found = run(name, script.quick if options.quick else script.words, options.lock)
        if found is None:
            failed.append(name)
        else:
            kept[name] = found
            file.write_text(json.dumps(kept, indent=1) + "\n")
    missing = sorted({*PROGRAMS.values()} - set(machine()["versions"]) - {"scp"})
    if missing:
        print(f"not installed: {', '.join(missing)}")
    for path, text in zip((README, WHOLE), tables(kept), strict=True):
        path.write_text(text)
    wanting = table.unexplained(benches_of(kept), REASONS)
    for each in wanting:
        print(f"AHEAD, and nobody says why: {each}")
    print(
        f"{time.monotonic() - begun:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    sys.exit(bool(failed or wanting))


if __name__ == "__main__":
    main()
