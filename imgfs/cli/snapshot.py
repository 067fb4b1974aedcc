"""`imgfs snapshot list|create|delete|export|commit`: snapshots without a mount.

A snapshot's name is as its path in a mount: `x`, or `x/y` for y in x's snapshots/.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
import trio
from rich.progress import Progress

from imgfs.cli import parameters
from imgfs.cli.run import with_disk
from imgfs.config.options import Options, parse_options
from imgfs.errors import Busy, ImgfsError, SourceNotFound, UsageError
from imgfs.formats.probe import RAW
from imgfs.opener.disks import open_snapshot
from imgfs.overlays.checking import check
from imgfs.overlays.commit import committing
from imgfs.overlays.log import write_all
from imgfs.overlays.places import sync_directory
from imgfs.overlays.rawpins import pin_raw
from imgfs.overlays.records import SnapshotPath, snapshot_path
from imgfs.overlays.store import SnapshotStore, stores, unreadable
from imgfs.pieces import Kind
from imgfs.sources.base import WritableSource
from imgfs.units import format_size
from imgfs.url.shown import shown_source
from imgfs.views.committing import write_changes
from imgfs.views.delta import changes, delta
from imgfs.views.layer_errors import translated
from imgfs.views.opening import Chain
from imgfs.views.overlay import OverlayView
from imgfs.views.view import View

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of `list`; `used` is bytes on disk of what it changes of what it was taken of."""

    source: str
    name: str
    created: int
    used: int


@click.group("snapshot")
def command() -> None:
    """List, take, delete, check, export and commit snapshots; no mount is needed."""


@command.command("list")
@click.argument("source", required=False)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_command(source: str | None, as_json: bool) -> None:
    """The snapshots of SOURCE, or of all sources."""
    with _plainly():
        known = stores() if source is None else [SnapshotStore(shown_source(source))]
        for store in known:
            store.check_version()
        found = [
            Listed(store.url, "/".join(each.path), each.created, store.own_bytes(each))
            for store in known
            for each in store.snapshots()
        ]
        for store in known:
            if damage := store.damage():
                click.echo(f"imgfs: {damage}", err=True)
        wrong = unreadable() if source is None else []
    if as_json:
        rows = [{name: getattr(each, name) for name in Listed.__slots__} for each in found]
        click.echo(json.dumps(rows, indent=2))
    else:
        for each in found:
            when = time.strftime("%F %R", time.localtime(each.created))
            click.echo(f"{when}  {format_size(each.used):>10}  {each.name}  of {each.source}")
    if wrong:
        raise ImgfsError("; ".join(wrong))


@command.command("create")
@parameters.source
@click.argument("name")
@parameters.options
def create_command(source: str, name: str, options: tuple[str, ...]) -> None:
    """Take snapshot NAME of SOURCE, or x/y: of its snapshot x."""
    path = snapshot_path(name)

    async def create(url: str, chain: Chain) -> None:
        store = SnapshotStore(url)
        with _plainly(store.directory):
            size = chain.disk.size if len(path) == 1 else store.size_of(path[:-1])
            take = partial(store.create, mtime_ns=chain.disk.mtime_ns)
            await trio.to_thread.run_sync(take, path, chain.base(url), size)

    with_disk(source, parse_options(options), create)


@command.command("delete")
@parameters.source
@click.argument("name", required=False)
@click.option("--damaged", is_flag=True, help="Give up all those whose records are damaged.")
def delete_command(source: str, name: str | None, damaged: bool) -> None:
    """Delete snapshot NAME of SOURCE, which need not be reachable."""
    if damaged != (name is None):
        raise UsageError("say either a snapshot's NAME or --damaged")
    with _plainly():
        store = SnapshotStore(shown_source(source))
        if name is None:
            click.echo(f"{store.delete_damaged()} damaged snapshots were given up", err=True)
        else:
            store.delete(snapshot_path(name))


@command.command("check")
@click.argument("source")
@click.argument("name", required=False)
def check_command(source: str, name: str | None) -> None:
    """Read all that the snapshots of SOURCE, or NAME, are kept in, and say what is damaged.

    SOURCE need not be reachable.  Exits 1 if anything is, or is being written now.
    """
    is_good = True
    with _plainly():
        store = SnapshotStore(shown_source(source))
        if damage := store.damage():
            click.echo(f"imgfs: {damage}", err=True)
            is_good = False
        for each, found in check(store, snapshot_path(name) if name is not None else None):
            state = "damaged" if found.damaged else "in use" if found.in_use else "good"
            click.echo(f"{state:>7}  {'/'.join(each.path)}")
            for line in found.damaged + found.in_use:
                click.echo(f"imgfs: {line}", err=True)
                is_good = False
    if not is_good:
        raise SystemExit(1)


