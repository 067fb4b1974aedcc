"""Exact identity and extents from the server, which SFTP knows nothing of.

A command is run there (see ssh_scripts): the first of python3, perl and qemu-img that answers.
One process is kept for identities; maps have others, so that a long walk
keeps nobody waiting.  To start one takes three round trips, so where those are long one of each
kind is started with the connection.  No failure here is an error: without an answer the file is all
data, and its identity is what SFTP tells.  Nothing that the server says is believed before it was
checked: ranges ascend inside the size, an answer has an end, and lines and lists are bounded.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import json
import logging
from array import array
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import asyncssh

from imgfs.errors import ImgfsError, SourceChanged, SourceNotFound
from imgfs.extents import ExtentList, ExtentListBuilder, Flags
from imgfs.sources.base import Glimpse
from imgfs.sources.ssh.scripts import HELPERS
from imgfs.sources.ssh.settings import SshSettings

log = logging.getLogger(__name__)

Told = TypeVar("Told")
Ranges = Sequence[tuple[int, int]]  #: (offset, length) in bytes

HELLO = b"imgfs helper"
NOISE_LINES = 100  # that a login shell may print before
LONGEST_LINE = 1 << 20
MOST_BOUNDARIES = 32 << 20  # 256 MiB of them
MOST_IDLE = 1
MAPS_AT_ONCE = 4  # OpenSSH allows ten channels on a connection
START_S = 10.0
HOLE = Flags.HOLE | Flags.ZERO


class NoHelper(Exception):
    """There is no such helper, or it does not do what it should."""


@dataclass(frozen=True, slots=True)
class Token:
    """What the helper says of a file's state: exact, or only size and mtime."""

    exact: bool
    text: str

    @property
    def size(self) -> int:
        return int(self.text.split(":")[2 if self.exact else 0])

    @property
    def file(self) -> str:
        """Of an exact one: which file it is, in whatever state."""
        return ":".join(self.text.split(":")[:2])

    @property
    def mtime_ns(self) -> int:
        parts = self.text.split(":")
        return int(parts[3]) if self.exact else int(parts[1]) * 1_000_000_000

    @property
    def ctime_ns(self) -> int:
        """Of an exact one."""
        return int(self.text.split(":")[4])


@dataclass(frozen=True, slots=True)
class Look:
    """All of a file that opening it needs; `extents` are None where they are many."""

    token: Token
    mode: int
    glimpse: Glimpse
    extents: ExtentList | None


