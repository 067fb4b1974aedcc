"""From what a person names to the copies that are to be made: which image, and to where."""

from __future__ import annotations

import fnmatch
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote_from_bytes, unquote_to_bytes

import trio

from imgfs.config.options import Options
from imgfs.errors import SourceNotFound, UsageError
from imgfs.formats.probe import RAW
from imgfs.opener.sources import Sources
from imgfs.overlays.rawpins import is_pinned_raw
from imgfs.sources.listing import Listed
from imgfs.tree.names import (
    IMAGE_EXTENSIONS,
    RAW_EXTENSIONS,
    directory_names,
    image_name,
    is_image,
)
from imgfs.url.shown import absolute, shown_source
from imgfs.url.source import ObjectUrl, SshUrl, parse
from imgfs.views.showing import SHOWN

if TYPE_CHECKING:
    from imgfs.config.file import ImageSettings

_GLOB = re.compile(r"[*?[]")


@dataclass(frozen=True, slots=True)
class Wish:
    """An image as it was named; `directory` is where a command of it runs.

    `settings` are what a TOML file says of it.
    """

    name: str
    source: str = field(repr=False)
    options: Options
    directory: Path | None = None
    settings: ImageSettings | None = None

    def all_options(self) -> Options:
        """With what the environment of this process says, too.

        Raises UsageError when that contradicts itself.
        """
        return self.options if self.settings is None else self.settings.options(self.options)


@dataclass(frozen=True, slots=True)
class Job:
    """A copy to be made.  `format` is as in SHOWN without its dot, or raw."""

    wish: Wish
    destination: str
    format: str

    @property
    def name(self) -> str:
        return self.wish.name

    def anywhere(self) -> Job:
        """[blocks] The same for another machine, where paths are as here, and nobody is asked.

        What a person has to say of the source here (see rawpins) is in it.
        """
        wish = self.wish
        options = replace(
            wish.options,
            prompt=None,
            backing=wish.options.backing and _anywhere(wish.options.backing),
        )
        source = _anywhere(wish.source)
        if options.format is None and options.luks_key is None and is_pinned_raw(source):
            options = replace(options, format=RAW)
        wish = replace(wish, source=source, options=options, directory=wish.directory or Path.cwd())
        return replace(self, wish=wish, destination=_anywhere(self.destination))


def _anywhere(text: str) -> str:
    """A path as it is from the root; what is none, as it is."""
    return text if text == "any" or not isinstance(parse(text), str) else absolute(text)


def format_of(destination: str) -> str:
    """What the destination's name says; raw where it says nothing.

    Raises UsageError for a name by which everybody would take it for what cannot be written.
    """
    name = destination.lower()
    known = [extension for extension in SHOWN if name.endswith(extension)]
    if known:
        return max(known, key=len)[1:]
    extension = PurePosixPath(name).suffix
    if extension == ".vpc":  # as qemu calls it
        return "vhd"
    if extension in IMAGE_EXTENSIONS and extension not in RAW_EXTENSIONS:
        raise UsageError(
            f"{shown_source(destination)}: {extension[1:]} cannot be written; "
            "say what it is to be with -O, raw if nothing else"
        )
    return RAW


async def jobs_of(
    sources: tuple[str, ...],
    destination: str,
    format: str | None,
    options: Options,
    places: Sources,
) -> list[Job]:
    """The copies, in the order in which they were named.

    Raises UsageError for what contradicts itself, and what listing a directory raises.
    """
    wishes: list[Wish] = []
    many = len(sources) > 1
    for text in sources:
        found, is_one = await _wishes(text, options, places)
        wishes += found
        many = many or not is_one
    if not _is_directory(destination):
        if many:
            raise UsageError(f"{shown_source(destination)}: {_no_directory(destination)}")
        return [Job(wishes[0], destination, format or format_of(destination))]
    where = parse(destination)
    if isinstance(where, str) and not Path(where).is_dir():
        raise SourceNotFound(f"{destination}: no such directory")
    format = format or RAW
    jobs = [Job(wish, _inside(destination, f"{wish.name}.{format}"), format) for wish in wishes]
    seen: dict[str, Job] = {}
    for job in jobs:
        first = seen.setdefault(job.destination, job)
        if first is not job:
            both = f"{shown_source(first.wish.source)} and {shown_source(job.wish.source)}"
            raise UsageError(f"{shown_source(job.destination)}: is where both {both} would go")
    return jobs


async def _wishes(text: str, options: Options, places: Sources) -> tuple[list[Wish], bool]:
    """The images that a word means; and whether it is one by its nature."""
    where = parse(text)
    if isinstance(where, str) and where.endswith(".toml"):
        return await trio.to_thread.run_sync(_manifest, where, options), False
    directory, _, pattern = text.rpartition("/")
    if _can_glob(text) and _GLOB.search(pattern):
        listing = await places.listing(f"{directory}/" if directory or "/" in text else "./")
        assert listing is not None
        wanted = pattern if isinstance(where, str) else os.fsdecode(unquote_to_bytes(pattern))
        files = [f for f in await listing.files() if fnmatch.fnmatchcase(f.name, wanted)]
        if not files:
            raise SourceNotFound(f"{shown_source(text)}: nothing has such a name")
        return _listed(files, options), False
    listing = await places.listing(text)
    if listing is not None:
        files = [file for file in await listing.files() if is_image(file.name)]
        if not files:
            raise SourceNotFound(f"{shown_source(text)}: there is no image in it")
        return _listed(files, options), False
    name = Path(where).name if isinstance(where, str) else where.basename
    return [Wish(image_name(name), text, options)], True


def _can_glob(text: str) -> bool:
    where = parse(text)
    if isinstance(where, str):
        return not os.path.lexists(where)
    return isinstance(where, SshUrl) or (isinstance(where, ObjectUrl) and where.scheme == "s3")


def _listed(files: list[Listed], options: Options) -> list[Wish]:
    by_name = {file.name: file for file in files}
    names = directory_names(sorted(by_name))
    return [Wish(name, by_name[file].url, options) for name, file in names.items()]


def _manifest(path: str, options: Options) -> list[Wish]:
    """[blocks] The images of a TOML file, as `imgfs mount` takes it."""
    # msgspec is for whom there is such a file.
    from imgfs.config import file as configfile

    config = configfile.load(path)
    directory = Path(config.directory)
    return [
        Wish(name, image.text, image.over(options), directory, image)
        for name, image in config.images.items()
    ]


def _is_directory(text: str) -> bool:
    where = parse(text)
    if isinstance(where, str):
        return where.endswith("/") or Path(where).is_dir()
    return isinstance(where, SshUrl | ObjectUrl) and where.is_directory


def _no_directory(destination: str) -> str:
    """Why many images cannot go there, and all that is to be done."""
    where = parse(destination)
    if isinstance(where, str):
        if os.path.lexists(where):
            return "many images need a directory, and it is none"
        return "many images need a directory, and there is none of this name; make it first"
    return "many images need a directory; write a / at its end"


def _inside(directory: str, name: str) -> str:
    if isinstance(parse(directory), str):
        return f"{absolute(directory).rstrip('/')}/{name}"
    return directory + quote_from_bytes(os.fsencode(name), safe="~")
