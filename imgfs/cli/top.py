"""`imgfs top MOUNTPOINT`: what a mount is doing, live.

It reads .imgfs/status.json and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import click

from imgfs.cli import parameters
from imgfs.cli.asking import Asking
from imgfs.status.rates import Look, Row, Totals, busiest_first, rows, totals
from imgfs.units import format_size

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

EVERY_S = 1.0
HEAD = ("image", "state", "read", "fetched", "hits", "fetching", "cached", "errors", "last error")
FIRST_NUMBER, LAST_NUMBER = HEAD.index("read"), HEAD.index("errors")


@click.command("top")
@parameters.mountpoint
@click.option("--once", is_flag=True, help="Print one table, of all since the images were opened.")
@click.option("--json", "as_json", is_flag=True, help="Print the status.")
def command(mountpoint: str, once: bool, as_json: bool) -> None:
    """Show what the images of MOUNTPOINT are doing; q ends it."""
    asking = Asking(mountpoint)
    try:
        if as_json:
            click.echo(json.dumps(asking.wait().status, indent=2))
        elif once or not _is_screen():
            click.echo("\n".join(plain(asking.wait())))
        else:
            _live(mountpoint, asking)
    except KeyboardInterrupt:
        pass
    finally:
        asking.close()


def plain(look: Look) -> list[str]:
    """The lines of one table, of all since the images were opened."""
    table = [HEAD, *(_cells(row, "") for row in rows(look))]
    widths = [max(len(cells[n]) for cells in table) for n in range(len(HEAD))]
    lines = []
    for cells in table:
        padded = (
            cell.rjust(width) if FIRST_NUMBER <= n <= LAST_NUMBER else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        lines.append("  ".join(padded).rstrip())
    return [*_summary(totals(look), ""), "", *lines]


def _cells(row: Row, per: str) -> tuple[str, ...]:
    return (
        _printable(row.name),
        _printable(row.state),
        _size(row.read, per),
        _size(row.fetched, per),
        "-" if row.hit_ratio is None else f"{100 * row.hit_ratio:.0f} %",
        _count(row.fetching),
        _size(row.cached, ""),
        _count(row.errors),
        _printable(row.last_error),
    )


def _summary(mount: Totals, per: str) -> list[str]:
    images = f"{mount.images} image{'s' * (mount.images != 1)}, {mount.opened} opened"
    limit = "no limit known" if mount.cache_limit is None else format_size(mount.cache_limit)
    return [
        f"process {_count(mount.pid)}, {images}; cache {_size(mount.cache_used, '')} of {limit}",
        f"reads answered natively {_count(mount.native_reads)}{per}, requests to Python "
        f"{_count(mount.python_requests)}{per}, waiting {_count(mount.waiting)}",
        *([_printable(mount.last_error)] if mount.last_error else []),
    ]


def _size(value: float | None, per: str) -> str:
    return "-" if value is None else format_size(int(value)) + per


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _printable(text: str) -> str:
    """Names and messages come from servers, and must not command the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _is_screen() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def _live(mountpoint: str, asking: Asking) -> None:
    before, now = None, asking.wait()  # what is wrong at once is said on the screen as it is
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with _keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:

        def draw() -> None:
            silence_s = time.monotonic() - now.at_s
            live.update(_screen(mountpoint, console, now, before, silence_s), refresh=True)

        draw()
        next_s = time.monotonic() + EVERY_S
        while True:
            left_s = max(0.0, next_s - time.monotonic())
            ready, _, _ = select.select([*asking.fds, *keys], [], [], left_s)
            if any(_is_end(os.read(key, 64)) for key in keys if key in ready):
                return
            if any(fd in ready for fd in asking.fds):
                before, now = now, asking.take()
                draw()
            elif time.monotonic() >= next_s:
                if asking.is_asking:
                    draw()  # how long it has been silent
                asking.ask()
                next_s = time.monotonic() + EVERY_S


def _is_end(typed: bytes) -> bool:
    return not typed or b"q" in typed.lower()


@contextlib.contextmanager
def _keys() -> Iterator[list[int]]:
    """Keys come one by one and unseen; the terminal is as before at the end, also of SIGTERM."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    handler = signal.signal(signal.SIGTERM, end)
    try:
        if not sys.stdin.isatty():
            yield []
            return
        fd = sys.stdin.fileno()
        settings = termios.tcgetattr(fd)
        try:
            tty.setcbreak(fd)
            yield [fd]
        finally:
            with contextlib.suppress(termios.error):  # it may have gone
                termios.tcsetattr(fd, termios.TCSADRAIN, settings)
    finally:
        signal.signal(signal.SIGTERM, handler)


def _screen(
    mountpoint: str, console: Console, now: Look, before: Look | None, silence_s: float
) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = f"imgfs top {_printable(mountpoint)}"
    if silence_s > 2 * EVERY_S:
        title += f": no answer for {silence_s:.0f} s"
    per = "" if before is None else "/s"
    lines = [title, *_summary(totals(now, before), per), ""]
    head = [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]
    head[0].stylize("bold")

    table = Table(box=None, pad_edge=False, expand=True, header_style="bold")
    for n, name in enumerate(HEAD[: LAST_NUMBER + 1]):
        table.add_column(
            Text(name),
            justify="right" if n >= FIRST_NUMBER else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if name == "image" else None,
        )
    found = busiest_first(rows(now, before))
    # The head, the table's own, and the last two.
    room = max(1, console.size.height - len(lines) - 3)
    # Beside so many numbers an error finds no place, so they stand below, in a third of the screen.
    failed = [row for row in found if row.last_error][: max(room - 1 - len(found), room // 3)]
    room = max(1, room - len(failed) - bool(failed))
    for row in found[:room]:
        style = {"open": "", "not opened yet": "dim"}.get(row.state, "red")
        table.add_row(*(Text(cell) for cell in _cells(row, per)[: LAST_NUMBER + 1]), style=style)
    errors = [Text(_error(row), style="red", no_wrap=True, overflow="ellipsis") for row in failed]
    if errors:
        errors.insert(0, Text())
    more = f"{len(found) - room} more images; " if len(found) > room else ""
    return Group(*head, table, *errors, Text(f"\n{more}q ends", style="dim"))


def _error(row: Row) -> str:
    name, error = _printable(row.name), _printable(row.last_error)
    return error if error.startswith((f"{name}:", f"{name}.")) else f"{name}: {error}"
