"""`imgfs`: the group.  A command's module is imported only when it is run."""

from __future__ import annotations

import importlib

import click

from imgfs import __version__
from imgfs.errors import ImgfsError

#: By their names, the modules beside this one.
_COMMANDS = {
    name: name for name in ("cache", "copy", "info", "map", "mount", "snapshot", "top", "umount")
}
_COMMANDS["install-files"] = "install_files"


class LazyGroup(click.Group):
    """Commands by module name; an unknown first word is a SOURCE to mount, as mount(8) calls us."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"imgfs.cli.{_COMMANDS[cmd_name]}")
        command: click.Command = module.command
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = [a for a in args if not a.startswith("-")]
        if words and words[0] not in _COMMANDS and len(args) > 1:
            args = ["mount", *args]
        return super().parse_args(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Remote disk images as ordinary files: imgfs SOURCE MOUNTPOINT [-o OPTIONS]."""


def run() -> int:
    """Run the command that sys.argv asks for; returns its status.  An error is one line on stderr.

    A command may also end by SystemExit.
    """
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except ImgfsError as exc:
        click.echo(f"imgfs: {exc}", err=True)
        return 1
    return 0
