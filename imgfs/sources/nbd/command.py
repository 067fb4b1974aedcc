"""A server that imgfs starts by systemd's socket activation, and ends.

imgfs binds a unix socket, the server inherits it listening, and imgfs connects to it.  The socket
has no name any more by then: it is reached through a descriptor of its inode, so that nothing is
left behind whatever happens, and nobody else can connect.  The server gets SIGTERM when it is no
longer needed, SIGKILL two seconds later, and SIGTERM from the kernel when imgfs dies
(PR_SET_PDEATHSIG).

    none ----> running ----> ended (by itself) ----> running, at the next attempt to connect
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from imgfs.daemon.processes import Watched
from imgfs.errors import ImgfsError, SourceUnreachable, UsageError
from imgfs.url.nbd import NbdCommand, NbdUrl
from imgfs.url.text import one_line

log = logging.getLogger(__name__)

END_S = 2.0  # how long a server may take to end
BACKLOG = 16
LAUNCH = Path(__file__).with_name("launch.py")
MOST_LINE = 1000  # bytes of what it says that are kept


@dataclass(slots=True, eq=False)
class Running:
    """A process, its end, and the descriptor of its socket's inode."""

    process: subprocess.Popen[bytes]
    ended: Watched
    inode: int
    silent: trio.Event = field(default_factory=trio.Event)  #: it has closed its stderr
    last_line: str = ""

    @property
    def url(self) -> NbdUrl:
        path = f"/proc/self/fd/{self.inode}"
        return NbdUrl("unix", False, None, "", None, b"", os.fsencode(path))


def listen() -> tuple[socket.socket, int]:
    """[blocks] A listening unix socket without a name, and a descriptor to reach it by."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        with tempfile.TemporaryDirectory(prefix="imgfs-") as private:  # 0700
            path = Path(private, "nbd")
            listener.bind(str(path))
            inode = os.open(path, os.O_PATH | os.O_CLOEXEC)
        listener.listen(BACKLOG)
        return listener, inode
    except BaseException:
        listener.close()
        raise


async def start_command(
    words: tuple[str, ...], directory: Path, nursery: trio.Nursery, fds: Sequence[int] = ()
) -> Running:
    """Start a server that takes its socket as sd_listen_fds(3) says, and has `fds` too.

    Raises UsageError when the directory is gone, or no process can be made.  What it says on stderr
    is logged by a task in `nursery`.  To be ended with `end_command`.
    """
    try:
        listener, inode = await trio.to_thread.run_sync(listen)
    except OSError as exc:
        raise UsageError(f"{one_line(words[0])}: no socket for it: {exc.strerror}") from exc
    with listener:
        pid, fd = str(os.getpid()), str(listener.fileno())
        try:
            # Not in a worker thread: PR_SET_PDEATHSIG is about the thread that made the process.
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(LAUNCH), pid, fd, *words],
                pass_fds=[listener.fileno(), *fds],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd=directory,
                start_new_session=True,
            )
        except OSError as exc:
            os.close(inode)
            raise UsageError(f"{one_line(words[0])}: cannot be started: {exc.strerror}") from exc
    running = Running(process, Watched(process.pid), inode)
    nursery.start_soon(_listen_to, running, one_line(Path(words[0]).name))
    return running


async def _listen_to(running: Running, name: str) -> None:
    """Log what it says, line by line, and keep the last one."""
    assert running.process.stderr is not None
    fd = os.dup(running.process.stderr.fileno())
    running.process.stderr.close()
    rest = b""
    try:
        async with trio.lowlevel.FdStream(fd) as stream:
            async for data in stream:
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    _heard(running, name, line)
                rest = rest[-MOST_LINE:]
    finally:
        _heard(running, name, rest)
        running.silent.set()


def _heard(running: Running, name: str, line: bytes) -> None:
    if text := one_line(os.fsdecode(line[:MOST_LINE].strip())):
        running.last_line = text
        log.info("%s: %s", name, text)


async def end_command(running: Running) -> None:
    """End the server and what it has started.  Not cancellable; two seconds at most."""
    with trio.CancelScope(shield=True):
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.process.pid, number)  # not reaped yet: its number is its own
            with trio.move_on_after(END_S):
                await running.ended.wait()
                break
        await trio.to_thread.run_sync(running.process.wait)
        running.ended.close()
        os.close(running.inode)


class Command:
    """The server of one source; it inherits `fds`, which must stay open as long as this."""

    def __init__(
        self,
        command: NbdCommand,
        directory: Path,
        nursery: trio.Nursery,
        fds: Sequence[int] = (),
    ) -> None:
        self._command = command
        self._directory = directory
        self._nursery = nursery
        self._fds = fds
        self._running: Running | None = None
        self._closed = False

    async def running(self) -> NbdUrl:
        """Where it listens; starts it if it is not running.  Raises UsageError."""
        running = self._running
        if running is not None and running.process.poll() is not None:
            log.warning("%s", self._ended(running))
            await self._end()
        if self._running is None:
            made = await start_command(
                self._command.words, self._directory, self._nursery, self._fds
            )
            if self._closed:
                await end_command(made)
                raise SourceUnreachable(f"{self._command.name}: was closed")
            self._running = made
        return self._running.url

    async def explain(self, error: ImgfsError) -> None:
        """Raises UsageError with the server's own words when `error` is because it ended."""
        running = self._running
        if running is None or not error.temporary:
            return
        with trio.move_on_after(END_S):
            await running.ended.wait()
            await running.silent.wait()
        if running.process.poll() is not None:
            raise UsageError(self._ended(running)) from error

    async def aclose(self) -> None:
        """End it for good."""
        self._closed = True
        await self._end()

    async def _end(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            await end_command(running)

    def _ended(self, running: Running) -> str:
        said = running.last_line or f"status {running.process.returncode}"
        return f"{self._command.name}: ended by itself: {said}"


__all__ = ["Command", "Running", "end_command", "listen", "start_command"]
