"""What people and programs see of copies: lines, or lines of JSON; bars are apart (bars.py).

Sizes are bytes, rates bytes a second, `left_s` seconds.  A rate is that of the last few seconds.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import deque
from typing import Any, TextIO

from imgfs.units import format_size

RATE_S = 5.0  # over how long a rate is measured
LINE_S = 10.0
JSON_S = 1.0


class Copy:
    """How far one copy is.  `data` is what is to be written of `size` bytes, without holes."""

    def __init__(self, name: str, source: str, destination: str) -> None:
        self.name = name
        self.source = source
        self.destination = destination
        self.size = 0
        self.data = 0
        self.done = 0
        self.verified = 0
        self.resumed = 0  #: what was there from an earlier time
        self.begun = time.monotonic()
        self._seen: deque[tuple[float, int]] = deque([(self.begun, 0)])

    def moved(self) -> int:
        """What was done now: written, or compared."""
        return self.done - self.resumed + self.verified

    def rate(self) -> float:
        now, moved = time.monotonic(), self.moved()
        if now - self._seen[-1][0] > RATE_S / 20:
            self._seen.append((now, moved))
        while len(self._seen) > 2 and now - self._seen[1][0] > RATE_S:
            self._seen.popleft()
        then, before = self._seen[0]
        return (moved - before) / (now - then) if now > then else 0.0

    def left_s(self) -> float | None:
        rate = self.rate()
        return (self.data - self.done) / rate if rate else None

    def seconds(self) -> float:
        return max(1e-3, time.monotonic() - self.begun)


class Reporter:
    """Hears of `count` copies as they go on, and says nothing of them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.ended = 0
        self.failed = 0

    def begin(self, copy: Copy) -> None:
        """Its sizes are known now."""

    def advance(self, copy: Copy) -> None:
        """Some of it has been done."""

    def end(self, copy: Copy, error: str = "") -> None:
        """It is there, or why not."""
        self.ended += 1
        self.failed += bool(error)
        self._ended(copy, error)

    def _ended(self, copy: Copy, error: str) -> None:
        pass

    def note(self, text: str) -> None:
        """What a person should know."""
        print(f"imgfs: {text}", file=sys.stderr)

    def tell(self, text: str) -> None:
        """What belongs to the progress, and is nothing that is wrong."""

    def close(self) -> None:
        """No more is coming."""


class Lines(Reporter):
    """A line for each copy at its end, and every 10 s one for each that is under way."""

    def __init__(self, count: int, out: TextIO | None = None) -> None:
        super().__init__(count)
        self._out = out or sys.stderr
        self._told: dict[Copy, float] = {}

    def advance(self, copy: Copy) -> None:
        now = time.monotonic()
        if now - self._told.setdefault(copy, now) >= LINE_S:
            self._told[copy] = now
            left = copy.left_s()
            told = f"{copy.name}: {format_size(copy.done)} of {format_size(copy.data)}"
            told += f", {format_size(int(copy.rate()))}/s"
            self._print(told + (f", {left:.0f} s left" if left is not None else ""))

    def _ended(self, copy: Copy, error: str) -> None:
        self._told.pop(copy, None)
        count = f"[{self.ended}/{self.count}] " if self.count > 1 else ""
        if not error:
            self._print(count + summary(copy))
        elif self.count > 1:  # of one alone it is all that is said
            self._print(f"{count}{copy.name}: failed: {error}")

    def tell(self, text: str) -> None:
        self.note(text)

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)


def summary(copy: Copy) -> str:
    """One line about a copy that is there."""
    moved = copy.done - copy.resumed
    told = f"{copy.name}: {format_size(moved)} of {format_size(copy.size)} in "
    told += f"{copy.seconds():.1f} s, {format_size(int(moved / copy.seconds()))}/s"
    told += f", {format_size(copy.resumed)} were there" if copy.resumed else ""
    return told + (", compared" if copy.verified else "")


class JsonLines(Reporter):
    """An object a line, on standard output: `event` is begin, progress, done, failed, note, end."""

    def __init__(self, count: int, out: TextIO | None = None) -> None:
        super().__init__(count)
        self._out = out or sys.stdout
        self._told: dict[Copy, float] = {}

    def begin(self, copy: Copy) -> None:
        self._tell("begin", copy)

    def advance(self, copy: Copy) -> None:
        now = time.monotonic()
        if now - self._told.setdefault(copy, now) >= JSON_S:
            self._told[copy] = now
            self._tell("progress", copy, rate=round(copy.rate()), left_s=copy.left_s())

    def _ended(self, copy: Copy, error: str) -> None:
        if error:
            self._tell("failed", copy, error=error)
        else:
            self._tell("done", copy, seconds=round(copy.seconds(), 3))

    def note(self, text: str) -> None:
        self._print({"event": "note", "text": text})

    def tell(self, text: str) -> None:
        self.note(text)

    def close(self) -> None:
        told = {"event": "end", "images": self.count, "copied": self.ended - self.failed}
        self._print({**told, "failed": self.failed})

    def _tell(self, event: str, copy: Copy, **more: Any) -> None:
        told = {"event": event, "name": copy.name, "source": copy.source}
        sizes = {"size": copy.size, "data": copy.data, "done": copy.done}
        sizes |= {"resumed": copy.resumed, "verified": copy.verified}
        self._print({**told, "destination": copy.destination, **sizes, **more})

    def _print(self, event: dict[str, Any]) -> None:
        # To copy is what was asked for; that nobody could be told is said at the end.
        with contextlib.suppress(OSError):
            print(json.dumps(event), file=self._out, flush=True)
