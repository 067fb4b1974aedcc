"""What runs on the server: a few lines of Python that tell exact identity and extents.

SFTP knows neither holes nor nanoseconds.  One command is started for a connection and asked over
its standard input, a line a question, so no file name is ever on a command line:

    id HEX          ->  i dev:ino:size:mtime_ns:ctime_ns
    map HEX         ->  a line "start end" in hex for each data range, then "i …" as above
    either          ->  x errno, when it failed

HEX is the path's bytes.  The closing line is what tells a whole answer from a cut one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Protocol

from imgfs.errors import ImgfsError, ProtocolViolation, SourceChanged, SourceNotFound
from imgfs.extents import ExtentList, from_data_ranges

SCRIPT = """
import errno, os, sys
def ident(s):
    return "i %d:%d:%d:%d:%d" % (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
def walk(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        before = ident(os.fstat(fd))
        at, size = 0, os.lseek(fd, 0, os.SEEK_END)
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as e:
                if e.errno == errno.ENXIO:
                    break
                if e.errno != errno.EINVAL:
                    raise
                start, at = at, size
            else:
                at = os.lseek(fd, start, os.SEEK_HOLE)
            sys.stdout.write("%x %x\\n" % (start, at))
        return before if before == ident(os.stat(path)) else "x %d" % errno.ESTALE
    finally:
        os.close(fd)
while True:
    words = sys.stdin.readline().split()
    if not words:
        break
    try:
        path = bytes.fromhex(words[1])
        answer = walk(path) if words[0] == "map" else ident(os.stat(path))
    except OSError as e:
        answer = "x %d" % e.errno
    sys.stdout.write(answer + "\\n")
    sys.stdout.flush()
"""

#: Means the same to sh, csh and fish; the script itself is the first line of its input.
COMMAND = 'python3 -c "import sys;exec(bytes.fromhex(sys.stdin.readline()).decode())"'


class Pipe(Protocol):
    """The command's input and output on the server."""

    def write(self, data: bytes) -> None: ...

    def lines(self) -> AsyncIterator[bytes]: ...


async def start(pipe: Pipe) -> None:
    pipe.write(SCRIPT.encode().hex().encode() + b"\n")


def question(what: str, path: bytes) -> bytes:
    return f"{what} {path.hex()}\n".encode()


async def identity(pipe: Pipe, path: bytes) -> str:
    """The identity's token.  Raises SourceNotFound, ProtocolViolation."""
    pipe.write(question("id", path))
    async for line in pipe.lines():
        return _closing(line)
    raise ProtocolViolation("the helper on the server ended")


async def extents(pipe: Pipe, path: bytes) -> tuple[ExtentList, str]:
    """All extents, and the identity they belong to.  Raises SourceChanged and as `identity`."""
    pipe.write(question("map", path))
    ranges: list[bytes] = []
    async for line in pipe.lines():
        if line[:1] in (b"i", b"x"):
            token = _closing(line)
            try:
                return from_data_ranges(_parsed(ranges), int(token.split(":")[2])), token
            except ValueError as exc:
                raise ProtocolViolation(f"the helper's extents make no sense: {exc}") from None
        ranges.append(line)
    raise ProtocolViolation("the helper on the server ended within its answer")


def _parsed(lines: list[bytes]) -> Iterator[tuple[int, int]]:
    for line in lines:
        start, end = line.split()
        yield int(start, 16), int(end, 16)


def _closing(line: bytes) -> str:
    kind, _, rest = line.decode("ascii", "replace").strip().partition(" ")
    if kind == "i" and rest.count(":") == 4:
        return rest
    if kind == "x" and rest == "2":
        raise SourceNotFound("no such file")
    if kind == "x" and rest == "116":
        raise SourceChanged("changed while its extents were read")
    if kind == "x":
        raise ImgfsError(f"the helper failed with errno {rest}")
    raise ProtocolViolation(f"the helper said {line[:80]!r}")
