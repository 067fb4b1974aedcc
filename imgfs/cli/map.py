"""`imgfs map SOURCE`: where an image has data, where holes, and where what its guest deleted."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from imgfs import mapjson
from imgfs.cli import parameters
from imgfs.cli.run import with_disk
from imgfs.config.options import parse_options
from imgfs.errors import UsageError
from imgfs.extents import ExtentList
from imgfs.guest.disk import Guest
from imgfs.guest.usage import Amounts, Part, State, Usage, parts_of
from imgfs.units import format_size
from imgfs.url.text import one_line
from imgfs.views.opening import Chain
from imgfs.views.sparse import look

_WORDS = {State.DATA: "data", State.HOLE: "hole", State.DELETED: "deleted"}


@click.command("map")
@parameters.source
@parameters.options
@click.option("--sparse", is_flag=True, help="Tell also what the guest deleted: D.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="As `qemu-img map --output=json` prints it; with --sparse, totals too.",
)
@click.option(
    "--png",
    metavar="FILE",
    help="Draw it into FILE, as a picture.",
    shell_complete=parameters.complete_file,
)
def command(
    source: str, options: tuple[str, ...], sparse: bool, as_json: bool, png: str | None
) -> None:
    """Draw SOURCE's extents: X data, . hole, D deleted (what sparse/ leaves out)."""

    async def found_in(url: str, chain: Chain) -> tuple[str, ExtentList, Guest | None]:
        guest = await look(chain.disk) if sparse else None
        return url, await chain.disk.extents(0, chain.disk.size), guest

    url, extents, guest = with_disk(source, parse_options(options), found_in)
    if as_json and guest is None and png is None:
        sys.stdout.writelines(mapjson.lines(extents))
        return
    usage = Usage(extents, guest.free if guest is not None else ())
    if png is not None:
        _draw_picture(Path(png), url, usage, guest)
    if as_json:
        told = mapjson.lines(extents) if guest is None else _json(usage, guest)
        sys.stdout.writelines(told)
    elif png is None:
        width = max(10, shutil.get_terminal_size().columns)
        lines = draw(usage, width, with_deleted=sparse)
        click.echo("\n".join([*lines, *(_table(guest, usage) if guest is not None else ())]))


def draw(usage: Usage, width: int, *, with_deleted: bool = False) -> list[str]:
    """The picture, `width` characters wide with its brackets, and its legend.

    A cell is `.` only when all of its share is a hole; else D when more of it is deleted than not.
    """
    size = usage.size
    cells = min(width - 2, max(size, 1)) if size else 0
    bounds = [-(-cell * size // cells) for cell in range(cells)] + [size]
    shares = map(usage.amounts, bounds, bounds[1:])
    total = usage.amounts(0, size)
    legend = [_legend("X data", total.data, size), _legend(". hole", total.hole, size)]
    if with_deleted:
        legend.append(_legend("D deleted", total.deleted, size))
    return [
        f"[{''.join(map(_cell, shares))}]",
        *legend,
        f"{len(usage)} extents in {format_size(size)}",
    ]


def _cell(share: Amounts) -> str:
    if not share.data + share.deleted:
        return "."
    return "D" if share.deleted > share.data else "X"


def _legend(what: str, part: int, size: int) -> str:
    return f"{what}  {format_size(part)} ({100 * part / size if size else 0:.1f} %)"


def _table(guest: Guest, usage: Usage) -> Iterator[str]:
    parts = parts_of(guest, usage)
    names = [one_line(f"{part.name}  {part.holds}").rstrip() for part in parts]
    room = max(map(len, names), default=0)
    yield ""
    yield " " * room + "".join(f"{word:>12}" for word in ("size", "data", "hole", "deleted"))
    for name, part in zip(names, parts, strict=True):
        each = part.amounts
        sizes = map(format_size, (each.size, each.data, each.hole, each.deleted))
        yield f"{name:{room}}" + "".join(f"{size:>12}" for size in sizes)
        if part.left_whole:
            yield f"    left whole: {one_line(part.left_whole)}"


def _json(usage: Usage, guest: Guest) -> Iterator[str]:
    """Piece by piece: there may be millions of extents."""
    about = {
        "size": usage.size,
        "partition_table": guest.table,
        **asdict(usage.amounts(0, usage.size)),
        "parts": [_told(part) for part in parts_of(guest, usage)],
    }
    yield json.dumps(about, indent=2).removesuffix("\n}") + ',\n  "extents": ['
    lead = "\n"
    for start, end, state in usage:
        extent = {"start": start, "length": end - start, "state": _WORDS[state]}
        yield f"{lead}    {json.dumps(extent)}"
        lead = ",\n"
    yield "\n  ]\n}\n"


def _told(part: Part) -> dict[str, object]:
    # Of a striped volume, and between partitions, there is no one place.
    start = part.ranges[0][0] if len(part.ranges) == 1 else None
    return {
        "name": part.name,
        "holds": part.holds,
        "start": start,
        "size": part.amounts.size,
        **asdict(part.amounts),
        "left_whole": part.left_whole,
    }


def _draw_picture(path: Path, url: str, usage: Usage, guest: Guest | None) -> None:
    # Pillow is for whom wants a picture.
    from imgfs.cli import picture

    parts: Sequence[Part]
    if guest is not None:
        parts, about = parts_of(guest, usage), f"{guest.table.upper()} partition table"
        about = about if guest.table != "none" else "no partition table"
    else:
        whole = ((0, usage.size),) if usage.size else ()
        parts, about = [Part("disk", whole, usage.amounts(0, usage.size), "")], "data and holes"
    try:
        picture.save(path, url, usage, parts, about)
    except OSError as exc:
        raise UsageError(f"{path}: the picture cannot be written: {exc.strerror}") from exc
