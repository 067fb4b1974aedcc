"""Going to the background: the child serves, the parent waits for its word and has the terminal.

The fork comes before any thread or loop, and with signals held back: both sides let them through
when they have a handler, so none is lost.  A socket pair joins the two; a message is a packet:

    child -> parent   R            the mount is ready: the parent leaves with 0
                      E text       why it is not, one line: the parent leaves with 1
                      A question   to be asked at the terminal
    parent -> child   + answer, or - when there is none

Until the child is ready, nothing outlives the parent.  A signal to the parent is passed
on, and the parent waits for the child to clean up; if it is killed the child sees that, and stops.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

from imgfs.cli import terminal
from imgfs.daemon.stop import SIGNALS, hold_back, let_through
from imgfs.daemon.systemd import log_to_syslog
from imgfs.errors import ImgfsError, MountError, NoThread
from imgfs.sources.ssh.settings import Prompt

log = logging.getLogger(__name__)

PACKET = 64 << 10

#: What the child does: given its prompt, what to call when ready, and its parent's pid.
Serve = Callable[[Prompt | None, Callable[[], None], int], None]


class Link:
    """The child's end."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._asking = threading.Lock()

    def ask(self, question: str) -> str | None:
        """[blocks] The person's answer, by way of the parent; None when there is none."""
        with self._asking:
            try:
                self._end.send(b"A" + question.encode("utf-8", "replace")[: PACKET - 1])
                said = self._end.recv(PACKET)
            except OSError:
                return None
        return said[1:].decode() if said.startswith(b"+") else None

    def fail(self, why: str) -> None:
        try:
            self._end.send(b"E" + why.encode("utf-8", "surrogateescape")[: PACKET - 1])
        except OSError:  # ready long ago, or nobody waits any more
            log.error("%s", why)

    def ready(self) -> None:
        """Leave the terminal, and let the parent go."""
        os.setsid()
        os.chdir("/")
        log_to_syslog()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        try:
            self._end.send(b"R")
        except OSError:
            raise MountError("the command that began it was killed") from None
        finally:
            self._end.close()


def run(serve: Serve, mountpoint: str) -> None:
    """Fork; returns in the parent when the child is ready.  Raises MountError when it is not."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    parent = os.getpid()
    try:
        child = os.fork()
    except OSError as exc:
        ours.close()
        theirs.close()
        raise NoThread(f"{mountpoint}: no process can be started: {exc.strerror}") from None
    if child:
        theirs.close()
        with ours:
            _wait(ours, child, mountpoint)
        return
    ours.close()
    link = Link(theirs)
    status = 1
    try:
        serve(link.ask if terminal.is_there() else None, link.ready, parent)
        status = 0
    except ImgfsError as exc:
        link.fail(str(exc))
    except KeyboardInterrupt:
        link.fail(f"{mountpoint}: interrupted")
    except BaseException:
        log.exception("the mount ended by a bug in imgfs")
    finally:
        os._exit(status)


def _wait(end: socket.socket, child: int, mountpoint: str) -> None:
    got: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if got:
            sys.exit(128 + number)
        got.append(number)
        os.kill(child, number)  # not reaped yet, so the number is its own

    for number in SIGNALS:
        signal.signal(number, pass_on)
    let_through()
    while True:
        said = end.recv(PACKET)
        if not said.startswith(b"A"):
            break
        answer = terminal.ask(said[1:].decode(), end.fileno())
        try:
            end.send(b"-" if answer is None else b"+" + answer.encode())
        except OSError:
            continue  # it is gone, and has said why
    # From here on a signal comes too late, and is not to turn a success into a failure.
    hold_back()
    if said == b"R" and not got:
        return
    os.waitpid(child, 0)
    why = f"stopped by {signal.Signals(got[0]).name}" if got else "imgfs died"
    raise MountError(said[1:].decode("utf-8", "replace") or f"{mountpoint}: {why}")
