"""How a mount's process ends, for whoever waits for that and is not its parent.

A mount has a small file without a name (nameless.py), which its user's other processes can open by
way of /proc, and read also when the process is gone.  Its name says which mount point it is for, so
that the process can be found when nothing is mounted there any more.  It holds a line of JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Literal, TypeAlias

from imgfs.daemon.nameless import link_end, nameless
from imgfs.daemon.processes import Watched

#: `serving`: it is mounted, or was when this was said; `holding`: it was to end, and has something
#: that is not durable yet; `durable`: it ends, and all is; `lost`: it ends, and not all is.
State: TypeAlias = Literal["serving", "holding", "durable", "lost"]

_MOST = 64 << 10  # bytes


class Outcome:
    """The process's own end of it; the kernel drops the file with the last who has it open."""

    def __init__(self, mountpoint: str) -> None:
        self._fd = nameless(_name(mountpoint))
        self.say("serving")

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def say(self, state: State, *lines: str) -> None:
        text = json.dumps({"state": state, "lines": lines}).encode()[:_MOST]
        # Ended by a line end: whoever reads in the middle of this sees that it is not whole.
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text + b"\n", 0)


class Ending:
    """Another process's, for as long as it is open here; `process` is that."""

    def __init__(self, pid: int, path: str) -> None:
        """Raises OSError when there is no such process or it is another user's."""
        self.pid = pid
        self.process = Watched(pid)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self.process.close()
            raise
        self._said: tuple[State, list[str]] = ("serving", [])

    def said(self) -> tuple[State, list[str]]:
        """What it said last, with its lines."""
        text = os.pread(self._fd, _MOST + 1, 0)
        if text.endswith(b"\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                found = json.loads(text)
                self._said = found["state"], [str(line) for line in found["lines"]]
        return self._said

    def close(self) -> None:
        self.process.close()
        os.close(self._fd)


def holding(mountpoint: str) -> Ending | None:
    """A process of this user's that was mounted at the absolute path and has not ended."""
    wanted = link_end(_name(mountpoint))
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or gone by now
            for each in (process / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if str(each.readlink()).endswith(wanted):
                        return Ending(int(process.name), str(each))
    return None


def _name(mountpoint: str) -> str:
    digest = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:32]
    return f"imgfs-{digest}"
