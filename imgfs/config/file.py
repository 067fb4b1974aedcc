"""The TOML file that names many images.

    [defaults]                     # for every image that says nothing else
    cache_size = "2G"

    [images.fedora-33]
    source = "ssh://kool/mnt/scratch/fedora-33.img"

    [images."centos.stream"]       # a name with a dot is quoted
    command = ["nbdkit", "--exit-with-parent", "memory", "1G"]

    [s3]                           # for all s3:// sources without a table of their own
    endpoint = "http://minio:9000"

Whatever neither the image nor [defaults] says is None in the result: then the mount's own options
hold.  Paths are relative to the file's directory, and ~ is the home directory.  An image's own
`s3` or `http` table stands instead of the file's, not over it: keys must not go to another server
than they were written for.

The first mistake is a UsageError of one line: FILE:LINE: [TABLE] KEY: what is wrong.  Nothing of
a value is in it that may be a secret.
"""

from __future__ import annotations

import codecs
import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from msgspec import UNSET, Struct

from imgfs.config.options import Options, format_name
from imgfs.config.schema import DefaultsTable, Document, FileTable, HttpTable, ImageTable, S3Table
from imgfs.config.tomllines import Key
from imgfs.errors import UsageError
from imgfs.sources.objects.settings import FETCHED, KEY, SECRET, ObjectSettings, from_environment
from imgfs.units import parse_size
from imgfs.url.nbd import COMMAND
from imgfs.url.source import ObjectUrl, SshUrl, parse

MOST_BYTES = 4 << 20  # of the file: more is an image, mistaken for one
READAHEAD_OFF, READAHEAD_FREE = 0, -1
PREFETCH_FREE, PREFETCH_OFF = 0, -1
#: All files of an image must be possible, NAME.stream.vmdk has the longest name.
MOST_NAME_BYTES = 255 - len(".stream.vmdk")
RESERVED = frozenset({".imgfs", "originals"})


