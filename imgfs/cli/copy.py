"""`imgfs copy SOURCE… DEST`: images to files, devices and servers, holes left out."""

from __future__ import annotations

import signal
import sys

import click

from imgfs.cli.run import run
from imgfs.config import Options, parse_options
from imgfs.copying.batch import Batch, How
from imgfs.copying.jobs import jobs_of
from imgfs.copying.progress import JsonLines, Lines, Reporter
from imgfs.errors import ImgfsError
from imgfs.formats.probe import RAW
from imgfs.opener import opening
from imgfs.views.showing import SHOWN

_FORMATS = [RAW, *(extension[1:] for extension in SHOWN)]


@click.command("copy")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.argument("destination", metavar="DEST")
@click.option("-O", "format", type=click.Choice(_FORMATS), help="Default: as DEST is called.")
@click.option("--sparse", is_flag=True, help="Without the blocks that filesystems do not use.")
@click.option("-j", "at_once", default=1, type=click.IntRange(1, 64), help="Images at once.")
@click.option("--resume", is_flag=True, help="Go on where an earlier copy was interrupted.")
@click.option("--verify", is_flag=True, help="Read the copy again, and compare.")
@click.option("--no-progress", is_flag=True, help="Say nothing but what is wrong.")
@click.option("--progress", type=click.Choice(["auto", "json"]), default="auto")
@click.option("-o", "options", multiple=True, help="As of `imgfs mount`.")
def command(
    sources: tuple[str, ...],
    destination: str,
    format: str | None,
    sparse: bool,
    at_once: int,
    resume: bool,
    verify: bool,
    no_progress: bool,
    progress: str,
    options: tuple[str, ...],
) -> None:
    """Copy the disks in SOURCEs to DEST: a file, a block device, ssh://, nbd:// or s3://.

    A SOURCE may be a directory (with a / at its end), a pattern of names in one, or a TOML file
    of images; DEST then is a directory.
    """
    how = How(sparse, resume, verify, at_once)

    async def work(options: Options) -> list[str]:
        async with opening(options) as opened:
            jobs = await jobs_of(sources, destination, format, options, opened.sources)
            reporter = _reporter(len(jobs), progress, no_progress)
            try:
                failures = await Batch(opened, how, reporter).run(jobs)
            finally:
                reporter.close()
            if len(jobs) == 1 and failures:
                raise ImgfsError(failures[0])
            return [f"{len(failures)} of {len(jobs)} failed:", *failures] if failures else []

    # As ^C: what is open is let go of in order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = run(work, parse_options(options))
    for line in failed:
        click.echo(f"imgfs: {line}", err=True)
    if failed:
        sys.exit(1)


def _reporter(count: int, progress: str, no_progress: bool) -> Reporter:
    if progress == "json":
        return JsonLines(count)
    if no_progress:
        return Reporter(count)
    if not sys.stderr.isatty():
        return Lines(count)
    from imgfs.copying.bars import Bars

    return Bars(count)
