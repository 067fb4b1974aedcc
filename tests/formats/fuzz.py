"""Changes real images at random, and opens, maps and reads them: `python -m tests.formats.fuzz`.

Whatever is in a file, only an error of imgfs may come of it, within `LONGEST_S` of processor time
and `MOST_MEMORY`; what is read in one piece and in two is the same.  Of a guest's disk nothing may
come at all but an answer, and what it calls free lies inside.

A case is made by the seed, the subject's name and its number alone, so that
`--seed S --only NAME --first N --cases 1` is that case again.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from imgfs.errors import ImgfsError
from imgfs.formats.probe import RAW, probe
from imgfs.guest.disk import look_at_disk
from imgfs.views.opening import READERS
from tests.drive import Files
from tests.formats.fuzz_corpus import GUEST, PART, Subject, subjects

LONGEST_S = 1.0
HANGS_S = 20  # of processor time: it will not end
MOST_MEMORY = 100 << 20
ROOM = 2 << 30  # of addresses; beyond it is a MemoryError
LONGEST_READ = 256 << 10
_VALUES = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x1FF, 0x200, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000)
_VALUES += (0xFFFFFFFF, 1 << 32, 1 << 40, (1 << 56) - 512, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)


class Finding(Exception):
    """What must not come of a file."""


class _AnyFile(dict[str, bytes]):
    """Files beside the image: "x", and for every other name a short one."""

    def __missing__(self, name: str) -> bytes:
        return b"beside " * 1000


class _Disk(bytes):
    """A guest's disk of which only `parts` are held; zeroes are between them, and follow."""

    parts: dict[int, int]  #: where each is on the disk, and where here

    def __getitem__(self, wanted: Any) -> Any:
        assert isinstance(wanted, slice), wanted
        start, end = wanted.start, wanted.stop
        if not self.parts:
            return super().__getitem__(wanted).ljust(end - start, b"\0")
        found = bytearray(end - start)
        for at in range(start - start % PART, end, PART):
            if at in self.parts:
                low, high = max(start, at), min(end, at + PART)
                here = self.parts[at] - at
                found[low - start : high - start] = super().__getitem__(
                    slice(low + here, high + here)
                )
        return bytes(found)


def changed(rng: random.Random, subject: Subject) -> bytearray:
    """The subject's bytes with one to eight changes; its checksums are right again, mostly."""
    found = bytearray(subject.content)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4, 8))):
        _change(rng, found, subject.places)
    if rng.random() < 0.75:
        subject.repair(found)
    if rng.random() < 0.05:
        del found[rng.randrange(len(found)) :]
    elif rng.random() < 0.03:
        found += bytes(rng.randrange(1 << 20))
    return found


def _place(rng: random.Random, size: int, places: tuple[int, ...]) -> int:
    """A byte, most often of what is not zero, and there most often of what comes first."""
    chance = rng.random()
    if chance < 0.5:
        at = rng.choice(places[:1] if chance < 0.25 else places[:8]) + rng.randrange(512)
    elif chance < 0.9:
        at = rng.choice(places) + rng.randrange(512)
    else:
        at = rng.randrange(size)
    if rng.random() < 0.8:
        at -= at % rng.choice((2, 4, 8))
    return min(at, size - 1)


def _change(rng: random.Random, found: bytearray, places: tuple[int, ...]) -> None:
    size, at = len(found), _place(rng, len(found), places)
    width, order = rng.choice((1, 2, 4, 4, 8, 8)), rng.choice(("little", "big"))
    old = int.from_bytes(found[at : at + width], order)  # type: ignore[arg-type]
    how = rng.randrange(7)
    if how == 0:
        found[at] ^= 1 << rng.randrange(8)
        return
    if how == 1:
        new = rng.choice(_VALUES)
    elif how == 2:
        new = old + rng.choice((-512, -8, -1, 1, 8, 512, 4096, 65536))
    elif how == 3:
        new = rng.choice((old << 1, old >> 1, old * 512, rng.getrandbits(8 * width), size, ~old))
    elif how == 4:  # an entry or a field of another place
        length = rng.choice((4, 8, 16, 64, 512))
        other = _place(rng, size, places)
        part = found[other : other + length]
        found[at : at + len(part)] = part[: max(0, size - at)]
        return
    elif how == 5:
        length = min(rng.choice((4, 16, 64, 512)), size - at)
        found[at : at + length] = rng.choice((b"\0", b"\xff", b"\x41")) * length
        return
    else:
        new = old ^ (1 << rng.randrange(8 * width))
    coded = (new & ((1 << 8 * width) - 1)).to_bytes(width, order)  # type: ignore[arg-type]
    found[at : at + width] = coded[: size - at]


def use(subject: Subject, content: bytes, rng: random.Random) -> bool:
    """Do with it what imgfs does.  Whether it could be opened.

    Raises Finding, and whatever must not be raised.
    """
    if subject.format == GUEST:
        is_cut = len(content) < len(subject.content) and not subject.parts
        size = len(content) if is_cut else max(subject.size, len(content))
        disk = _Disk(content)
        disk.parts = {at: number * PART for number, at in enumerate(subject.parts)}
        return _look(disk, size)
    probed = Files(content).run(probe(len(content)))
    opened = False
    for format in {subject.format, probed}:
        if format != RAW and format in READERS:
            opened |= _read(format, subject, content, rng)
    return opened