@command.command("export")
@parameters.source
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@parameters.options
def export_command(source: str, name: str, file: Path, options: tuple[str, ...]) -> None:
    """Write what snapshot NAME changes to FILE, a qcow2 whose backing file is SOURCE."""

    async def export(disk: OverlayView, url: str, chain: Chain) -> None:
        shown = " ".join((url, *(layer.path.name for layer in disk.layers)))
        view = await delta(disk, file.name, shown, *chain.backing(url))
        await _write(view, file)

    _with_snapshot(source, snapshot_path(name), parse_options(options), export)


@command.command("commit")
@parameters.source
@click.argument("name")
@click.option("--force", is_flag=True, help="Though other snapshots of SOURCE change with it.")
@parameters.options
def commit_command(source: str, name: str, force: bool, options: tuple[str, ...]) -> None:
    """Write what snapshot NAME changes into SOURCE, and delete the snapshot.

    What was interrupted can be done again.
    """
    path = snapshot_path(name)
    parsed = replace(parse_options(options), write=True)

    async def commit(disk: OverlayView, url: str, chain: Chain) -> None:
        store, base = SnapshotStore(url), chain.files[0].source
        if len(chain.layers) > 1 or chain.formats[0] != RAW or not isinstance(base, WritableSource):
            raise UsageError(f"{url}: only a raw image can be written into; export the snapshot")
        # Before the first byte: what is committed is deleted, and the base would not be what they
        # were taken of.
        await trio.to_thread.run_sync(store.check_childless, path)
        others = [each.path for each in store.snapshots() if each.path != path]
        if others and not force:
            raise Busy(
                f"{url}: has other snapshots ({', '.join(map('/'.join, others))}), "
                "which would change with it; delete them, or say --force"
            )
        await trio.to_thread.run_sync(pin_raw, source)
        with (
            _plainly(store.directory),
            committing(store, path, chain.base(url)),
            Progress() as progress,
        ):
            bar = progress.add_task(name, total=_changed_bytes(disk))
            await base.begin_writing()
            await write_changes(disk, base, partial(progress.advance, bar))
            await base.pin()
            store.pin(chain.base(url, base.size))
        for layer in disk.layers:
            layer.unlock()
        store.delete(path)

    _with_snapshot(source, path, parsed, commit, check=False, writable=True)


def _changed_bytes(disk: OverlayView) -> int:
    return sum(piece.end - piece.start for piece in changes(disk) if piece.kind == Kind.DATA)


def _with_snapshot(
    source: str,
    path: SnapshotPath,
    options: Options,
    work: Callable[[OverlayView, str, Chain], Awaitable[None]],
    *,
    check: bool = True,
    writable: bool = False,
) -> None:
    """The snapshot's disk, which nobody writes meanwhile, and with `writable` nobody reads either.

    Raises Busy when somebody does; with `check` SourceChanged, too, when it is over another base.
    """

    async def run(url: str, chain: Chain) -> None:
        async with contextlib.AsyncExitStack() as stack:
            with _plainly():
                disk = await stack.enter_async_context(
                    open_snapshot(path, url, chain, check=check, writable=writable)
                )
            await work(disk, url, chain)

    with_disk(source, options, run)


async def _write(view: View, file: Path) -> None:
    """The view as a file that is there as a whole, or not at all."""
    part = file.with_name(f".{file.name}.part")
    if not file.absolute().parent.is_dir():
        raise SourceNotFound(f"{file.absolute().parent}: no such directory")
    extents = await view.extents(0, view.size)
    with translated(str(file), file.absolute().parent), Progress(transient=True) as progress:
        try:
            with part.open("wb", buffering=0) as out:
                bar = progress.add_task(file.name, total=extents.stored_bytes())
                await trio.to_thread.run_sync(out.truncate, view.size)
                for start, end in extents.data_ranges():
                    for at in range(start, end, _PIECE):
                        length = min(_PIECE, end - at)
                        data = await view.read(at, length)
                        await trio.to_thread.run_sync(write_all, out.fileno(), bytes(data), at)
                        progress.advance(bar, length)
                await trio.to_thread.run_sync(os.fsync, out.fileno())
            part.rename(file)
            await trio.to_thread.run_sync(sync_directory, file.absolute().parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _plainly(place: Path | None = None) -> Iterator[None]:
    """Errors of the system as one line; `place` is what they are about, if they do not say so."""
    with translated("snapshots", place):
        yield
