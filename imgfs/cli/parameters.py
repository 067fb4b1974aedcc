"""What commands have in common, and how a shell completes it.

None looks at the file that it names, as click.Path would: a mount may hang.
"""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from imgfs.cli.manual import OPTIONS
from imgfs.errors import MountError


def _complete_options(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The last of `-o one,two`."""
    before, comma, last = incomplete.rpartition(",")
    return [
        CompletionItem(before + comma + name, help=entry.meaning)
        for entry in OPTIONS
        for name in dict.fromkeys(entry.names)
        if name.startswith(last)
    ]


def complete_file(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="file")]


def _complete_directory(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="dir")]


source = click.argument("source", shell_complete=complete_file)


def _named(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not value:  # which pathlib and realpath take for the working directory
        raise MountError("'': no such directory; a mount point must exist")
    return value


mountpoint = click.argument("mountpoint", callback=_named, shell_complete=_complete_directory)
options = click.option(
    "-o",
    "options",
    multiple=True,
    metavar="OPT,OPT=VAL",
    help="Mount options.",
    shell_complete=_complete_options,
)
