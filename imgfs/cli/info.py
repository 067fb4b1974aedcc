"""`imgfs info SOURCE`: what an image is, how large, on what it stands, and what is in it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import click
import trio

from imgfs.cli import parameters
from imgfs.cli.run import with_disk
from imgfs.config.options import parse_options
from imgfs.errors import CorruptSnapshot
from imgfs.formats.layout import About
from imgfs.guest.disk import Content, Guest
from imgfs.guest.tables import SECTOR
from imgfs.guest.usage import Part, Usage, parts_of
from imgfs.overlays.store import SnapshotStore
from imgfs.units import format_size
from imgfs.url.text import one_line
from imgfs.views.opening import Chain
from imgfs.views.showing import refusals
from imgfs.views.sparse import look


@click.command("info")
@parameters.source
@parameters.options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(source: str, options: tuple[str, ...], as_json: bool) -> None:
    """Tell SOURCE's format, sizes and identity, its backing files, and what is on the disk."""
    found = with_disk(source, parse_options(options), _look)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        label = name.replace("_", " ")
        if not isinstance(value, list):
            click.echo(f"{label}: {_shown(value)}")
        elif value:
            click.echo(f"{label}:")
            for each in value:
                click.echo(one_line(f"  {_line(each)}"))


def _line(each: dict[str, Any]) -> str:
    """What there is, and then all that is known of it."""
    told = {key: value for key, value in each.items() if value not in ("", None)}
    head = str(told.pop("what", ""))
    if head:
        # A filesystem's type says all that its signature does.
        holds = told.pop("holds", "")
        head += f": {told.pop('type', holds) or 'unknown'}"
    why = told.pop("left_whole", "")
    words = [f"{key.replace('_', ' ')} {_shown(value)}" for key, value in told.items()]
    line = ", ".join([head, *words] if head else words)
    return f"{line}; left whole: {why}" if why else line


def _shown(value: object) -> str:
    return f"{format_size(value)} ({value} bytes)" if isinstance(value, int) else str(value)


async def _look(url: str, chain: Chain) -> dict[str, Any]:
    disk = chain.disk
    extents = await disk.extents(0, disk.size)
    changed = datetime.fromtimestamp(disk.mtime_ns / 1e9, UTC)
    guest = await look(disk)
    usage = Usage(extents, guest.free)
    parts = {part.name: part for part in parts_of(guest, usage)}
    about = About(disk.name, url, disk.mtime_ns // 1_000_000_000)
    refused = await trio.to_thread.run_sync(refusals, extents, about)
    layers = [
        {
            "file": layer.files[0].name,
            "format": format,
            "virtual_size": layer.size,
            "details": "; ".join(f"{name}: {value}" for name, value in layer.facts()),
        }
        for format, layer in zip(chain.formats, chain.layers, strict=True)
    ]
    return {
        "source": url,
        "format": chain.formats[0],
        "virtual_size": disk.size,
        "stored_size": extents.stored_bytes(),
        "modified": changed.isoformat(timespec="seconds"),
        "identity": chain.identity.kind if chain.identity else "none",
        **await trio.to_thread.run_sync(_snapshots, url),
        "layers": layers if chain.formats != ("raw",) else [],
        "not_shown": [{"as": extension, "because": why} for extension, why in refused.items()],
        "partition_table": guest.table,
        **({"sector_size": guest.sector} if guest.sector != SECTOR else {}),
        "contents": [_content(guest, c, parts[what]) for what, c in guest.contents()],
    }


def _snapshots(url: str) -> dict[str, str]:
    """What is wrong with those that are kept of it; nothing, where nothing is."""
    try:
        store = SnapshotStore(url)
        store.check_version()
        wrong = store.damage()
    except (CorruptSnapshot, OSError) as exc:
        wrong = str(exc)
    return {"snapshots": wrong} if wrong else {}


def _content(guest: Guest, content: Content, part: Part) -> dict[str, Any]:
    """`free` is what sparse/ leaves out, `free_but_stored` what of that is data in the image.

    Both are None where it is left whole: what is free is not known.
    """
    found = content.filesystem
    told: dict[str, Any] = {"what": part.name, "holds": " and ".join(content.holds)}
    if found is not None:
        told |= {"type": found.kind, "label": found.label, "uuid": found.uuid, "size": found.size}
        free: int | None = None
        deleted: int | None = None
        if not part.left_whole:
            free = sum(found.free[1::2]) - sum(found.free[::2])
            deleted = part.amounts.deleted
        told |= {"used": found.used, "free": free, "free_but_stored": deleted}
    told["left_whole"] = part.left_whole
    return told
