"""The manual pages imgfs(1) and imgfs.toml(5), as `imgfs install-files` writes them.

What they say comes from the commands themselves and from imgfs.cli.manual; the language is man(7).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import click

from imgfs import __version__
from imgfs.cli.group import cli
from imgfs.cli.manual import ENVIRONMENT, KEYS, NAMES, OPTIONS, SOURCES, STORE_KEYS, Entry

INTRODUCTION = """\
imgfs shows disk images that live somewhere else as ordinary files: the disk as raw bytes, writable
snapshots of it, the same disk in other formats, and the disk without the blocks that its
filesystems no longer use.  cp, dd and qemu work on them as if they were here: holes stay holes,
only what is read crosses the network, and there is no temporary copy.

imgfs SOURCE MOUNTPOINT is imgfs mount, so that mount(8) and fstab(5) work with the type fuse.imgfs;
the words rw, dev, suid, _netdev and what else they add change nothing."""
TOML = """\
A TOML file names many images for imgfs(1) to show, each as a directory.  Nothing is connected to
before an image is used.  On SIGHUP the file is read again, which disturbs no open file.  An unknown
key is refused, with its line."""
EXAMPLE = """\
[defaults]
key = "~/.ssh/images"

[images.fedora-33]
source = "ssh://kool/mnt/scratch/fedora-33.img"
prefetch = "20M"

[images.archive]
source = "s3://images/archive.raw"
s3 = { endpoint = "http://minio:9000" }

[images.old]
command = ["nbdkit", "-r", "--filter=xz", "file", "old.img.xz"]"""


def pages() -> dict[str, str]:
    """The text of each page, by its path below share/man."""
    found = {"man1/imgfs.1": commands_page(), "man5/imgfs.toml.5": toml_page()}
    texts = {path: "\n".join(lines) + "\n" for path, lines in found.items()}
    return texts | {"man8/mount.imgfs.8": ".so man1/imgfs.1\n"}


def commands_page() -> Iterator[str]:
    yield from _head("imgfs", 1, "remote disk images as ordinary files")
    yield ".SH SYNOPSIS"
    yield from _pattern("imgfs SOURCE MOUNTPOINT [-o OPTION,...]")
    for context in _contexts():
        yield ".br"
        yield from _pattern(f"{context.command_path} {' '.join(_words(context))}")
    yield ".SH DESCRIPTION"
    yield from _paragraphs(INTRODUCTION)
    yield ".SH SOURCES"
    yield from _entries(SOURCES)
    yield ".SH NAMES UNDER THE MOUNT POINT"
    yield from _entries(NAMES)
    yield ".SH COMMANDS"
    for context in _contexts():
        yield f".SS {_text(context.command_path)}"
        yield from _paragraphs(context.command.help or "")
        found = [param.get_help_record(context) for param in context.command.get_params(context)]
        yield from _entries(Entry(*record) for record in found if record is not None)
    yield ".SH MOUNT OPTIONS"
    yield from _entries(OPTIONS)
    yield ".SH ENVIRONMENT"
    yield from _entries(ENVIRONMENT)
    yield ".SH EXIT STATUS"
    yield from _paragraphs("0: done.  1: it was not, and one line says why.  2: wrong usage.")
    yield ".SH SEE ALSO"
    yield from _paragraphs("imgfs.toml(5), fusermount3(1), mount(8), qemu-img(1), nbdkit(1)")


def toml_page() -> Iterator[str]:
    yield from _head("imgfs.toml", 5, "many disk images for imgfs")
    yield ".SH DESCRIPTION"
    yield from _paragraphs(TOML)
    yield ".SH [images.NAME] AND [defaults]"
    yield from _paragraphs(
        "An image needs source or command.  [defaults] is for all images; it has neither of these, "
        "nor write and identity.  A path is taken from the file's directory."
    )
    yield from _entries(KEYS)
    yield ".SH [s3] AND [http]"
    yield from _entries(STORE_KEYS)
    yield ".SH EXAMPLE"
    yield from (".nf", *map(_text, EXAMPLE.split("\n")), ".fi")
    yield ".SH SEE ALSO"
    yield from _paragraphs("imgfs(1)")


def _contexts() -> Iterator[click.Context]:
    """Of every command that does something, in order."""
    top = click.Context(cli, info_name="imgfs")
    for name in cli.list_commands(top):
        command = cli.get_command(top, name)
        assert command is not None
        context = click.Context(command, top, info_name=name)
        if isinstance(command, click.Group):
            for each in command.list_commands(context):
                inner = command.get_command(context, each)
                assert inner is not None
                yield click.Context(inner, context, info_name=each)
        else:
            yield context


def _words(context: click.Context) -> list[str]:
    return context.command.collect_usage_pieces(context)


def _head(name: str, section: int, about: str) -> Iterator[str]:
    yield f'.TH "{name}" {section} "" "imgfs {__version__}"'
    yield ".SH NAME"
    yield f"{name} \\- {about}"


def _pattern(text: str) -> Iterator[str]:
    yield f".B {_text(text)}"


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.strip().split("\n\n"):
        yield ".PP"
        yield from (_text(line.strip()) for line in paragraph.replace("\b", "").split("\n"))


def _entries(entries: Iterable[Entry]) -> Iterator[str]:
    for entry in entries:
        yield ".TP"
        yield f".B {_text(entry.form)}"
        end = f" (default: {entry.default})" if entry.default else ""
        yield _text(entry.meaning + end) or "\\&"


def _text(text: str) -> str:
    """As man(7) wants it: a dash that can be copied, no line that is a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text
