"""`imgfs map SOURCE`: where an image has data and where holes."""

from __future__ import annotations

import shutil
import sys

import click

from imgfs import mapjson
from imgfs.cli import parameters
from imgfs.cli.run import with_disk
from imgfs.config import Options
from imgfs.extents import ExtentList
from imgfs.units import format_size
from imgfs.views.opening import Chain


@click.command("map")
@parameters.source
@click.option("--json", "as_json", is_flag=True, help="As `qemu-img map --output=json` prints it.")
def command(source: str, as_json: bool) -> None:
    """Draw SOURCE's extents: X data, . hole."""

    async def extents_of(url: str, chain: Chain) -> ExtentList:
        return await chain.disk.extents(0, chain.disk.size)

    extents = with_disk(source, Options(), extents_of)
    if as_json:
        sys.stdout.writelines(mapjson.lines(extents))
    else:
        width = max(10, shutil.get_terminal_size().columns)
        click.echo("\n".join(draw(extents, width)))


def draw(extents: ExtentList, width: int) -> list[str]:
    """The picture, `width` characters wide with its brackets, and its legend.

    A cell is X when any byte of its share is data, and `.` only when all of it is a hole.
    """
    size = extents.end
    cells = min(width - 2, max(size, 1))
    drawn = bytearray(b"." * (cells if size else 0))
    for start, end in extents.data_ranges():
        first, last = start * cells // size, (end - 1) * cells // size
        drawn[first : last + 1] = b"X" * (last + 1 - first)
    data = sum(end - start for start, end in extents.data_ranges())
    return [
        f"[{drawn.decode()}]",
        _legend("X data", data, size),
        _legend(". hole", size - data, size),
        f"{len(extents)} extents in {format_size(size)}",
    ]


def _legend(what: str, part: int, size: int) -> str:
    return f"{what}  {format_size(part)} ({100 * part / size if size else 0:.1f} %)"
