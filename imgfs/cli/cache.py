"""`imgfs cache list|check|clear`: what earlier mounts have left on disk."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from imgfs.cache.directory import Entry, cache_root, list_entries, open_existing, remove
from imgfs.errors import CacheError
from imgfs.units import format_size


@click.group("cache")
def command() -> None:
    """Look at what is cached on disk, check it, or remove it."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_command(as_json: bool) -> None:
    """What is cached, the source used last first."""
    entries = list_entries(cache_root())
    if as_json:
        click.echo(json.dumps([_described(entry) for entry in entries], indent=2))
        return
    for entry in entries:
        age = "in use" if entry.in_use else time.strftime("%F %R", time.localtime(entry.last_used))
        click.echo(f"{format_size(entry.used):>10}  {age:16}  {_name(entry)}")
    total = sum(entry.used for entry in entries)
    click.echo(f"{format_size(total):>10}  in {cache_root()}")


@command.command("check")
def check_command() -> None:
    """Compare all that is cached with its checksums; what is bad is forgotten.

    Leaves with 1 when there was any.
    """
    from imgfs.cache.kept import Kept

    bad_ones = 0
    for entry in list_entries(cache_root()):
        if not entry.about and not entry.in_use:
            said = "is damaged, or of another version; a mount removes all that is beside it"
            click.echo(f"{_name(entry)}: cannot be checked: {entry.path / 'source'} {said}")
            bad_ones += 1
            continue
        try:
            size = int(entry.about.get("size", 0))
            directory = open_existing(entry)
            if directory is None:
                click.echo(f"{_name(entry)}: in use, not checked")
                continue
            try:
                kept = Kept(directory, size)
                good, bad = kept.verify_all()
                if not kept.check_extents():
                    click.echo(f"{entry.path / 'extents'}: was damaged, and is forgotten")
                    bad_ones += 1
            finally:
                directory.close()
        except (OSError, ValueError, TypeError) as exc:
            click.echo(f"{_name(entry)}: cannot be checked: {exc}")
            continue
        bad_ones += bad
        click.echo(f"{_name(entry)}: {good} blocks are good, {bad} were bad and are forgotten")
    if bad_ones:
        sys.exit(1)


@command.command("clear")
@click.argument("sources", nargs=-1)
def clear_command(sources: tuple[str, ...]) -> None:
    """Remove what is cached of SOURCES (URLs, or names as `list` shows them), or of all.

    What a mount uses stays, and is said.
    """
    root, freed = cache_root(), 0
    entries = list_entries(root)
    known = {_name(entry) for entry in entries} | {entry.path.name for entry in entries}
    for source in sources:
        if source not in known:
            raise CacheError(f"{source}: nothing of it is cached; see: imgfs cache list")
    for entry in entries:
        if sources and not {_name(entry), entry.path.name} & set(sources):
            continue
        try:
            if remove(root, entry.path):
                freed += entry.used
            else:
                click.echo(f"{_name(entry)}: in use, stays")
        except OSError as exc:
            raise CacheError(f"{entry.path}: cannot be removed: {exc.strerror}") from exc
    click.echo(f"{format_size(freed)} freed")


def _name(entry: Entry) -> str:
    return str(entry.about.get("url") or Path(entry.path).name)


def _described(entry: Entry) -> dict[str, object]:
    return {
        "url": entry.about.get("url"),
        "identity": entry.about.get("identity"),
        "size": entry.about.get("size"),
        "used": entry.used,
        "last_used": entry.last_used,
        "in_use": entry.in_use,
        "directory": str(entry.path),
    }
