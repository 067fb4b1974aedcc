"""The file that says which snapshots there are: a line for each, with a checksum of its own.

    CHECKSUM {"version": 2, "records": N}
    CHECKSUM {"path": [NAME, …], "layers": [ID, …], "created": SECONDS}

N lines are of snapshots; their order tells nothing.  A checksum (imgfs/checksums.py) depends on the
URL that the snapshots are of, too: another directory's lines are damage here.  A line that is there
twice counts once, and of two with one path neither is believed, so that what they have replaced is
missed.  What is damaged is kept as it is when the file is written anew: nobody can tell which
layers it names.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from imgfs.checksums import decode_line, encode_line, other_version, seed_of
from imgfs.errors import OtherVersion, UsageError

VERSION = 2
_SHOWN = 120  # characters of what is damaged

#: A snapshot's name, behind the names of those whose snapshots/ it is in.
SnapshotPath = tuple[str, ...]


def snapshot_path(name: str) -> SnapshotPath:
    """Of a name as people write it.  Raises UsageError."""
    path = tuple(name.split("/"))
    if not all(path) or any(each in (".", "..") for each in path):
        raise UsageError(f"{name!r}: not a snapshot's name; write x, or x/y for y in x's snapshots")
    return path


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`layers` are names, from the top down; `created` is seconds since 1970."""

    path: SnapshotPath
    layers: tuple[str, ...]
    created: int


@dataclass(frozen=True, slots=True)
class Records:
    """`snapshots` by their paths; `damaged` are lines, `missing` how many others are gone."""

    snapshots: tuple[Snapshot, ...] = ()
    damaged: tuple[bytes, ...] = ()
    missing: int = 0

    @property
    def are_whole(self) -> bool:
        return not self.damaged and not self.missing

    def with_snapshots(self, snapshots: Iterable[Snapshot]) -> Records:
        found = tuple(sorted(snapshots, key=lambda each: each.path))
        return Records(found, self.damaged, self.missing)

    def what_is_wrong(self) -> str:
        """Of records that are not whole."""
        found = [line[:_SHOWN].decode("utf-8", "backslashreplace") for line in self.damaged]
        found += [f"{self.missing} lost"] if self.missing else []
        return (
            f"has damaged records ({'; '.join(found)}); those snapshots are refused, the "
            "others are not; bring the file back, or give them up by "
            "`imgfs snapshot delete SOURCE --damaged`"
        )


def encode(records: Records, url: str) -> bytes:
    """Of the snapshots of `url`."""
    seed = _seed(url)
    count = len(records.snapshots) + len(records.damaged) + records.missing
    lines = [_line({"version": VERSION, "records": count}, seed)]
    lines += [_line(asdict(each), seed) for each in records.snapshots]
    return b"".join(line + b"\n" for line in (*lines, *records.damaged))


def decode(content: bytes, where: str, url: str) -> Records:
    """Raises OtherVersion, which begins with `where`."""
    seed = _seed(url)
    lines = dict.fromkeys(filter(None, content.split(b"\n")))
    counts: set[int] = set()
    found: dict[bytes, Snapshot] = {}
    damaged: list[bytes] = []
    for number, line in enumerate(lines):
        fields = _content(line, seed)
        if fields is None and number == 0:
            fields = _of_version_1(line)
        if fields is None:
            damaged.append(line)
        elif "records" in fields:
            if fields["version"] != VERSION:
                raise OtherVersion(other_version(where, fields["version"], VERSION))
            counts.add(int(fields["records"]))
        else:
            path, layers = tuple(fields["path"]), tuple(fields["layers"])
            found[line] = Snapshot(path, layers, int(fields["created"]))
    paths = Counter(each.path for each in found.values())
    damaged += [line for line, each in found.items() if paths[each.path] > 1]
    snapshots = [each for each in found.values() if paths[each.path] == 1]
    return Records((), tuple(damaged), _missing(counts, snapshots, damaged)).with_snapshots(
        snapshots
    )


def _missing(counts: set[int], snapshots: list[Snapshot], damaged: list[bytes]) -> int:
    if len(counts) == 1:
        missing = counts.pop() - len(snapshots) - len(damaged)
        return max(0, missing) if damaged else abs(missing)
    # Without a count nobody can tell whether some are missing; it may be what is damaged.
    return 0 if damaged else 1


def _of_version_1(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    found: dict[str, Any] = json.loads(text)
    return found if "records" in found else None


def _seed(url: str) -> int:
    return seed_of("snapshots", url)


def _line(content: dict[str, Any], seed: int) -> bytes:
    return encode_line(json.dumps(content).encode(), seed)


def _content(line: bytes, seed: int) -> dict[str, Any] | None:
    text = decode_line(line, seed)
    found: dict[str, Any] | None = None if text is None else json.loads(text)
    return found