class Helper:
    """One helper process.  Every method may raise NoHelper, after which it is of no use."""

    def __init__(self, process: Any, kind: str, timeout_s: float) -> None:
        self._process = process
        self._kind = kind
        self._timeout_s = timeout_s
        self._pending = bytearray()
        self.has_answered = False  #: and was kept after that

    async def greet(self) -> None:
        """Send the program and wait until it runs."""
        self._process.stdin.write(HELPERS[self._kind][1] + b"\n")
        for _ in range(NOISE_LINES):
            if await self._line(START_S) == HELLO:
                return
        raise NoHelper("it does not say hello")

    async def identity(self, path: bytes) -> Token:
        """Raises SourceNotFound; ImgfsError when the server refuses."""
        self._ask(b"id", path)
        return _closing(await self._line())

    async def look(self, path: bytes) -> Look:
        """Only of python3.  Raises SourceChanged, and as `identity` does."""
        self._ask(b"look", path)
        line = await self._line()
        if not line.startswith(b"b "):
            _closing(line)
            raise NoHelper("it does not say what it saw")
        token = _closing(await self._line())
        try:
            mode, whole, head, tail, *distances = line[2:].split()
            glimpse = Glimpse(token.size, _bytes(head), _bytes(tail))
            found: array[int] = array("Q")
            if distances:
                _extend(found, map(int, distances))
            if (found and found[-1] > token.size) or not glimpse.is_right or not token.exact:
                raise ValueError("not of its size")
            extents = from_boundaries(found, token.size) if whole == b"1" else None
            return Look(token, int(mode, 8), glimpse, extents)
        except (ValueError, OverflowError) as exc:
            raise NoHelper(f"what it saw makes no sense ({exc})") from None

    async def peek(self, path: bytes, ranges: Ranges) -> tuple[list[bytes], Token]:
        """Only of python3: some short ranges.  Raises SourceChanged, and as `identity` does."""
        self._ask(b"peek", path, *(b"%d %d" % each for each in ranges))
        line = await self._line()
        if not line.startswith(b"p "):
            _closing(line)
            raise NoHelper("it does not say what it read")
        token = _closing(await self._line())
        try:
            parts = [
                b"" if word == b"-" else binascii.a2b_base64(word, strict_mode=True)
                for word in line[2:].split()
            ]
        except ValueError as exc:
            raise NoHelper(f"what it read makes no sense ({exc})") from None
        if [len(part) for part in parts] != [length for _, length in ranges]:
            raise NoHelper("it read something else")
        return parts, token

    async def extents(self, path: bytes, size: int) -> tuple[ExtentList, Token]:
        """All extents, and the state that they belong to.

        Raises SourceChanged when the file changed meanwhile, and as `identity` does.
        """
        self._ask(b"map", path)
        read = self._json if self._kind == "qemu-img" else self._boundaries
        found, last = await read(size)
        token = _closing(last)
        if token.size != size:
            raise SourceChanged("its size has changed")
        return found, token

    async def punch(self, path: bytes, file: str, offset: int, length: int) -> None:
        """Make a hole.  Raises ImgfsError where that cannot be, or when it is another file."""
        self._ask(b"punch", path, f"{file}:{offset}:{length}".encode())
        _closing(await self._line())

    async def set_mtime(self, path: bytes, file: str, mtime_ns: int | None) -> None:
        """None: now.  Raises ImgfsError where that cannot be, or when it is another file."""
        self._ask(b"utime", path, f"{file}:{-1 if mtime_ns is None else mtime_ns}".encode())
        _closing(await self._line())

    def close(self) -> None:
        """The process ends when its input does."""
        with contextlib.suppress(OSError, asyncssh.Error):
            self._process.stdin.write_eof()
        self._process.close()

    def _ask(self, what: bytes, path: bytes, *more: bytes) -> None:
        words = (what, HELPERS[self._kind][2](path), *more)
        self._process.stdin.write(b" ".join(words) + b"\n")

    async def _line(self, timeout_s: float | None = None) -> bytes:
        """The next line without its end.  A silence of the timeout is NoHelper."""
        searched = 0
        while (end := self._pending.find(b"\n", searched)) < 0:
            searched = len(self._pending)
            if searched > LONGEST_LINE:
                raise NoHelper("its line has no end")
            try:
                async with asyncio.timeout(timeout_s or self._timeout_s):
                    more = await self._process.stdout.read(1 << 16)
            except (asyncssh.Error, OSError) as exc:
                raise NoHelper(str(exc) or "it does not answer") from exc
            if not more:
                raise NoHelper("it ended")
            self._pending += more
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        return line

    async def _boundaries(self, size: int) -> tuple[ExtentList, bytes]:
        found: array[int] = array("Q")
        while (line := await self._line()).startswith(b"d "):
            try:
                _extend(found, map(int, line[2:].split()))
            except (ValueError, OverflowError) as exc:
                raise NoHelper(f"its ranges make no sense ({exc})") from None
            if len(found) > MOST_BOUNDARIES or found[-1] > size:
                raise NoHelper("its ranges are too many or too far")
        return from_boundaries(found, size), line

    async def _json(self, size: int) -> tuple[ExtentList, bytes]:
        builder = ExtentListBuilder()
        while (line := (await self._line()).strip())[:1] not in (b"i", b"j", b"x"):
            text = line.strip(b"[], ")
            if text:
                _append_json(builder, text, size)
        if builder.end < size and line[:1] != b"x":
            raise NoHelper("qemu-img's map is not whole")
        if builder.end < size:
            builder.append(size, Flags.DATA)
        return builder.finish(size), line


def _bytes(word: bytes) -> bytes:
    return b"" if word == b"-" else bytes.fromhex(word.decode("ascii", "replace"))