def _look(content: bytes, size: int) -> bool:
    """Whether something is free on a guest's disk of `size` bytes."""
    guest = Files(content).run(look_at_disk(size))
    reach = -1
    for start, end in zip(guest.free[::2], guest.free[1::2], strict=True):
        if not reach < start < end <= size:
            raise Finding(f"[{start}, {end}) is free, after {reach}, of {size}")
        reach = end
    for volume in guest.volumes:
        for segment in volume.segments:
            for start, end in segment.on_disk(segment.start, segment.start + segment.size):
                if not 0 <= start < end <= size:
                    raise Finding(f"volume {volume.name} has [{start}, {end}) of {size}")
    return bool(guest.free)


def _read(format: str, subject: Subject, content: bytes, rng: random.Random) -> bool:
    first = subject.head or content
    files = Files(first, _AnyFile(x=content))
    module = import_module(READERS[format])
    more = {"snapshot": rng.choice(("snap1", "2"))} if rng.random() < 0.1 else {}
    try:
        name = "fuzz.img"
        disk = files.run(module.open_disk(name, len(first), **(more if format == "qcow2" else {})))
    except ImgfsError as exc:
        _check_text(exc)
        return False
    for _ in range(4 if disk.size else 0):
        offset = rng.choice((0, rng.randrange(disk.size), rng.randrange(min(disk.size, 4 << 20))))
        length = rng.randint(1, min(LONGEST_READ, disk.size - offset))
        half = rng.randrange(length)

        def read(at: int, size: int) -> bytes | None:
            try:
                return files.read(disk, at, size, lambda _, n: b"b" * n)
            except ImgfsError as exc:
                _check_text(exc)
                return None

        whole = read(offset, length)
        parts = read(offset, half), read(offset + half, length - half)
        if whole is not None and None not in parts and whole != b"".join(map(bytes, parts)):  # type: ignore[arg-type]
            raise Finding(f"[{offset}, {offset + length}) is not what its parts are, cut at {half}")
    disk.facts()
    return True


def _check_text(exc: ImgfsError) -> None:
    text = str(exc)
    if not text or not text.isprintable() or len(text) > 2000:
        raise Finding(f"a {type(exc).__name__} says {text[:500]!r}")


@contextmanager
def _bounded() -> Iterator[None]:
    def over(*_: object) -> None:
        raise Finding(f"is not done in {HANGS_S} s")

    old = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANGS_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)


def attempt(subject: Subject, seed: int, number: int) -> bool:
    """One case.  Whether it could be opened; raises Finding, and whatever must not be raised."""
    rng = random.Random(f"{seed} {subject.name} {number}")
    content = bytes(changed(rng, subject))
    state = rng.getstate()
    with _bounded():
        tracemalloc.start()
        try:
            began = time.process_time()
            opened = use(subject, content, rng)
            taken = time.process_time() - began
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        if taken > LONGEST_S:  # counting memory takes time too
            rng.setstate(state)
            began = time.process_time()
            use(subject, content, rng)
            taken = time.process_time() - began
    if taken > LONGEST_S:
        raise Finding(f"took {taken:.2f} s")
    if peak > MOST_MEMORY:
        raise Finding(f"took {peak >> 20} MiB")
    return opened


def bound_memory() -> None:
    """Addresses, of the whole process: what no Python counts is counted too."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))


def main(words: list[str], say: Callable[[str], None] = print) -> int:
    """Until the time, or the number of cases of each subject, is over.  How much was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument(
        "--cases", type=int, default=0, help="of each subject; 0: what there is time for"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", help="the subject with this name")
    parser.add_argument("--keep", type=Path, help="where to put what was found")
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        found = (s for s in subjects(Path(folder)) if given.only in (None, s.name))
        made = list(islice(found, 1 if given.only else None))
    if not made:
        parser.error(f"there is no {given.only}")
    bound_memory()
    deadline = time.monotonic() + given.minutes * 60
    number, opened, found = given.first, 0, 0
    while time.monotonic() < deadline and (not given.cases or number < given.first + given.cases):
        for subject in made:
            try:
                opened += attempt(subject, given.seed, number)
            except Exception:
                found += 1
                say(f"--seed {given.seed} --only {subject.name} --first {number} --cases 1")
                say(traceback.format_exc())
                if given.keep is not None:
                    rng = random.Random(f"{given.seed} {subject.name} {number}")
                    given.keep.mkdir(parents=True, exist_ok=True)
                    path = given.keep / f"{subject.name}-{given.seed}-{number}"
                    path.write_bytes(changed(rng, subject))
        number += 1
    cases = (number - given.first) * len(made)
    say(f"seed {given.seed}: {cases} cases of {len(made)} files, {opened} opened, {found} found")
    return found


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
