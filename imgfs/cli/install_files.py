"""`imgfs install-files`: what belongs beside the program, and pip has no place for."""

from __future__ import annotations

import importlib.resources
import shutil
import sys
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from imgfs.cli.group import cli
from imgfs.cli.pages import pages
from imgfs.errors import UsageError

#: Where a shell looks for what completes a command's words.
_COMPLETIONS = {
    "bash": "share/bash-completion/completions/imgfs",
    "zsh": "share/zsh/site-functions/_imgfs",
    "fish": "share/fish/vendor_completions.d/imgfs.fish",
}
_FOUND_BY_SYSTEMD = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_MOUNT = """\
#!/bin/sh
# mount(8) calls this for the type imgfs: SOURCE MOUNTPOINT [-sfnv] [-N NAMESPACE] [-o OPTIONS]
source=$1 mountpoint=$2 options=
shift 2
while getopts sfnvN:o:t: word; do
    case $word in
    f) exit 0 ;; # only a rehearsal
    o) options=$OPTARG ;;
    *) ;;
    esac
done
exec {program} mount "$source" "$mountpoint" ${{options:+-o "$options"}}
"""


@click.command("install-files")
@click.option(
    "--prefix",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/usr/local"),
    show_default=True,
    help="Where share/man, lib/systemd and the like are.",
)
@click.option(
    "--destdir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write below this directory instead, for a package.",
)
@click.option(
    "--program",
    type=click.Path(dir_okay=False),
    help="What units and mount.imgfs run; by default this imgfs.",
)
def command(prefix: Path, destdir: Path | None, program: str | None) -> None:
    """Install manual pages, systemd units, shell completions and mount.imgfs.

    With the last of these, a line of fstab(5) may have the type imgfs.
    """
    prefix = prefix.absolute()
    top = prefix if destdir is None else destdir.absolute() / prefix.relative_to("/")
    for path, content, mode in _files(program or _this_program()):
        target = top / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="utf-8")
            target.chmod(mode)
        except OSError as exc:
            raise UsageError(f"{exc.filename or target}: {exc.strerror}") from None
        click.echo(target)


def _files(program: str) -> Iterator[tuple[str, str, int]]:
    """Path below the prefix, content, and mode of each."""
    for path, text in pages().items():
        yield f"share/man/{path}", text, 0o644
    for path, unit in _units(_systemd(), "system"):
        # Without @ a unit is of one mount: an example.
        where = f"lib/systemd/{path}" if "@" in path else f"share/doc/imgfs/examples/{unit.name}"
        yield where, _running(unit.read_text(encoding="utf-8"), program), 0o644
    for shell, path in _COMPLETIONS.items():
        found = get_completion_class(shell)
        assert found is not None
        yield path, found(cli, {}, "imgfs", "_IMGFS_COMPLETE").source(), 0o644
    yield "sbin/mount.imgfs", _MOUNT.format(program=program), 0o755


def _this_program() -> str:
    """Its absolute path."""
    found = shutil.which(sys.argv[0]) or sys.argv[0]
    beside = Path(sys.executable).parent / "imgfs"  # `python -m imgfs.cli.main` is no program
    return str(Path(found).absolute() if Path(found).name == "imgfs" else beside)


def _running(unit: str, program: str) -> str:
    """The unit with the program's path where systemd would not find its name."""
    if str(Path(program).parent) in _FOUND_BY_SYSTEMD:
        return unit
    return unit.replace("=imgfs ", f"={program} ")


def _systemd() -> Traversable:
    """The units: part of an installed package, and in contrib/ of a checkout."""
    package = importlib.resources.files("imgfs")
    for place in (package / "share/systemd", package / "../contrib/systemd"):
        if place.is_dir():
            return place
    raise UsageError("imgfs is installed without its systemd units")


def _units(directory: Traversable, what: str) -> Iterator[tuple[str, Traversable]]:
    """Each unit with its path below lib/systemd."""
    for each in sorted(directory.iterdir(), key=lambda found: found.name):
        if each.is_dir():
            yield from _units(each, each.name)
        else:
            yield f"{what}/{each.name}", each
