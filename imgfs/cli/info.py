"""`imgfs info SOURCE`: what an image is and how large."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import click

from imgfs.cli.run import with_source
from imgfs.config import Options
from imgfs.sources.base import Source
from imgfs.units import format_size


@click.command("info")
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(source: str, as_json: bool) -> None:
    """Tell SOURCE's format, sizes and identity."""
    found = with_source(source, Options(), _look)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        shown = value
        if isinstance(value, int):
            shown = f"{format_size(value)} ({value} bytes)"
        click.echo(f"{name.replace('_', ' ')}: {shown}")


async def _look(source: Source) -> dict[str, object]:
    extents = await source.extents(0, source.size)
    changed = datetime.fromtimestamp(source.stat.mtime_ns / 1e9, UTC)
    return {
        "source": source.url,
        "format": "raw",
        "virtual_size": source.size,
        "stored_size": extents.stored_bytes(),
        "modified": changed.isoformat(timespec="seconds"),
        "identity": source.stat.identity.kind if source.stat.identity else "none",
    }
