"""What is kept of a copy that is under way, so that it can go on after an interruption.

One file a destination, in the state directory: a line of JSON that says what is copied to where,
and then, a line each, up to which byte the copy was durable; or START-END, where several copy it at
once.  Each line has a checksum (imgfs/checksums.py) that depends on the destination and on all
lines before.  So a line counts when it and all before it are as they were written; behind the first
that is not nothing counts, and what that told is copied again.  Who copies holds the file locked,
so that no two write one destination.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from imgfs import __version__
from imgfs.checksums import checksum, decode_line, encode_line, seed_of
from imgfs.errors import Busy
from imgfs.overlays.places import make_directories
from imgfs.overlays.store import state_root

log = logging.getLogger(__name__)

OLD_S = 30 * 24 * 3600  # after which nobody comes back to an interrupted copy
LONGEST = 8 << 20


@dataclass(frozen=True, slots=True)
class Facts:
    """What is copied; two that are equal make the same bytes.  `token` is of the destination."""

    source: str
    identity: str  #: of the disk; empty: nothing tells one state of it from another
    shown: str
    sparse: bool
    size: int
    destination: str
    token: str
    version: str = __version__

    def of(self, token: str) -> Facts:
        """The same, to this destination."""
        return replace(self, token=token)

    def differs(self, known: dict[str, object]) -> str:
        """Why what is known is not a part of the same copy; empty: it is."""
        now = asdict(self)
        if known.keys() != now.keys() or known["version"] != __version__:
            return "another version of imgfs began it"
        if known["source"] != self.source:
            return f"what is there is of {known['source']}"
        if known["identity"] != self.identity:
            return f"{self.source} has changed since"
        same = (known[name] == now[name] for name in ("shown", "sparse", "size"))
        return "" if all(same) else "what is there is in another format, or sparse"


class Notes(ABC):
    """What is kept of one copy."""

    @abstractmethod
    def known(self) -> tuple[dict[str, object], int]:
        """The facts that are recorded, and the last mark; nothing where there are none."""

    @abstractmethod
    def begin(self, facts: Facts, mark: int) -> None:
        """From now on it is of these."""

    @abstractmethod
    def mark(self, end: int) -> None:
        """All before `end` is durable."""

    @abstractmethod
    def remove(self) -> None:
        """It is done."""


class Record(Notes):
    """[blocks] The file of one destination, locked."""

    def __init__(self, destination: str) -> None:
        """Raises Busy when another process copies there.  Where no file can be made it keeps
        nothing."""
        self._fd: int | None = None
        #: what the next line's checksum depends on, and where that line is to be
        self._next: tuple[int, int] | None = None
        self._seed = seed_of("copy", destination)
        self._said = False
        digest = hashlib.sha256(destination.encode("utf-8", "surrogateescape")).hexdigest()[:24]
        directory = state_root() / "copies"
        self._path = directory / digest
        try:
            make_directories(directory)
            _sweep(directory)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            log.warning("%s: %s; the copy could not go on after an interruption", directory, exc)
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            self.close()
            raise Busy(f"{destination}: another imgfs copies there") from exc

    def known(self) -> tuple[dict[str, object], int]:
        facts, marks = self._read()
        return facts, next((end for start, end in reversed(marks) if start == 0), 0)

    def shares(self) -> list[tuple[int, int]]:
        """The ranges that are durable, in the order in which they became so."""
        return self._read()[1]

    def _read(self) -> tuple[dict[str, object], list[tuple[int, int]]]:
        if self._fd is None:
            return {}, []
        facts: dict[str, object] = {}
        ranges: list[tuple[int, int]] = []
        *lines, _ = os.pread(self._fd, LONGEST, 0).split(b"\n")
        seed = self._seed
        for number, line in enumerate(lines):
            text = decode_line(line, seed)
            if text is None:
                self._damaged(number + 1)
                break
            if number == 0:
                facts = json.loads(text)
            else:
                start, _, end = text.rpartition(b"-")
                ranges.append((int(start or b"0"), int(end)))
            seed = checksum(text, seed)
        return facts, ranges

    def _damaged(self, line: int) -> None:
        if not self._said:
            self._said = True
            said = "what it tells from there on is copied again"
            log.warning("%s: is damaged in line %d; %s", self._path, line, said)

    def begin(self, facts: Facts, mark: int) -> None:
        if self._fd is not None:
            os.ftruncate(self._fd, 0)
            self._next = self._seed, 0
            self._add(json.dumps(asdict(facts)).encode())
            self._add(b"%d" % mark)

    def mark(self, end: int) -> None:
        self._add(b"%d" % end)

    def share(self, start: int, end: int) -> None:
        """The range is durable."""
        self._add(b"%d-%d" % (start, end))

    def _add(self, text: bytes) -> None:
        if self._fd is not None and self._next is not None:
            seed, at = self._next
            line = encode_line(text, seed) + b"\n"
            # What is not whole does not count, and the next line takes its place.
            if os.pwrite(self._fd, line, at) == len(line):
                self._next = checksum(text, seed), at + len(line)

    def remove(self) -> None:
        if self._fd is not None:
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _sweep(directory: Path) -> None:
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            _remove_old(path)


def _remove_old(path: Path) -> None:
    if time.time() - path.stat().st_mtime > OLD_S:
        path.unlink(missing_ok=True)
