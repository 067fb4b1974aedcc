"""Writing to a file on a server, on the asyncio side of the bridge.

The pieces of a write are requested all at once, over all lanes, as those of a read are.  A sync is
fsync@openssh.com (OpenSSH's PROTOCOL, section 4.6), on an SFTP channel of its own: sftp-server
serves one request after the other, and a disk may take minutes for this one.  What is longest in
silence is no dead server, so a small request is asked elsewhere now and then, and the link's
watchdog judges by that.

When the connection was lost the server may have crashed, and with it what it had answered and not
synced: the next sync fails, though the file can be reached again.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

import asyncssh

from imgfs.errors import (
    AccessDenied,
    ImgfsError,
    NeverDurable,
    NoSpace,
    NotDurable,
    NotPermitted,
    UnsupportedFeature,
)
from imgfs.image import Buffer
from imgfs.sources.ssh.errors import file_errors
from imgfs.sources.ssh.file import SshFile
from imgfs.sources.ssh.lanes import emptiest
from imgfs.sources.ssh.link import Session, in_background
from imgfs.sources.ssh.state import NS

SAFE_WRITE = 32 << 10  # what every SFTP server takes
MOST_WRITE = 1 << 20
ZEROES = 1 << 20  # written at once where the server cannot make a hole
PING_S = 5.0


class SshWriter:
    """Writes to `file`, which was opened for that.  All methods run on the bridge's loop."""

    def __init__(self, file: SshFile) -> None:
        self._file = file
        self._link = file.link
        self._unsynced: Session | None = None  # that answered the oldest write not synced

    async def write(self, offset: int, data: Buffer) -> None:
        """Raises NoSpace, AccessDenied, SourceChanged, and what connecting raises."""
        view = memoryview(data)

        async def work(session: Session) -> None:
            with self._file.used():
                await self._file.opened(session)
                step = min(session.sftp.limits.max_write_len or SAFE_WRITE, MOST_WRITE)
                pieces = [
                    in_background(self._piece(session, offset + at, view[at : at + step]))
                    for at in range(0, len(view), step)
                ]
                # Unlike gather it leaves them alone when this is cancelled.
                await asyncio.wait(pieces)
                for piece in pieces:
                    piece.result()
            self._unsynced = self._unsynced or session

        await self._link.run(work, self._file.name)

    async def can_punch(self) -> bool:
        """Is there somebody on the server who can?"""

        async def work(session: Session) -> bool:
            return await session.helpers.can_change()

        return await self._link.run(work, self._file.name)

    async def zero(self, offset: int, length: int) -> None:
        """By a hole if the server can make one; else zeroes are written.  Raises as `write`."""

        async def work(session: Session) -> bool:
            await self._file.opened(session)
            done = await session.helpers.punch(*self._file.place, offset, length)
            if done:
                self._unsynced = self._unsynced or session
            return done

        if not await self._link.run(work, self._file.name):
            zeroes = memoryview(bytes(min(length, ZEROES)))
            for at in range(offset, offset + length, ZEROES):
                await self.write(at, zeroes[: offset + length - at])

    async def resize(self, size: int) -> None:
        """Raises as `write` does."""

        async def work(session: Session) -> None:
            with self._file.used(), file_errors(self._file.name):
                file = await self._file.opened(session)
                await self._link.request(partial(file.truncate, size))
            self._unsynced = self._unsynced or session

        await self._link.run(work, self._file.name)

    async def set_mtime(self, mtime_ns: int | None) -> None:
        """None: now.  SFTP 3 has whole seconds, the helper all of it.

        Raises NotPermitted, and as `write` does.
        """

        async def work(session: Session) -> None:
            with self._file.used():
                file = await self._file.opened(session)
                if await session.helpers.set_mtime(*self._file.place, mtime_ns):
                    return
                seconds = time.time() if mtime_ns is None else mtime_ns // NS
                with file_errors(self._file.name):
                    found = await self._link.request(file.stat)
                    times = found.atime or 0, seconds
                    await self._link.request(lambda: file.utime(times))

        try:
            await self._link.run(work, self._file.name)
        except AccessDenied as exc:
            raise NotPermitted(f"{self._file.name}: only its owner may set its times") from exc

    async def sync(self) -> None:
        """Raises NeverDurable when the server cannot, NotDurable when it may have lost what it had
        answered."""
        # Writes that are answered from now on may be for the next sync.
        before, self._unsynced = self._unsynced, None
        found: list[Session] = []

        async def work(session: Session) -> None:
            with self._file.used():
                main = await self._file.opened(session)
                await self._sync(session, main)
            found.append(session)

        try:
            await self._link.run(work, self._file.name)
        except UnsupportedFeature as exc:
            said = "the server has no fsync@openssh.com: what was written may not survive a crash"
            raise NeverDurable(f"{self._file.name}: {said} there") from exc
        except BaseException:
            self._unsynced = before or self._unsynced
            raise
        if before is not None and before is not found[-1]:
            said = "the connection was lost before what had been written was synced"
            raise NotDurable(f"{self._file.name}: {said}; write it again")

    async def _piece(self, session: Session, offset: int, data: memoryview) -> None:
        files = self._file.files
        lane = emptiest(files)
        with lane.asking(len(data)):
            try:
                with file_errors(self._file.name):
                    await self._link.request(partial(files[lane].write, bytes(data), offset))
            except ImgfsError as exc:
                if type(exc) is ImgfsError and await self._is_full(session, len(data)):
                    said = "no space is left on the server's disk"
                    raise NoSpace(f"{self._file.name}: {said}") from exc
                raise

    async def _is_full(self, session: Session, length: int) -> bool:
        """SFTP 3 has no word for it."""
        path = self._file.path
        try:
            with file_errors(self._file.name):
                found = await self._link.request(lambda: session.sftp.statvfs(path))
        except ImgfsError:
            return False
        return int(found.bavail) * int(found.frsize or found.bsize) < length

    async def _sync(self, session: Session, main: Any) -> None:
        with file_errors(self._file.name):
            file = await self._opened_apart(session) or main
            try:
                if file is not main:
                    # What the path leads to is another file if somebody has put one there.
                    ours, there = await asyncio.gather(self._link.request(main.stat), file.stat())
                    if (ours.size, ours.mtime) != (there.size, there.mtime):
                        await self._patiently(session, main)
                        return
                await self._patiently(session, file)
            finally:
                if file is not main:
                    in_background(file.close())

    async def _opened_apart(self, session: Session) -> Any:
        """Another handle, in a lane of its own; None where there is none to be had."""
        if self._file.is_nameless:
            return None
        apart = await session.lanes.apart()
        if apart is None:
            return None
        try:
            return await apart.sftp.open(self._file.path, "r+b")
        except asyncssh.SFTPNoSuchFile:
            return None

    async def _patiently(self, session: Session, file: Any) -> None:
        """The request, for as long as the server is alive."""
        syncing = in_background(file.fsync())
        while not syncing.done():
            await asyncio.wait([syncing], timeout=PING_S)
            if not syncing.done():
                in_background(self._link.request(lambda: session.sftp.stat(self._file.path)))
        try:
            syncing.result()
        except asyncssh.SFTPConnectionLost:
            raise
        except asyncssh.SFTPFailure as exc:
            raise NotDurable(f"{self._file.name}: the server could not sync it") from exc
