"""What a disk may hold after a power loss, from a trace of what a process asked of the kernel.

`record` runs a command under strace, so that native writes are seen too.  `Disk` applies the trace
to a model of the files below one directory.  Of what was not forced out, `Disk.lose` keeps any
subset: of the bytes of a file sector by sector, of a directory entry by entry.  A name is there for
certain only after its own directory's fsync; a rename is one change, or in the `strict` model two,
of which either may be lost: there both names may be left, the old one alone, or none.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512
_CALLS = "openat,mkdir,rename,unlink,unlinkat,rmdir,pwrite64,write,ftruncate,fallocate,fsync,"
_CALLS += "fdatasync,copy_file_range,renameat,renameat2,mkdirat,link,linkat,pwritev,pwritev2,writev"
_LINE = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")
_QUOTED = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_HANDLE = re.compile(r"(?:-?\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2})*)>(\(deleted\))?")


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that succeeded.  `paths` are those of its descriptors, then its strings."""

    name: str
    paths: tuple[str, ...]
    data: bytes
    numbers: tuple[int, ...]
    flags: str
    is_deleted: bool  #: the file of its descriptor has no name any more


def record(command: list[str], trace: Path) -> Iterator[Call]:
    """Run it to its end; what it asked of the kernel, in order.  It must have one thread."""
    strace = ["strace", "-f", "--seccomp-bpf", "-y", "-xx", "-s", str(1 << 20), "-o", str(trace)]
    done = subprocess.run(
        [*strace, "-e", f"trace={_CALLS}", *command], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    for line in trace.read_text().splitlines():
        assert "resumed>" not in line, "the command has threads"
        match = _LINE.match(line)
        if match is not None and int(match[3]) >= 0:
            yield _call(match[1], match[2], int(match[3]))


def _call(name: str, arguments: str, result: int) -> Call:
    handles = _HANDLE.findall(arguments)
    strings = [_bytes(text) for text in _QUOTED.findall(arguments)]
    plain = _QUOTED.sub("", _HANDLE.sub("", arguments))
    numbers = tuple(int(n) for n in re.findall(r"(?<=[ ,])\d+(?=,|$)", plain))
    paths = [os.fsdecode(_bytes(text)) for text, _ in handles]
    data = b""
    if name in ("pwrite64", "write"):
        data = strings[0][:result]
    else:
        # A relative name is one in the directory of the descriptor before it.
        paths += [str(Path(*paths[:1], os.fsdecode(text))) for text in strings]
    return Call(name, tuple(paths), data, numbers, plain, any(gone for _, gone in handles))


def _bytes(escaped: str) -> bytes:
    return bytes.fromhex(escaped.replace("\\x", ""))


@dataclass(slots=True)
class File:
    """`steps` are what was asked of it, `forced` how many of them are durable for certain.

    A step is (offset, bytes), (start, None, end) for a hole, or (size,).
    """

    steps: list[tuple[object, ...]] = field(default_factory=list)
    forced: int = 0


@dataclass(slots=True)
class Directory:
    """A step is the entries that it sets, a rename's in one."""

    steps: list[dict[str, File | Directory | None]] = field(default_factory=list)
    forced: int = 0
    now: dict[str, File | Directory] = field(default_factory=dict)


class Disk:
    """The files below `root`, which was an empty directory at first."""

    def __init__(self, root: Path, *, strict: bool = False) -> None:
        self._root = str(root)
        self._strict = strict
        self._top = Directory()

    def apply(self, call: Call) -> None:
        """Calls about other files change nothing."""
        inside = [path for path in call.paths if path.startswith(self._root + "/")]
        is_top = call.name == "fsync" and call.paths == (self._root,)
        if is_top:
            self._top.forced = len(self._top.steps)
        if not inside or call.is_deleted:
            return
        act = getattr(self, "_" + call.name, None)
        assert act is not None, f"{call.name} is not in the model"
        act(call, inside)

    def _find(self, path: str) -> File | Directory | None:
        found: File | Directory | None = self._top
        for name in path[len(self._root) + 1 :].split("/"):
            found = found.now.get(name) if isinstance(found, Directory) else None
        return found

    def _parent(self, path: str) -> tuple[Directory, str]:
        above, _, name = path.rpartition("/")
        found = self._top if above == self._root else self._find(above)
        assert isinstance(found, Directory), path
        return found, name

    def _set(self, changes: dict[str, File | Directory | None]) -> None:
        """All of them are in one directory."""
        entries = {}
        for path, node in changes.items():
            directory, name = self._parent(path)
            entries[name] = node
            if node is None:
                directory.now.pop(name, None)
            else:
                directory.now[name] = node
        directory.steps.append(entries)

    def _openat(self, call: Call, paths: list[str]) -> None:
        path = paths[-1]
        found = self._find(path)
        if found is None:
            assert "O_CREAT" in call.flags, path
            self._set({path: File()})
        elif "O_TRUNC" in call.flags and isinstance(found, File):
            found.steps.append((0,))

    def _mkdir(self, call: Call, paths: list[str]) -> None:
        self._set({paths[-1]: Directory()})

    def _rename(self, call: Call, paths: list[str]) -> None:
        old, new = paths
        if self._strict or self._parent(old)[0] is not self._parent(new)[0]:
            self._set({new: self._find(old)})
            self._set({old: None})
        else:
            self._set({new: self._find(old), old: None})

    def _unlink(self, call: Call, paths: list[str]) -> None:
        self._set({paths[-1]: None})

    _unlinkat = _rmdir = _unlink

    def _file(self, path: str) -> File:
        found = self._find(path)
        assert isinstance(found, File), path
        return found

    def _pwrite64(self, call: Call, paths: list[str]) -> None:
        self._file(paths[0]).steps.append((call.numbers[-1], call.data))

    def _ftruncate(self, call: Call, paths: list[str]) -> None:
        self._file(paths[0]).steps.append((call.numbers[-1],))

    def _fallocate(self, call: Call, paths: list[str]) -> None:
        start, length = call.numbers[-2:]
        assert "PUNCH_HOLE" in call.flags
        self._file(paths[0]).steps.append((start, None, start + length))

    def _fsync(self, call: Call, paths: list[str]) -> None:
        found = self._find(paths[0])
        assert found is not None
        found.forced = len(found.steps)

    _fdatasync = _fsync

    def lose(self, to: Path, rng: random.Random) -> None:
        """Write to the directory `to` what a power loss now may leave."""
        self._write(self._top, to, rng, rng.choice((0.0, 0.1, 0.5, 0.9, 1.0)))

    def _write(self, node: File | Directory, to: Path, rng: random.Random, kept: float) -> None:
        if isinstance(node, File):
            to.write_bytes(_content(node, rng, kept))
            return
        to.mkdir(exist_ok=True)
        entries: dict[str, File | Directory | None] = {}
        if self._strict:
            kept = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))  # each directory as it likes
        for index, step in enumerate(node.steps):
            if index < node.forced or rng.random() < kept:
                entries |= step
        for name, each in entries.items():
            if each is not None:
                self._write(each, to / name, rng, kept)


def _content(file: File, rng: random.Random, kept: float) -> bytearray:
    content = bytearray()
    for index, step in enumerate(file.steps):
        is_forced = index < file.forced
        match step:
            case (int(offset), bytes(data)):
                first = offset - offset % SECTOR
                for sector in range(first, offset + len(data), SECTOR):
                    at = max(sector, offset)
                    if is_forced or rng.random() < kept:
                        end = min(offset + len(data), sector + SECTOR)
                        content.extend(bytes(max(0, end - len(content))))
                        content[at:end] = data[at - offset : end - offset]
            case (int(start), None, int(end)):
                if is_forced or rng.random() < kept:
                    end = min(end, len(content))
                    content[start:end] = bytes(max(0, end - start))
            case (int(size),):
                if is_forced or rng.random() < kept:
                    del content[size:]
                    content.extend(bytes(size - len(content)))
    return content
