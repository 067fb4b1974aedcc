"""Sources as they are shown: absolute, and without a secret."""

from __future__ import annotations

from pathlib import Path

from imgfs.url.nbd import NbdCommand, NbdUrl
from imgfs.url.source import ObjectUrl, SshUrl, parse


def shown_url(where: SshUrl | ObjectUrl | NbdUrl | NbdCommand) -> str:
    """A command's arguments are nobody else's business."""
    return where.name if isinstance(where, NbdCommand) else where.text


def shown_source(text: str) -> str:
    """What a person named, as it is shown: absolute, and without a secret.  Raises UsageError."""
    where = parse(text)
    return absolute(where) if isinstance(where, str) else shown_url(where)


def absolute(path: str) -> str:
    """With the / that says that a directory is meant."""
    return str(Path(path).absolute()) + ("/" if path.endswith("/") else "")
