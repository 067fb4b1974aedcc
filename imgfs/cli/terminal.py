"""Questions to the person at the terminal, answered unseen."""

from __future__ import annotations

import os
import select
import sys
import termios

_LFLAGS = 3  # their place in what tcgetattr gives


def is_there() -> bool:
    """Is a person at standard input?"""
    return sys.stdin is not None and sys.stdin.isatty()


def ask(question: str, wake: int) -> str | None:
    """[blocks] The answer; None at its end (^D), without a terminal, or when `wake` is readable.

    Not getpass, which nothing but a signal can end: the mount may be stopped meanwhile, and
    the terminal must show again what is typed.
    """
    if select.select([wake], [], [], 0)[0]:
        return None
    try:
        tty = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        before = termios.tcgetattr(tty)
        unseen = [*before]
        unseen[_LFLAGS] &= ~termios.ECHO
        termios.tcsetattr(tty, termios.TCSAFLUSH, unseen)
        try:
            # A server's question is not to move the cursor about.
            shown = "".join(c if c.isprintable() else " " for c in question)
            os.write(tty, shown.encode("utf-8", "replace"))
            ready, _, _ = select.select([tty, wake], [], [])
            line = b"" if wake in ready else os.read(tty, 4096)
        finally:
            termios.tcsetattr(tty, termios.TCSAFLUSH, before)
            os.write(tty, b"\n")
    finally:
        os.close(tty)
    if not line.endswith(b"\n"):
        return None
    return line[:-1].decode("utf-8", "replace")


class Terminal:
    """Asks from any thread of this process, until it is closed."""

    def __init__(self) -> None:
        self._closing, self._end = os.pipe()

    def ask(self, question: str) -> str | None:
        """[blocks] See `ask`."""
        return ask(question, self._closing)

    def close(self) -> None:
        """End the question that is being asked, and answer no other.

        The descriptor that is waited for stays: a thread may be about to.
        """
        if self._end >= 0:
            os.close(self._end)
            self._end = -1
