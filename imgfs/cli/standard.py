"""Standard input, output and error: open in any case, and what becomes of a write that fails.

A program may be started with any of them closed.  The next file that is opened would be given the
number, and be read, written or replaced for it: a mount that goes to the background puts /dev/null
there, and had /dev/fuse in that place.

What cannot be written to standard output is an error of the command, said once, at its end.  What
cannot be written to standard error cannot be said at all, and changes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO


def open_closed() -> None:
    """Open those of the descriptors 0 to 2 that are closed on /dev/null, for children too."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest number that is free, so it is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:  # as Python leaves it when it is started so
            stream = open(fd, "w" if fd else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


class _Output(io.FileIO):
    """Raises OSError at the first write that fails, and keeps it; then takes what comes."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as exc:
                self.failure = exc
                raise
        return memoryview(data).nbytes


class _Error(io.FileIO):
    """Takes what cannot be written, and forgets it."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


_output: _Output | None = None


def take_over() -> None:
    """Put streams with these rules in the place of sys.stdout and sys.stderr."""
    global _output
    sys.stdout.flush()
    _output = _Output(1, "w", closefd=False)
    sys.stdout = _like(sys.stdout, _output)
    sys.stderr = _like(sys.stderr, _Error(2, "w", closefd=False))


def _like(stream: TextIO, raw: io.FileIO) -> TextIO:
    assert isinstance(stream, io.TextIOWrapper)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def failure() -> OSError | None:
    """Why standard output could not be written; None when it could."""
    return None if _output is None else _output.failure


def finish(status: int | str | None) -> int | str | None:
    """Write what is still held; returns the status of the process."""
    with contextlib.suppress(OSError):  # it is kept as the failure
        sys.stdout.flush()
    failed = failure()
    if failed is None:
        return status
    if failed.errno != errno.EPIPE:  # who has read enough need not be told
        print(f"imgfs: standard output: {failed.strerror}", file=sys.stderr)
    return 1
