"""The connection to one host, on the asyncio side of the bridge; shared by all that read there.

A *session* is one connection with its SFTP channels and its helper.  A link has at most one that
is in use, and makes another when that broke:

    none ----> connecting ----> in use ----> lost
      ^            |                          |
      +------------+----- after a pause ------+

Invariants.  There is one attempt at a time, whoever waits for it (`session`), and waiters that go
away do not end it.  A session that anybody found broken is given to nobody any more.
A request that was sent holds its slot until it is answered, even if nobody wants the answer any
more, so the server never has more than `depth` of them.  That is only the bound: how many it has
is for the readers to say, and the cache follows what the line holds (cache/window.py).

The watchdog.  Requests are answered in order, so a slow server is one that answers some
of them and a dead one answers none.  While requests are out and none is answered for
`timeout_s`, the session is lost, with SourceTimeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import asyncssh

from imgfs.errors import (
    HostKeyError,
    ImgfsError,
    LoginRefused,
    SourceTimeout,
    SourceUnreachable,
    UsageError,
)
from imgfs.sources.base import Broken
from imgfs.sources.ssh.errors import ANOTHER_KEY, file_errors, login_errors
from imgfs.sources.ssh.handles import Handles
from imgfs.sources.ssh.helper import Helpers
from imgfs.sources.ssh.lanes import LONG_S, Lanes
from imgfs.sources.ssh.login import Answers, has_known_key, locked_keys, options
from imgfs.sources.ssh.settings import SshSettings
from imgfs.url.source import SshUrl

log = logging.getLogger(__name__)

Result = TypeVar("Result")

SAFE_READ = 32 << 10  # what every SFTP server answers at once
MOST_READ = 1 << 20  # more gains nothing and delays what is behind it
FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 2.0
SFTP_TRIPS = 4  # that it takes to start an SFTP client


class Session:
    """One connection.  `lost` is set once it is of no use, and says why."""

    def __init__(
        self,
        connection: asyncssh.SSHClientConnection,
        sftp: asyncssh.SFTPClient,
        helpers: Helpers,
    ) -> None:
        self.sftp = sftp
        self.lanes = Lanes(connection, sftp)
        self.helpers = helpers
        self.read_size = min(sftp.limits.max_read_len or SAFE_READ, MOST_READ)
        self.lost: SourceUnreachable | None = None
        self._connection = connection

    @property
    def alive(self) -> bool:
        return self.lost is None and not self._connection.is_closed()

    def end(self, why: SourceUnreachable) -> None:
        """Give it up; whoever waits on it gets an error."""
        if self.lost is None:
            self.lost = why
            self._connection.abort()


class SshLink:
    """The way to one host.  All methods run on the bridge's loop."""

    def __init__(self, url: SshUrl, settings: SshSettings) -> None:
        self.settings = settings
        self.where = f"{url.host}:{url.port}" if url.port else url.host
        self._url = url
        self._answers = Answers(settings.prompt) if settings.prompt else None
        self._loop = asyncio.get_running_loop()
        self._session: Session | None = None
        self._connecting: asyncio.Task[Session] | None = None
        self._ever = False
        self._asked = False
        self._pause = 0.0
        self.handles = Handles()
        self._slots = asyncio.Semaphore(settings.depth)
        self._out = 0
        self._quiet_since = 0.0
        self._watchdog: asyncio.TimerHandle | None = None

    async def run(self, work: Callable[[Session], Awaitable[Result]], name: str) -> Result:
        """`await work(session)`; again on a new session when that one broke.

        `name` is what it is about: what is raised of the connection names that.

        Raises SourceUnreachable or SourceTimeout after `timeout_s` without a connection, or at
        once when there has never been one; SourceTimeout when the session fell silent for as
        long; any other ImgfsError at once.
        """
        deadline: float | None = None
        while True:
            try:
                session = await self._get(deadline)
            except Broken as exc:
                failure = exc.error
                if not self._ever:
                    raise self._about(name, failure) from exc
            else:
                try:
                    with file_errors(self.where):
                        result = await work(session)
                    self._pause = 0.0
                    return result
                except Broken as exc:
                    failure = session.lost or exc.error
                    session.end(failure)
                    if isinstance(failure, SourceTimeout):
                        raise self._about(name, failure) from exc
            now = self._loop.time()
            deadline = deadline or now + self.settings.timeout_s
            if now >= deadline:
                raise self._about(name, failure)
            log.info("%s; trying again", failure)

    def _about(self, name: str, failure: SourceUnreachable) -> SourceUnreachable:
        text = str(failure)
        if text.startswith(f"{self.where}: "):
            text = name + text.removeprefix(self.where)
        return type(failure)(text)

    async def request(self, make: Callable[[], Awaitable[Result]]) -> Result:
        """One request to the SFTP server, when a slot is free.

        Not to be cancelled once it was sent: the answer comes all the same.
        """
        async with self._slots:
            if self._out == 0:
                self._quiet_since = self._loop.time()
            self._out += 1
            if self._watchdog is None:
                self._watch()
            session, sent = self._session, self._loop.time()
            try:
                answer = await make()
            finally:
                self._out -= 1
                self._quiet_since = self._loop.time()
            if session is not None:
                session.lanes.answered(self._quiet_since - sent)
            return answer

    async def close(self) -> None:
        """End the connection in good order, as far as the server lets us."""
        if self._connecting is not None:
            self._connecting.cancel()
        session, self._session = self._session, None
        if session is not None:
            session.end(SourceUnreachable(f"{self.where}: the connection was closed"))
        if self._watchdog is not None:
            self._watchdog.cancel()

    def _watch(self) -> None:
        self._watchdog = None
        if self._out == 0:
            return
        patience = self.settings.timeout_s
        left = self._quiet_since + patience - self._loop.time()
        if left > 0:
            self._watchdog = self._loop.call_later(left, self._watch)
        elif self._session is not None:
            self._session.end(SourceTimeout(f"{self.where}: no answer in {patience:g} s"))

    async def _get(self, deadline: float | None) -> Session:
        """The session in use, or one that is made now.  Raises Broken, and ImgfsError for good."""
        if self._session is not None and self._session.alive:
            return self._session
        if self._connecting is None:
            self._connecting = self._loop.create_task(self._connect())
            self._connecting.add_done_callback(self._connected)
        # A person may be typing the first time; asyncssh's own timeouts bound that.
        patience = self.settings.timeout_s if self._ever or not self._answers else None
        at = deadline or (None if patience is None else self._loop.time() + patience)
        attempt = self._connecting
        try:
            async with asyncio.timeout_at(at):
                return await asyncio.shield(attempt)
        except TimeoutError as exc:
            said = f"{self.where}: no connection in {self.settings.timeout_s:g} s"
            raise Broken(SourceTimeout(said)) from exc
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if attempt.cancelled() and this is not None and not this.cancelling():
                raise Broken(SourceUnreachable(f"{self.where}: closed")) from None
            raise

    def _connected(self, task: asyncio.Task[Session]) -> None:
        self._connecting = None
        if task.cancelled():
            return
        if task.exception() is None:
            self._session = task.result()
            self._ever = True

    async def _connect(self) -> Session:
        """One attempt, not sooner than a pause after the last one that came to nothing."""
        await asyncio.sleep(self._pause)
        self._pause = min(LAST_PAUSE_S, max(FIRST_PAUSE_S, self._pause * 2))
        connection: asyncssh.SSHClientConnection | None = None
        try:
            connection = await self._trusting()
            helpers = Helpers(connection, self.settings, self.where)
            in_background(helpers.warm_up())
            begun = self._loop.time()
            with login_errors(self.where):
                async with asyncio.timeout(self.settings.timeout_s):
                    sftp = await connection.start_sftp_client(path_encoding=None)
            if self._loop.time() - begun >= SFTP_TRIPS * LONG_S:
                in_background(helpers.warm_up_maps())
        except BaseException as exc:
            if connection is not None:
                connection.abort()
            if isinstance(exc, ImgfsError) and self._answers is not None:
                self._answers.forget()
            raise
        return Session(connection, sftp, helpers)

    async def _trusting(self) -> asyncssh.SSHClientConnection:
        """As `_log_in`, which does not know one reason of distrust from another."""
        try:
            return await self._log_in()
        except HostKeyError as exc:
            known = False
            with contextlib.suppress(asyncssh.Error, OSError, ValueError):
                known = await asyncio.to_thread(has_known_key, self._url, self.settings)
            if known:
                raise HostKeyError(f"{self.where}: {ANOTHER_KEY}") from exc
            raise

    async def _log_in(self) -> asyncssh.SSHClientConnection:
        """Without a question if that will do: the agent may have the key that a file has locked."""
        if self._answers is not None and not self._asked:
            unasked = options(self._url, self.settings, None)
            # A locked key is passed over, so that the others get their turn.
            unasked["ignore_encrypted"] = True
            try:
                with login_errors(self.where):
                    return await asyncssh.connect(**unasked)
            except LoginRefused:
                log.info("%s: the login needs an answer", self.where)
        try:
            with login_errors(self.where):
                chosen = options(self._url, self.settings, self._answers)
                connection = await asyncssh.connect(**chosen)
        except (LoginRefused, UsageError) as exc:
            if self._answers is None and (said := await self._unasked(exc)):
                raise LoginRefused(said) from exc
            if self._answers is None or isinstance(exc, UsageError) or not self._answers.gave_up:
                raise
            raise LoginRefused(f"{self.where}: {self._answers.gave_up}") from exc
        except TypeError as exc:
            if self._answers is None:
                raise
            # asyncssh 2.24 takes the callable for the passphrase when it has no public key.
            said = f"{self.where}: a locked key needs its public key beside it, in FILE.pub"
            raise UsageError(said) from exc
        self._asked = self._answers is not None
        return connection

    async def _unasked(self, refused: LoginRefused | UsageError) -> str:
        """What to say if it is for keys whose passphrases nobody could be asked for; else empty."""
        is_of_key = isinstance(refused.__cause__, asyncssh.KeyImportError)
        if not (is_of_key or isinstance(refused, LoginRefused)):
            return ""
        locked: list[str] = []
        with contextlib.suppress(asyncssh.Error, OSError, ValueError):
            locked = await asyncio.to_thread(locked_keys, self._url, self.settings)
        if not locked:
            return ""
        why = "" if is_of_key else "the server refused the login, and "
        why += f"there is no terminal to ask for the passphrase of {', '.join(locked)}"
        return f"{self.where}: {why}; load it into the agent with ssh-add"


def in_background(task: Awaitable[Any]) -> asyncio.Future[Any]:
    """A task whose failure interests nobody."""

    def retrieved(done: asyncio.Future[Any]) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            done.exception()

    future = asyncio.ensure_future(task)
    future.add_done_callback(retrieved)
    return future
