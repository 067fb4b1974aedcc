"""One ssh connection to a host, on the asyncio side of the bridge: made when needed, made
again when it broke, shared by all that read there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import asyncssh

from imgfs.errors import (
    HostKeyError,
    LoginRefused,
    ProtocolViolation,
    SourceTimeout,
    SourceUnreachable,
)
from imgfs.sources import ssh_helper
from imgfs.sources.ssh_settings import SshSettings
from imgfs.url import SshUrl

log = logging.getLogger(__name__)

#: AES in hardware is about twice as fast as chacha20, OpenSSH's default, in asyncssh.
CIPHERS = ["aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes256-ctr"]
CIPHERS += ["chacha20-poly1305@openssh.com"]
IN_FLIGHT = 64  # reads under way on one connection
FALLBACK_READ = 32 << 10  # what every SFTP server answers at once
KEEPALIVE_S = 10


class Broken(Exception):
    """The connection is of no use any more; another one may be."""


class HelperPipe:
    """The helper process's input and output."""

    def __init__(self, process: Any) -> None:
        self._process = process

    def write(self, data: bytes) -> None:
        self._process.stdin.write(data)

    async def lines(self) -> AsyncIterator[bytes]:
        while line := await self._process.stdout.readline():
            yield line


class SshLink:
    """The connection to one host.  All methods run on the bridge's loop."""

    def __init__(self, url: SshUrl, settings: SshSettings) -> None:
        self.settings = settings
        self._url = url
        self._where = f"{url.host}:{url.port}" if url.port else url.host
        self._connecting = asyncio.Lock()
        self._asking = asyncio.Lock()
        self._connection: asyncssh.SSHClientConnection | None = None
        self._sftp: asyncssh.SFTPClient | None = None
        self._helper: HelperPipe | None = None
        self.generation = 0  # counts connections, so that handles of an old one are known
        self.slots = asyncio.Semaphore(IN_FLIGHT)
        self.last_answer = 0.0  # loop time of the last read that was answered

    @property
    def read_size(self) -> int:
        """How many bytes one read request may ask for."""
        limit = self._sftp.limits.max_read_len if self._sftp else 0
        return limit or FALLBACK_READ

    async def sftp(self) -> asyncssh.SFTPClient:
        """The SFTP session, connected.  Raises an ImgfsError, Broken where trying again helps."""
        async with self._connecting:
            if self._sftp is None or self._connection is None or self._connection.is_closed():
                self.drop()
                await self._connect()
            assert self._sftp is not None
            return self._sftp

    def drop(self) -> None:
        """Give the connection up; whoever waits on it gets an error."""
        if self._connection is not None:
            self._connection.abort()
        self._connection = self._sftp = self._helper = None

    async def _connect(self) -> None:
        settings = self.settings
        options: dict[str, Any] = {
            "encryption_algs": CIPHERS,
            "compression_algs": None,
            "connect_timeout": settings.timeout_s,
            "login_timeout": settings.timeout_s,
            "keepalive_interval": KEEPALIVE_S,
        }
        if settings.known_hosts is not None:
            options["known_hosts"] = settings.known_hosts
        if settings.identity is not None:
            options["client_keys"] = [settings.identity]
        if self._url.user:
            options["username"] = self._url.user
        port = () if self._url.port is None else (self._url.port,)
        with self.translated():
            self._connection = await asyncssh.connect(self._url.host, *port, **options)
            self._sftp = await self._connection.start_sftp_client()
        self.generation += 1
        self.last_answer = asyncio.get_running_loop().time()

    @contextlib.contextmanager
    def translated(self) -> Any:
        """asyncssh's exceptions as ours; Broken for a connection that is gone."""
        where = self._where
        try:
            yield
        except asyncssh.HostKeyNotVerifiable as exc:
            raise HostKeyError(
                f"{where}: the host key is not trusted ({exc.reason}); connect once with ssh, "
                "or name a file with -o known_hosts="
            ) from exc
        except asyncssh.PermissionDenied as exc:
            raise LoginRefused(
                f"{where}: the server refused the login; load the key into the agent, "
                "or name it with -o identity="
            ) from exc
        except asyncssh.SFTPError as exc:
            if isinstance(exc, asyncssh.SFTPConnectionLost | asyncssh.SFTPNoConnection):
                raise Broken(f"{where}: connection lost") from exc
            raise
        except asyncssh.Error as exc:
            raise Broken(f"{where}: {exc.reason or exc}") from exc
        except TimeoutError as exc:
            raise Broken(f"{where}: does not answer") from exc
        except OSError as exc:
            raise Broken(f"{where}: {exc.strerror or exc}") from exc

    async def ask_helper(self, what: str, path: bytes) -> Any:
        """What the helper says of the path ("id" or "map"); None where there is no helper."""
        await self.sftp()
        async with self._asking:
            try:
                if self._helper is None:
                    self._helper = await self._start_helper()
                ask = ssh_helper.extents if what == "map" else ssh_helper.identity
                async with asyncio.timeout(None if what == "map" else self.settings.timeout_s):
                    return await ask(self._helper, path)
            except (ProtocolViolation, asyncssh.Error, OSError) as exc:
                log.info("%s: no helper on the server: %s", self._where, exc)
                self._helper = None
                return None

    async def _start_helper(self) -> HelperPipe:
        assert self._connection is not None
        process = await self._connection.create_process(
            ssh_helper.COMMAND, encoding=None, stderr=asyncssh.DEVNULL
        )
        pipe = HelperPipe(process)
        await ssh_helper.start(pipe)
        return pipe

    async def attempt(self, work: Any) -> Any:
        """`await work()` on a live connection, again on a new one when it broke, until the timeout.

        Raises SourceUnreachable or SourceTimeout in the end; other errors at once.
        """
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + self.settings.timeout_s, 0.1
        while True:
            try:
                async with asyncio.timeout_at(deadline) as limit:
                    await self.sftp()
                    limit.reschedule(None)
                    with self.translated():
                        return await work()
            except TimeoutError:
                raise SourceTimeout(f"{self._where}: no answer in {self._patience}") from None
            except Broken as exc:
                if self.generation == 0 or loop.time() + pause > deadline:
                    raise SourceUnreachable(str(exc)) from exc
                log.info("%s; trying again", exc)
            await asyncio.sleep(pause)
            pause = min(2.0, pause * 2)

    @property
    def _patience(self) -> str:
        return f"{self.settings.timeout_s:g} s"

    async def wait_for_answer(self, request: asyncio.Task[Any]) -> Any:
        """A request's answer.  While other answers come in it may take its time; when none does for
        the timeout the connection is dropped.  Raises SourceTimeout."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while True:
            silent_since = max(begun, self.last_answer)
            left = silent_since + self.settings.timeout_s - loop.time()
            if left <= 0:
                request.cancel()
                self.drop()
                raise SourceTimeout(f"{self._where}: no answer in {self._patience}")
            done, _ = await asyncio.wait([request], timeout=left)
            if done:
                self.last_answer = loop.time()
                return request.result()