def _extend(found: array[int], distances: Iterable[int]) -> None:
    """Append boundaries given by their distances; only the very first may be 0."""
    fresh = array("Q", distances)
    if not fresh or len(fresh) % 2:
        raise ValueError("not in pairs")
    if min(fresh[1:]) == 0 or (found and fresh[0] == 0):
        raise ValueError("not ascending")
    fresh[0] += found[-1] if found else 0
    found.extend(accumulate(fresh))


def from_boundaries(found: array[int], size: int) -> ExtentList:
    """Extents from ascending start, end, start, end … of data within `size`; packed all along."""
    if not size:
        return ExtentListBuilder().finish(0)
    hole_first = not found or found[0] > 0
    if not hole_first:
        del found[0]
    if not found or found[-1] < size:
        found.append(size)
    pair = bytes([HOLE, Flags.DATA] if hole_first else [Flags.DATA, HOLE])
    flags = (pair * (len(found) // 2 + 1))[: len(found)]
    return ExtentList(0, found, flags)


def _append_json(builder: ExtentListBuilder, text: bytes, size: int) -> None:
    try:
        item = json.loads(text)
        start, length, zero = item["start"], item["length"], item["zero"]
        if length <= 0 or zero not in (True, False):
            raise ValueError(f"at {start}")
        if start >= size:  # it rounds up to a sector
            return
        end = min(start + length, size)
        if start != builder.end:
            raise ValueError(f"at {start}")
        builder.append(end, HOLE if zero else Flags.DATA)
    except (ValueError, KeyError, TypeError, OverflowError) as exc:
        raise NoHelper(f"qemu-img's map makes no sense ({exc})") from None


def _closing(line: bytes) -> Token:
    kind, _, rest = line.decode("ascii", "replace").partition(" ")
    parts = rest.split(":")
    if (kind, len(parts)) in (("i", 5), ("j", 2)) and all(p.lstrip("-").isdigit() for p in parts):
        return Token(kind == "i", rest)
    if kind == "x" and rest == "2":
        raise SourceNotFound("no such file")
    if kind == "x" and rest == "116":
        raise SourceChanged("changed while its extents were read")
    if kind == "x":
        raise ImgfsError(f"the helper on the server failed with errno {rest[:9]}")
    raise NoHelper(f"it said {line[:80]!r}")


class Helpers:
    """The helpers of one connection."""

    def __init__(self, connection: Any, settings: SshSettings, where: str) -> None:
        self._connection = connection
        self._settings = settings
        self._where = where
        self._kinds = list(settings.helpers) if settings.extents else []
        #: was seen to tell of the same files as SFTP, and not otherwise since
        self.agrees = False
        self._kept: Helper | None = None
        self._idle: list[Helper] = []  # for maps
        self._asking = asyncio.Lock()
        self._warming = asyncio.Lock()  # held while the first process for maps starts
        self._mapping = asyncio.Semaphore(MAPS_AT_ONCE)

    async def warm_up(self) -> None:
        """Start the process that tells identities, so that the first need not wait for it."""
        async with self._asking:
            self._kept = self._kept or await self._start()

    async def warm_up_maps(self) -> None:
        """Start a process for maps, which the first then need not wait for."""
        async with self._warming:
            helper = await self._start()
            if helper is not None:
                self._put_back(helper)

    async def identity(self, path: bytes) -> Token | None:
        """The file's state, or None where nobody can tell.  Raises SourceNotFound."""
        return await self._told(lambda helper: helper.identity(path))

    async def look(self, path: bytes) -> Look | None:
        """All that opening a file needs, or None where that is to be found out otherwise."""
        return await self._seen(lambda helper: helper.look(path))

    async def peek(self, path: bytes, ranges: Ranges) -> tuple[list[bytes], Token] | None:
        """Some short ranges, or None where they are to be read otherwise."""
        return await self._seen(lambda helper: helper.peek(path, ranges))

    async def _seen(self, ask: Callable[[Helper], Awaitable[Told]]) -> Told | None:
        if not self.agrees or not self._kinds or self._kinds[0] != "python3":
            return None
        try:
            return await self._told(ask)
        except SourceNotFound:
            return None  # the server's own words for it are better

    async def _told(self, ask: Callable[[Helper], Awaitable[Told]]) -> Told | None:
        async with self._asking:
            helper = self._kept or await self._start()
            if helper is None:
                return None
            self._kept = None
            try:
                told = await ask(helper)
            except ImgfsError as exc:  # an answer, so the process is in order
                self._kept = helper
                if isinstance(exc, SourceNotFound):
                    raise
                self._gone(exc)
                return None
            except NoHelper as exc:
                self._gone(exc)
                helper.close()
                return None
            except asyncio.CancelledError:
                helper.close()
                raise
            self._kept = helper
            return told

    async def extents(self, path: bytes, size: int) -> tuple[ExtentList, Token] | None:
        """All extents, or None where nobody can tell.  Raises SourceChanged, SourceNotFound."""
        async with self._mapping:
            async with self._warming:
                pass
            while (helper := self._idle.pop() if self._idle else await self._start()) is not None:
                try:
                    found = await helper.extents(path, size)
                except ImgfsError as exc:  # an answer, so the process is in order
                    self._put_back(helper)
                    if isinstance(exc, SourceChanged | SourceNotFound):
                        raise
                    self._gone(exc)
                    return None
                except NoHelper as exc:
                    self._gone(exc)
                    helper.close()
                    if not helper.has_answered:
                        return None
                    continue  # it was an old one, and may have ended by itself
                except BaseException:
                    helper.close()
                    raise
                self._put_back(helper)
                return found
            return None

    async def can_change(self) -> bool:
        """Has the server what makes holes, and sets times?"""
        async with self._asking:
            self._kept = self._kept or await self._start()
        return bool(self._kinds) and self._kinds[0] == "python3"

    async def punch(self, path: bytes, file: str, offset: int, length: int) -> bool:
        """Make a hole in the file that is told by `file`; False: it was not made."""
        return await self._changed(file, lambda helper: helper.punch(path, file, offset, length))

    async def set_mtime(self, path: bytes, file: str, mtime_ns: int | None) -> bool:
        """Of the file that is told by `file`; None: now.  False: it was not set."""
        if mtime_ns is not None and mtime_ns < 0:
            return False
        return await self._changed(file, lambda helper: helper.set_mtime(path, file, mtime_ns))

    async def _changed(self, file: str, change: Callable[[Helper], Awaitable[None]]) -> bool:
        if not file or not await self.can_change():
            return False
        async with self._mapping:
            helper = self._idle.pop() if self._idle else await self._start()
            if helper is None:
                return False
            try:
                await change(helper)
            except ImgfsError as exc:  # an answer, so the process is in order
                self._put_back(helper)
                self._gone(exc)
                return False
            except BaseException as exc:
                helper.close()
                if isinstance(exc, NoHelper):
                    self._gone(exc)
                    return False
                raise
            self._put_back(helper)
            return True

    def _put_back(self, helper: Helper) -> None:
        """A start costs more than most maps; but no more processes than that wait there."""
        helper.has_answered = True
        if len(self._idle) < MOST_IDLE:
            self._idle.append(helper)
        else:
            helper.close()

    async def _start(self) -> Helper | None:
        """The first kind that answers; those that do not are not tried again."""
        while self._kinds:
            kind = self._kinds[0]
            process = None
            try:
                async with asyncio.timeout(START_S):
                    process = await self._connection.create_process(
                        HELPERS[kind][0], encoding=None, stderr=asyncssh.DEVNULL
                    )
                    helper = Helper(process, kind, self._settings.timeout_s)
                    await helper.greet()
                    return helper
            except (NoHelper, asyncssh.Error, OSError) as exc:
                if process is not None:
                    process.close()
                log.info("%s: no %s helper there: %s", self._where, kind, exc)
                if kind in self._kinds:
                    self._kinds.remove(kind)
        return None

    def _gone(self, exc: Exception) -> None:
        log.info("%s: the helper there failed: %s", self._where, exc)
