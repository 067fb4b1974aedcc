"""One open file on a server, on the asyncio side of the bridge.

Whether it is still the file that was opened is told by two things: its size and mtime as
SFTP has them, which cost nothing and are compared after every read; and the helper's exact
token, compared where both times there was one.  A helper that is missing this time says nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import stat
from collections.abc import Iterator
from functools import partial
from typing import Any

from imgfs.errors import (
    NotAnImage,
    SourceChanged,
    SourceNotFound,
    SourceUnreachable,
)
from imgfs.extents import ExtentList
from imgfs.sources.base import Broken, SourceStat
from imgfs.sources.ssh.errors import file_errors
from imgfs.sources.ssh.helper import Look, Ranges
from imgfs.sources.ssh.lanes import Lane, emptiest
from imgfs.sources.ssh.link import Session, SshLink, in_background
from imgfs.sources.ssh.ranges import data_ranges
from imgfs.sources.ssh.reads import Batch
from imgfs.sources.ssh.state import NS, State, state_of
from imgfs.url.source import SshUrl

log = logging.getLogger(__name__)

TRIES = 3  # to see a file that somebody is writing in one state


class SshFile:
    """All methods run on the bridge's loop and raise ImgfsErrors."""

    def __init__(
        self, link: SshLink, url: SshUrl, *, write: bool = False, among_others: bool = False
    ) -> None:
        self.name = url.text
        self.link = link
        self.path = url.path
        self._access = "r+b" if write else "rb"
        self._is_writing = among_others
        self._opening = asyncio.Lock()
        self._session: Session | None = None
        self._file: Any = None
        self.files: dict[Lane, Any] = {}  # the handle in each of the session's lanes
        self._state: State | None = None
        self._users = 0
        self.outlives_name = self.is_nameless = False  #: as a source's
        self.token_file = ""  #: which file it is, where that was told
        self.size = 0
        self.looked: Look | None = None  #: what was seen of it, if it was not opened for that

    @property
    def round_trip_s(self) -> float:
        """0 while there is no connection."""
        return self._session.lanes.trip_s if self._session is not None else 0.0

    async def open(self) -> SourceStat:
        """Raises SourceNotFound, NotAnImage, AccessDenied and what connecting raises."""
        await self.link.run(self._looked_at, self.name)
        assert self._state is not None
        found = self._state.as_stat()
        self.size = found.size
        return found

    async def _looked_at(self, session: Session) -> None:
        """Learn its state: with one request, or by opening it, which takes five.

        A file that was looked at is opened as one that had to give its handle back.
        """
        if self._access == "rb" and self._state is None:
            found = await session.helpers.look(self.path)
            # SFTP has 32 bits for the seconds.
            if found is not None and 0 <= (mtime_s := found.token.mtime_ns // NS) < 1 << 32:
                self._state = State(found.token.size, mtime_s, found.mode, found.token)
                self.looked = found
                return
        await self.opened(session)

    async def check(self) -> None:
        """Raises SourceChanged when another file is under the path now."""

        async def work(session: Session) -> None:
            await self._compared(session)

        await self.link.run(work, self.name)

    async def keep(self) -> None:
        """Have a handle.  Raises as `check`."""

        async def work(session: Session) -> None:
            await self.opened(session)

        await self.link.run(work, self.name)

    def moved(self, url: SshUrl) -> None:
        """It has this name now."""
        self.name, self.path = url.text, url.path
        self.is_nameless = False

    def lost_name(self) -> None:
        """From now on it is what its handles lead to, for as long as they live."""
        self.token_file = self.place[1] or self.token_file
        self.is_nameless = True

    async def begin_writing(self) -> None:
        """From now on only another file under the path counts as a change; raises as `check`."""
        await self.check()
        self._is_writing = True

    async def pin(self, size: int | None) -> SourceStat:
        """What it is now it is to be from now on, unless it is another file, or of another size.

        Of None any size will do.
        """

        async def work(session: Session) -> State:
            found = await self._compared(session)
            is_same = size in (None, found.as_stat().size)
            if not is_same and not self.is_nameless and await self.goes_on(session):
                found = await self._look(session)
            return found

        found = await self.link.run(work, self.name)
        stat_ = found.as_stat()
        if size not in (None, stat_.size):
            said = f"has {stat_.size} bytes, and {size} were written"
            raise SourceChanged(f"{self.name}: {said}; open it again")
        self._state = found
        self.size = stat_.size
        self._is_writing = False
        return stat_

    @property
    def is_device(self) -> bool:
        """Of one that is open."""
        return self._state is not None and stat.S_ISBLK(self._state.mode)

    @property
    def place(self) -> tuple[bytes, str]:
        """The path, and what tells which file is meant by it; empty: nothing does."""
        token = self._state.token if self._state is not None else None
        if self.is_nameless:
            return self.path, ""
        return self.path, token.file if token is not None and token.exact else ""

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of the file that was opened.

        The pieces are requested all at once, and behind them the file's attributes by path, which
        the server answers last: what it read before that belongs to what it says then.
        """

        async def work(session: Session) -> bytes:
            with self.used():
                await self.opened(session)
                lane = emptiest(self.files)
                return await Batch(self, session, lane, self.files[lane]).run(offset, length)

        return await self.link.run(work, self.name)

    async def peek(self, ranges: Ranges) -> list[bytes] | None:
        """Some short ranges with one request, of a file that is not open; None: read them."""

        async def work(session: Session) -> list[bytes] | None:
            if self._file is not None:
                return None
            known = self.state.token
            found = await session.helpers.peek(self.path, ranges)
            if found is None or known is None or not known.exact:
                return None
            if found[1] != known:
                raise SourceChanged(f"{self.name}: changed since it was opened")
            return found[0]

        return await self.link.run(work, self.name)

    async def extents(self) -> ExtentList | None:
        """All extents; None where the server cannot tell.  Raises SourceChanged."""

        async def work(session: Session) -> ExtentList | None:
            with self.used(), self.gone_is_changed():
                file, settings = await self.opened(session), self.link.settings
                found = None
                if self.size and settings.extents:
                    found = await data_ranges(file, self.name, self.size, settings.timeout_s)
                is_certain = False
                if found is None and not self.is_nameless:
                    found, is_certain = await self._walked(session)
                    if self.is_nameless:
                        found = None  # that was another file's
                if not is_certain:
                    await self._compared(session)
            return found

        return await self.link.run(work, self.name)

    async def close(self) -> None:
        """Give the handle back; does not wait for the server."""
        self.link.handles.forget(self)
        self.let_go()

    @property
    def is_idle(self) -> bool:
        return self._users == 0 and not self._opening.locked() and not self.is_nameless

    def let_go(self) -> None:
        """Give the handles back for now; the next read opens the file again, and compares."""
        files, session = self.files, self._session
        self._file = self._session = None
        self.files = {}
        if session is not None and session.alive:
            for file in files.values():
                in_background(self.link.request(file.close))

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1

    async def attributes(self, lane: Lane) -> State:
        """As SFTP has them, by path if it has one."""
        with file_errors(self.name):
            if self.is_nameless:
                return await self._by_handle(self.files[lane])
            attrs = await self.link.request(lambda: lane.sftp.stat(self.path))
        return state_of(attrs, None)

    async def _by_handle(self, file: Any) -> State:
        return state_of(await self.link.request(file.stat), None)

    @property
    def state(self) -> State:
        """What it was when it was opened, or pinned; another object after each."""
        assert self._state is not None
        return self._state

    def compare(self, found: State, known: State) -> None:
        """Raises SourceChanged when what the server said is not of the opened file.

        `known` was `state` before the server was asked: if it is no more, writes of our own ended
        in between, and what was found may be any state between the two.
        """
        is_quiet = not self._is_writing and known is self._state
        if (found.differs if is_quiet else found.is_another)(self.state):
            raise SourceChanged(f"{self.name}: changed since it was opened")

    async def _compared(self, session: Session) -> State:
        """What is under the path now; raises SourceChanged when that is another."""
        known = self.state
        try:
            with self.gone_is_changed():
                found = await self._look(session)
            self.compare(found, known)
        except SourceChanged:
            if not await self.goes_on(session):
                raise
            known = self.state
            found = await self._look(session)
            self.compare(found, known)
        return found

    async def goes_on(self, session: Session) -> bool:
        """The name does not lead to what was opened.  Is that file there all the same, as it was?

        Then it has no name from now on.
        """
        for _ in range(TRIES):
            path, known, is_writing = self.path, self._state, self._is_writing
            if self.is_nameless:
                return True
            if not self.outlives_name or self._session is not session or self._file is None:
                return False
            with file_errors(self.name):
                ours = await self._by_handle(self._file)
            try:
                found = await self._look(session)
            except SourceNotFound:
                found = None
            if (path, known, is_writing) != (self.path, self._state, self._is_writing):
                continue  # writes of our own have begun or ended, or it got another name
            assert known is not None
            if found is not None:
                is_told = found.token is not None and found.token.exact and self.place[1]
                if not (found.is_another(known) if is_told else found.differs(ours)):
                    return False
            if not is_writing and ours.differs(known):
                return False
            self.lost_name()
            self._state = ours
            return True
        return False

    @contextlib.contextmanager
    def gone_is_changed(self) -> Iterator[None]:
        try:
            yield
        except SourceNotFound as exc:
            raise SourceChanged(f"{self.name}: was deleted since it was opened") from exc

    async def opened(self, session: Session) -> Any:
        """The handle, of this session; a file that was opened before must be the same."""
        if self._session is session and self._file is not None:
            self.link.handles.used(self)
            return self._file
        async with self._opening:
            if self._session is session and self._file is not None:
                return self._file
            if self.is_nameless:
                said = "its name is gone, and so is the connection by which it was open"
                raise SourceChanged(f"{self.name}: {said}: what was not synced may be lost")
            if self._state is None:
                self._file, self._state = await self._open_one(session)
            else:
                known = self._state
                with self.gone_is_changed():
                    file, state = await self._open_one(session)
                self.compare(state, known)
                self._file = file
            self._session = session
            self.files = {session.lanes.first: self._file}
            self.link.handles.used(self)
            in_background(self._spread(session))
            return self._file

    async def _spread(self, session: Session) -> None:
        """Open the file in the session's other lanes, too.

        What is there at the end is in the state that was opened, and so it was in between: who
        puts a file away and back changes its ctime.
        """
        lanes = [] if self.is_nameless else await session.lanes.widen()
        files: dict[Lane, Any] = {}

        async def one(lane: Lane) -> None:
            files[lane] = await self.link.request(partial(self._open_in, lane))
            known = self.state
            self.compare(state_of(await self.link.request(files[lane].stat), None), known)

        try:
            if lanes:
                await asyncio.gather(*map(one, lanes))
                await self._compared(session)
            # In these the name may have led elsewhere already.
            if self._session is session and not self.is_nameless:
                self.files |= files
                files = {}
        finally:
            for file in files.values():
                in_background(self.link.request(file.close))

    async def _open_in(self, lane: Lane) -> Any:
        return await lane.sftp.open(self.path, self._access, block_size=0)

    async def _open_one(self, session: Session) -> tuple[Any, State]:
        """A handle and the state of what it leads to, both of one file in one state."""
        for _ in range(TRIES):
            before = await self._look(session)
            with file_errors(self.name):
                file = await self.link.request(partial(self._open_in, session.lanes.first))
                attrs, after = await asyncio.gather(
                    self.link.request(file.stat), self._look(session)
                )
            opened = state_of(attrs, None)
            differs = before.is_another if self._is_writing else before.differs
            if not (differs(after) or differs(opened)):
                session.helpers.agrees = after.is_told_alike
                return file, after
            in_background(self.link.request(file.close))
        raise SourceChanged(f"{self.name}: is being written to")

    async def _look(self, session: Session) -> State:
        """What is under the path now; of a file without a name: that file."""
        if self.is_nameless:
            with file_errors(self.name):
                return await self._by_handle(await self.opened(session))
        found, token = await asyncio.gather(
            self.attributes(session.lanes.first), session.helpers.identity(self.path)
        )
        kind = stat.S_IFMT(found.mode)
        if kind == stat.S_IFDIR:
            raise NotAnImage(
                f"{self.name}: is a directory; for all images in it write a / at its end"
            )
        if kind not in (0, stat.S_IFREG, stat.S_IFBLK):
            raise NotAnImage(f"{self.name}: is neither a file nor a block device")
        if not session.alive:
            raise Broken(session.lost or _lost(self.name))
        if kind == stat.S_IFBLK and (token is None or not token.exact):
            raise NotAnImage(f"{self.name}: a device's size needs python3 on the server")
        if kind != stat.S_IFBLK and token is not None and token.size != found.size:
            token = None  # written to in between; what SFTP says is compared
        return State(found.size, found.mtime_s, found.mode, token)

    async def _walked(self, session: Session) -> tuple[ExtentList | None, bool]:
        """Extents from the helper, and whether they are certainly of the state that was opened."""
        for attempt in range(TRIES):
            try:
                answer = await session.helpers.extents(self.path, self.size)
            except (SourceChanged, SourceNotFound) as exc:
                if await self.goes_on(session):
                    return None, False
                if attempt + 1 == TRIES or isinstance(exc, SourceNotFound):
                    raise SourceChanged(f"{self.name}: {exc}") from exc
                continue
            if answer is None:
                if not session.alive:
                    raise Broken(session.lost or _lost(self.name))
                return None, False
            found, token = answer
            known = self.state.token
            if known is not None and known.exact == token.exact and known != token:
                if await self.goes_on(session):
                    return None, False
                raise SourceChanged(f"{self.name}: changed since it was opened")
            return found, token.exact and known == token
        raise AssertionError("unreachable")


def _lost(name: str) -> SourceUnreachable:
    return SourceUnreachable(f"{name}: the connection was lost")
