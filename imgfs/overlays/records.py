"""The file that says which snapshots there are: a line for each, with a checksum of its own.

    CHECKSUM {"version": 1, "records": N}
    CHECKSUM {"path": [NAME, …], "layers": [ID, …], "created": SECONDS}

N lines follow the first.  CHECKSUM is the CRC-32 of what stands behind the space, in hexadecimal.
What is damaged is kept as it is when the file is written anew: nobody can tell which layers it
names.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from imgfs.errors import CorruptSnapshot

VERSION = 1
_SHOWN = 120  # characters of what is damaged

#: A snapshot's name, behind the names of those whose snapshots/ it is in.
SnapshotPath = tuple[str, ...]


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


def encode(records: Records) -> bytes:
    count = len(records.snapshots) + len(records.damaged) + records.missing
    lines = [_line({"version": VERSION, "records": count})]
    lines += [_line(asdict(each)) for each in records.snapshots]
    return b"".join(line + b"\n" for line in (*lines, *records.damaged))


def decode(content: bytes, where: str) -> Records:
    """Raises CorruptSnapshot, which begins with `where`, for a version that is not known."""
    first, *lines = content.split(b"\n")
    header = _content(first)
    if header is not None and header.get("version") != VERSION:
        raise CorruptSnapshot(f"{where}: version {header.get('version')} is not known")
    snapshots: list[Snapshot] = []
    damaged: list[bytes] = []
    for line in filter(None, lines):
        try:
            found = _content(line) or {}
            path, layers = tuple(found["path"]), tuple(found["layers"])
            snapshots.append(Snapshot(path, layers, int(found["created"])))
        except (KeyError, TypeError, ValueError):
            damaged.append(line)
    # Without a count nobody can tell whether some are missing.
    missing = 1
    if header is not None:
        missing = max(0, int(header["records"]) - len(snapshots) - len(damaged))
    return Records((), tuple(damaged), missing).with_snapshots(snapshots)


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return b"%08x %s" % (zlib.crc32(text), text)


def _content(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    found: dict[str, Any] = json.loads(text)
    return found
