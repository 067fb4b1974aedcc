"""What systemd wants to be told, and where log lines go."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import socket
import sys
from pathlib import Path

SYSLOG = "/dev/log"
_TEXT = "%(message)s"
_TEXT_BY_WHOM = "%(name)s: %(message)s"  # which part of imgfs says it is for who looks for a fault


def notify(*lines: str) -> None:
    """Tell the service manager, if there is one that listens (see sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.send("\n".join(lines).encode())


def notify_ready() -> None:
    notify("READY=1", f"MAINPID={os.getpid()}")


def notify_stopping() -> None:
    notify("STOPPING=1")


def watchdog_s() -> float | None:
    """Within how many seconds the service manager wants to hear of us each time; see
    sd_watchdog_enabled(3).  None: it does not."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    if not usec.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(usec) / 1e6 or None


def notify_alive() -> None:
    notify("WATCHDOG=1")


class JournalFormatter(logging.Formatter):
    """Each line with its level before it, as sd-daemon(3) has it: the journal takes it off."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"<{_priority(record.levelno)}>"
        return "\n".join(level + line for line in super().format(record).split("\n"))


def _priority(level: int) -> int:
    for least, priority in ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6)):
        if level >= least:
            return priority
    return 7


def stderr_is_the_journal() -> bool:
    """Does what is written to stderr go to the journal?  See JOURNAL_STREAM in systemd.exec(5)."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def log_to_stderr(verbose: int) -> None:
    """Warnings; with `verbose` 1 what happens as well, with 2 every request."""
    level = [logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)]
    handler = logging.StreamHandler(sys.stderr)
    journal = stderr_is_the_journal()
    text = "imgfs: " + (_TEXT_BY_WHOM if verbose else _TEXT)
    handler.setFormatter((JournalFormatter if journal else logging.Formatter)(text))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def log_to_syslog(address: str = SYSLOG) -> None:
    """Instead of to stderr, which is no more; to nowhere when there is no syslog."""
    handler: logging.Handler = logging.NullHandler()
    if Path(address).exists():
        with contextlib.suppress(OSError):
            handler = logging.handlers.SysLogHandler(
                address, logging.handlers.SysLogHandler.LOG_DAEMON
            )
            handler.ident = f"imgfs[{os.getpid()}]: "
    level = logging.getLogger().level
    handler.setFormatter(logging.Formatter(_TEXT if level >= logging.WARNING else _TEXT_BY_WHOM))
    logging.basicConfig(level=level, handlers=[handler], force=True)