@dataclass(frozen=True, slots=True)
class S3Settings:
    """How to reach S3; None: what the environment says."""

    endpoint: str | None = None  #: URL
    region: str | None = None
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    ca_file: str | None = None  #: absolute path
    path_style: bool | None = None
    allow_http: bool | None = None


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """How to reach web servers; None: what the environment says."""

    authorization: str | None = field(default=None, repr=False)  #: the header's value
    ca_file: str | None = None  #: absolute path
    allow_http: bool | None = None


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """One image; exactly one of `source` and `command` is there.  None: not said in the file."""

    #: an absolute path, or a URL as it was written: a query may be a secret
    source: str | None = field(default=None, repr=False)
    #: a server to start in the file's directory; its words may be secrets
    command: tuple[str, ...] | None = field(default=None, repr=False)
    format: str | None = None  #: a name that imgfs.config.schema.Format has
    backing: str | None = field(default=None, repr=False)  #: as `source`; `any`: what headers name
    snapshot: str | None = None  #: id or name of one inside of the image
    luks_key: str | None = None  #: absolute path of a file with a passphrase
    cache_size: int | None = None  #: most bytes of this image in the cache
    readahead: int | None = None  #: most bytes ahead, or READAHEAD_OFF or READAHEAD_FREE
    prefetch: int | None = None  #: bytes a second, or PREFETCH_FREE or PREFETCH_OFF
    extents: bool | None = None
    timeout: int | None = None  #: seconds
    hard: bool | None = None  #: wait for an absent server for ever
    #: the person's word that the image is the same for as long as this is
    identity: str | None = None
    write: str | None = None  #: `through`: what is written goes to the source
    known_hosts: str | None = None  #: absolute path
    key: str | None = None  #: ssh's private key file, an absolute path
    config: str | None = None  #: of ssh, an absolute path
    helpers: tuple[str, ...] | None = None
    s3: S3Settings = S3Settings()
    http: HttpSettings = HttpSettings()

    @property
    def text(self) -> str:
        """The source as a person would write it; a secret, perhaps."""
        return self.source or f"{COMMAND}:{shlex.join(self.command or ())}"

    def options(self, options: Options) -> Options:
        """As `over`, with how to reach web servers and S3.  Raises as `objects` does."""
        options = self.over(options)
        if _is_object(self.text):
            settings = self.objects(os.environ, options.timeout)
            options = replace(options, object_settings=settings)
        return options

    def over(self, options: Options) -> Options:
        """The mount's options with what the file says of this image instead."""
        said = {
            "extents": self.extents,
            "timeout": self.timeout,
            "known_hosts": self.known_hosts,
            "key": self.key,
            "config": self.config,
            "helpers": self.helpers,
            "hard": self.hard,
            "identity": self.identity,
            "prefetch": self.prefetch,
            "write": True if self.write is not None else None,
            "format": None if self.format is None else format_name(self.format),
            "backing": self.backing,
            "snapshot": self.snapshot,
            "luks_key": self.luks_key,
        }
        options = replace(options, **_without_none(said))
        return replace(options, prefetch=None) if options.prefetch == PREFETCH_OFF else options

    def objects(self, environment: Mapping[str, str], timeout_s: float) -> ObjectSettings:
        """For a source of http or s3: what the file says over what the environment says.

        A key pair stands instead of all that the environment knows of keys.  Raises UsageError
        when the environment contradicts itself.
        """
        said: dict[str, Any]
        if (self.source or "").lower().startswith("s3:"):
            s3 = self.s3
            said = {
                "endpoint": s3.endpoint,
                "region": s3.region,
                "path_style": s3.path_style,
                "ca_file": s3.ca_file,
                "allow_http": s3.allow_http,
            }
            if s3.access_key is not None:
                names = {KEY, SECRET, *FETCHED}  # a session token goes with its key
                environment = {n: v for n, v in environment.items() if n not in names}
                said["access_key_id"] = s3.access_key
                said["secret_access_key"] = s3.secret_key
                said["session_token"] = s3.session_token
        else:
            said = {
                "authorization": self.http.authorization,
                "ca_file": self.http.ca_file,
                "allow_http": self.http.allow_http,
            }
        return from_environment(environment, timeout_s=timeout_s, **_without_none(said))


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A file that was read.  Two are equal when they say the same."""

    path: str  #: absolute
    images: Mapping[str, ImageSettings]  #: by name, in the file's order
    warnings: tuple[str, ...] = field(default=(), compare=False)  #: one line each

    @property
    def directory(self) -> str:
        """Where the file is, and where commands run."""
        return os.path.dirname(self.path)  # noqa: PTH120 - a text


def load(path: str | os.PathLike[str]) -> ConfigFile:
    """[blocks] Read the file.  Raises UsageError naming its first mistake."""
    name = os.fspath(path)
    text, mode = _read(name)
    absolute = os.path.abspath(name)  # noqa: PTH100 - resolve() would follow symbolic links
    reader = _Reader(Document(_printable(name), text), os.path.dirname(absolute))  # noqa: PTH120
    images = reader.images()
    warnings = []
    if mode & 0o077 and reader.has_secrets:
        warnings.append(f"{_printable(name)}: others can read the secrets in it; chmod 600 it")
    return ConfigFile(absolute, MappingProxyType(images), tuple(warnings))


def _read(path: str) -> tuple[str, int]:
    """The text and the mode."""
    shown = _printable(path)
    try:
        # O_NONBLOCK: a named pipe would wait for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise UsageError(f"{shown}: is not a file")
            data = file.read(MOST_BYTES + 1)
    except OSError as exc:
        raise UsageError(f"{shown}: {exc.strerror}") from None
    if len(data) > MOST_BYTES:
        raise UsageError(f"{shown}: is too large for a TOML file")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UsageError(f"{shown}: is UTF-16; save it as UTF-8")
    try:
        # Windows editors put a byte order mark there.
        return data.removeprefix(codecs.BOM_UTF8).decode(), mode
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise UsageError(f"{shown}:{line}: is not UTF-8") from None


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _said(table: Struct) -> dict[str, Any]:
    """The keys that are there."""
    pairs = ((name, getattr(table, name)) for name in table.__struct_fields__)
    return {name: value for name, value in pairs if value is not UNSET}


class _Reader:
    """Gives the tables of one document their meaning."""

    def __init__(self, document: Document, directory: str) -> None:
        self.has_secrets = False
        self._document = document
        self._directory = directory
        self._file = document.table((), document.top, FileTable)

    def images(self) -> dict[str, ImageSettings]:
        """All images, with the defaults.  Raises UsageError."""
        said, refuse = _said(self._file), self._document.refuse
        defaults = self._common(("defaults",), said.get("defaults", {}), DefaultsTable)
        s3, http = self._s3(("s3",), said.get("s3")), self._http(("http",), said.get("http"))
        found = said.get("images", {})
        if not found:
            refuse((), None, 'names no image; write [images.NAME] and below it source = "…"')
        images = {}
        for name, table in found.items():
            at = ("images", name)
            self._check_name(name)
            values = {"s3": s3, "http": http, **defaults}
            images[name] = ImageSettings(**values | self._image(at, table))
        if http.authorization is not None:
            sharing = [image for image in images.values() if image.http is http]
            hosts = sorted({host for image in sharing for host in _https_hosts(image)})
            if len(hosts) > 1:
                what = f"would be sent to {' and '.join(hosts)}; put it into [images.NAME.http]"
                refuse(("http",), "authorization", what)
        return images

    def _check_name(self, name: str) -> None:
        refuse = self._document.refuse
        at = ("images", name)
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            refuse(at, None, "no directory can have this name")
        if name in RESERVED:
            refuse(at, None, "this name is reserved")
        if len(name.encode()) > MOST_NAME_BYTES:
            refuse(at, None, f"a name has {MOST_NAME_BYTES} bytes at most")

    def _image(self, at: Key, found: object) -> dict[str, Any]:
        refuse = self._document.refuse
        values = self._common(at, found, ImageTable)
        if "source" in values and "command" in values:
            refuse(at, "command", "there is a source already; an image has one of them")
        if "source" in values:
            values["source"] = self._place(at, "source", values["source"])
            if _is_directory(values["source"]):
                what = "is a directory, and an image is one file; mount the directory by itself"
                refuse(at, "source", what)
        elif "command" in values:
            values["command"] = tuple(values["command"])
        else:
            refuse(at, None, "has no source")
        if "write" in values and _is_object(str(values.get("source", ""))):
            refuse(at, "write", "http and S3 can only be read")
        if re.match(r"~|\.{0,2}/", values.get("identity", "")):
            refuse(at, "identity", "is any text that names the image's state; an ssh key is: key")
        if "s3" in values:
            values["s3"] = self._s3((*at, "s3"), values["s3"])
        if "http" in values:
            values["http"] = self._http((*at, "http"), values["http"])
        return values

    def _common(self, at: Key, found: object, type_: type[DefaultsTable]) -> dict[str, Any]:
        """What the table says; with the keys that defaults and images share as they are meant."""
        values = _said(self._document.table(at, found, type_))
        for name in ("known_hosts", "key", "config", "luks_key"):
            if name in values:
                values[name] = self._path(values[name])
        if "helpers" in values:
            values["helpers"] = tuple(values["helpers"])
        if "extents" in values:
            values["extents"] = values["extents"] in (True, "on")
        if "cache_size" in values:
            values["cache_size"] = self._size(at, "cache_size", values["cache_size"])
        if "readahead" in values:
            values["readahead"] = self._switched(
                at, "readahead", values["readahead"], READAHEAD_OFF, READAHEAD_FREE
            )
        if "prefetch" in values:
            said = values["prefetch"]
            rate = self._switched(at, "prefetch", said, PREFETCH_OFF, PREFETCH_FREE)
            if rate == PREFETCH_FREE and said not in ("on", True):
                what = "nothing would ever come; write true for any rate, false for no prefetch"
                self._document.refuse(at, "prefetch", what)
            values["prefetch"] = rate
        if values.get("backing", "any") != "any":
            values["backing"] = self._place(at, "backing", values["backing"])
        return values

    def _switched(self, at: Key, key: str, value: object, off: int, free: int) -> int:
        """A size, or what stands for off and on."""
        if value in ("off", "on") or isinstance(value, bool):
            return off if value in ("off", False) else free
        return self._size(at, key, value)

    def _size(self, at: Key, key: str, value: object) -> int:
        try:
            size = value if isinstance(value, int) else parse_size(str(value))
        except UsageError as exc:
            self._document.refuse(at, key, str(exc))
        if size >= 1 << 62:
            self._document.refuse(at, key, "is too large")
        return size

    def _path(self, text: str) -> str:
        # Not pathlib: a / at the end of a source means that it is a directory.
        return os.path.join(self._directory, os.path.expanduser(text))  # noqa: PTH111, PTH118

    def _place(self, at: Key, key: str, text: str) -> str:
        """A URL as it is, a path as an absolute one."""
        path = self._path(text)
        try:
            # What looks like host:path may be the name of a file here.
            if "://" not in text and os.path.lexists(path):
                return path
            if re.match(r"https?://[^?]*\?", text, re.IGNORECASE):
                self.has_secrets = True  # a signature, perhaps
            return path if isinstance(parse(text), str) else text
        except UsageError as exc:
            self._document.refuse(at, key, str(exc))

    def _s3(self, at: Key, found: object) -> S3Settings:
        if found is None:
            return S3Settings()
        values = self._words(at, _said(self._document.table(at, found, S3Table)))
        refuse = self._document.refuse
        for key, other in (("access_key", "secret_key"), ("secret_key", "access_key")):
            if key in values and other not in values:
                refuse(at, key, f"is of no use without {other}")
        if "session_token" in values and "access_key" not in values:
            refuse(at, "session_token", "is of no use without access_key and secret_key")
        if not re.fullmatch(r"https?://[^/?#@\s]+/?", values.get("endpoint", "http://a")):
            refuse(at, "endpoint", "is no server; write it as https://host[:port]")
        self.has_secrets |= "secret_key" in values
        return S3Settings(**values)

    def _http(self, at: Key, found: object) -> HttpSettings:
        if found is None:
            return HttpSettings()
        values = self._words(at, _said(self._document.table(at, found, HttpTable)))
        self.has_secrets |= "authorization" in values
        return HttpSettings(**values)

    def _words(self, at: Key, values: dict[str, Any]) -> dict[str, Any]:
        for key, value in values.items():
            # They become header lines.
            if isinstance(value, str) and not value.isprintable():
                self._document.refuse(at, key, "there is a line break or the like in it")
        if "ca_file" in values:
            values["ca_file"] = self._path(values["ca_file"])
        return values


def _is_directory(source: str) -> bool:
    """By its / at the end, or on this machine by its name: only what a link leads to, and other
    machines, are not asked before an image is used."""
    where = parse(source)
    if isinstance(where, str):
        return where.endswith("/") or _is_local_directory(where)
    return isinstance(where, SshUrl | ObjectUrl) and where.is_directory


def _is_local_directory(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def _https_hosts(image: ImageSettings) -> Iterator[str]:
    for text in (image.source, image.backing):
        if match := re.match(r"https://([^/?#\\]*)", text or "", re.IGNORECASE):
            yield match[1].lower()


def _is_object(source: str) -> bool:
    return source.lower().startswith(("http:", "https:", "s3:"))
