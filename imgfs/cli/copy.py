"""`imgfs copy SOURCE… DEST`: images to files, devices and servers, holes left out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import click

from imgfs._native import _heap
from imgfs.cli.run import run
from imgfs.config.options import Options, parse_options
from imgfs.copying.batch import Batch, How
from imgfs.copying.jobs import Job, jobs_of
from imgfs.copying.progress import JsonLines, Lines, Reporter
from imgfs.daemon.stop import terminable
from imgfs.errors import ImgfsError
from imgfs.formats.probe import RAW
from imgfs.opener.disks import opening
from imgfs.views.showing import SHOWN

_FORMATS = [RAW, *(extension[1:] for extension in SHOWN)]


@click.command("copy")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.argument("destination", metavar="DEST")
@click.option("-O", "format", type=click.Choice(_FORMATS), help="Default: as DEST is called.")
@click.option("--sparse", is_flag=True, help="Without the blocks that filesystems do not use.")
@click.option(
    "-j",
    "at_once",
    type=click.IntRange(1, 64),
    help="Images at once.  Default: 1; with --dask as many as there is room for.",
)
@click.option("--resume", is_flag=True, help="Go on where an earlier copy was interrupted.")
@click.option("--verify", is_flag=True, help="Read the copy again, and compare.")
@click.option("--no-progress", is_flag=True, help="Say nothing but what is wrong.")
@click.option("--progress", type=click.Choice(["auto", "json"]), default="auto")
@click.option("--dask", "cluster", metavar="ADDRESS", help="Let a Dask cluster's workers copy.")
@click.option("-o", "options", multiple=True, help="As of `imgfs mount`.")
def command(
    sources: tuple[str, ...],
    destination: str,
    format: str | None,
    sparse: bool,
    at_once: int | None,
    resume: bool,
    verify: bool,
    no_progress: bool,
    progress: str,
    cluster: str | None,
    options: tuple[str, ...],
) -> None:
    """Copy the disks in SOURCEs to DEST: a file, a block device, ssh://, nbd:// or s3://.

    A SOURCE may be a directory (with a / at its end), a pattern of names in one, or a TOML file
    of images; DEST then is a directory.

    With --dask the workers of a running cluster copy: ADDRESS is its scheduler's, like
    tcp://HOST:PORT, or the file that the scheduler wrote.  Paths mean the same on all machines.
    """
    said = parse_options(options)
    _heap.keep_large()

    async def listed(options: Options) -> list[Job]:
        async with opening(options) as opened:
            return await jobs_of(sources, destination, format, options, opened.sources)

    async def here(options: Options) -> tuple[int, list[str]]:
        async with opening(options) as opened:
            jobs = await jobs_of(sources, destination, format, options, opened.sources)
            how = How(sparse, resume, verify, at_once or 1)
            with _reporting(len(jobs), progress, no_progress) as reporter:
                return len(jobs), await Batch(opened, how, reporter).run(jobs)

    def there(cluster: str) -> tuple[int, list[str]]:
        from imgfs.copying.cluster import ClusterBatch, connected

        jobs = [job.anywhere() for job in run(listed, said)]
        how = How(sparse, resume, verify, at_once or 0)
        with (
            connected(cluster, said.timeout) as client,
            _reporting(len(jobs), progress, no_progress) as reporter,
        ):
            return len(jobs), ClusterBatch(client, how, reporter).run(jobs)

    with terminable():
        count, failures = run(here, said) if cluster is None else there(cluster)
    if count == 1 and failures:
        raise ImgfsError(failures[0])
    if failures:
        for line in (f"{len(failures)} of {count} failed:", *failures):
            click.echo(f"imgfs: {line}", err=True)
        sys.exit(1)


@contextlib.contextmanager
def _reporting(count: int, progress: str, no_progress: bool) -> Iterator[Reporter]:
    reporter = _reporter(count, progress, no_progress)
    try:
        yield reporter
    finally:
        reporter.close()


def _reporter(count: int, progress: str, no_progress: bool) -> Reporter:
    if progress == "json":
        return JsonLines(count)
    if no_progress:
        return Reporter(count)
    if not sys.stderr.isatty():
        return Lines(count)
    from imgfs.copying.bars import Bars

    return Bars(count)
