"""The file that an image names: its backing file, its data file, the next of its extents.

An image may come from anybody, so what it names is followed only where it lies beside the image
itself: the same source, the same directory.  Anything else a person must ask for.
"""

from __future__ import annotations

import os
import posixpath
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

from imgfs.errors import UsageError
from imgfs.url.nbd import NbdCommand, NbdUrl
from imgfs.url.source import ObjectUrl, SshUrl, parse
from imgfs.url.text import one_line


def beside(image: str, name: str, *, any_place: bool = False) -> str:
    """The source to open for the name that the image has in its header.

    `image` is a source as a person writes it, a path or a URL; so is the answer.  Raises UsageError
    when the name must not be followed; with `any_place` only when it cannot be.
    """
    where = parse(image)
    plain = name.removeprefix("file:")
    if _is_elsewhere(plain):
        if any_place and not plain.startswith("json:"):
            return plain
        raise _refusal(image, name)
    if isinstance(where, NbdUrl | NbdCommand):
        raise _refusal(image, name)
    directory, path = _directory(where), os.fsencode(plain)
    target = posixpath.normpath(posixpath.join(directory, path))
    if b"\0" in path or not posixpath.basename(path):
        raise _refusal(image, name)
    if (posixpath.dirname(target) or b".") != posixpath.normpath(directory) and not any_place:
        raise _refusal(image, name)
    if isinstance(where, str):
        return os.fsdecode(target)
    if isinstance(where, SshUrl):
        return replace(where, path=target).text
    text = os.fsdecode(target) if where.scheme == "s3" else quote_from_bytes(target, safe="/")
    return replace(where, path=text, query=None).text


def _directory(where: str | SshUrl | ObjectUrl) -> bytes:
    """An absolute path, or one relative to the home directory of the server."""
    if isinstance(where, str):
        return os.fsencode(Path(where).absolute().parent)
    if isinstance(where, SshUrl):
        return posixpath.dirname(where.path) or b"."
    if where.scheme == "s3":
        return posixpath.dirname(os.fsencode(where.path))
    return posixpath.dirname(unquote_to_bytes(os.fsencode(where.path)))


def _is_elsewhere(name: str) -> bool:
    """Is it a URL, or what qemu writes instead of one?"""
    return "://" in name or name.startswith(("json:", "nbd:", "rbd:", "fat:"))


def _refusal(image: str, name: str) -> UsageError:
    return UsageError(
        f"{one_line(image)}: names {one_line(name)!r}, which is not a file beside it; "
        "if that is to be read, say -o backing=any, or where it is by -o backing=SOURCE"
    )
