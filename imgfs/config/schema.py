"""What may stand in the TOML file of many images, and the error that says where it does not.

Types only; what the values mean is `imgfs.config.file`'s.
"""

from __future__ import annotations

import ast
import difflib
import re
import tomllib
from typing import Annotated, Any, Literal, NoReturn, TypeAlias, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from imgfs.config.tomllines import Key, find_lines
from imgfs.errors import UsageError

Format: TypeAlias = Literal[
    "raw", "qcow2", "vmdk", "vdi", "vhd", "vhdx",
    "qcow", "qed", "parallels", "dmg", "cloop", "bochs", "luks",
]  # fmt: skip
Helper: TypeAlias = Literal["python3", "perl", "qemu-img"]
Text: TypeAlias = Annotated[str, Meta(min_length=1)]
Bytes: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 62)]
Seconds: TypeAlias = Annotated[int, Meta(ge=1, le=86400)]

_CHOICES = {"format": get_args(Format), "helpers": get_args(Helper), "extents": ("on", "off")}
_CHOICES |= {"write": ("through",)}
# msgspec's words for types, in a person's.
_TYPES = {"`object`": "a table", "`array`": "a list", "`str`": "a text", "`int`": "a whole number"}
_TYPES |= {"`bool`": "true or false", "`int | str`": "a size", "`float`": "a fraction"}
_TYPES |= {"`bool | str`": '"on" or "off"', "`bool | int | str`": '"off" or a size'}
_BARE = re.compile(r"[A-Za-z0-9_-]+")


class S3Table(Struct, frozen=True):
    endpoint: Text | UnsetType = UNSET
    region: Text | UnsetType = UNSET
    access_key: Text | UnsetType = UNSET
    secret_key: Text | UnsetType = UNSET
    session_token: Text | UnsetType = UNSET
    ca_file: Text | UnsetType = UNSET
    path_style: bool | UnsetType = UNSET
    allow_http: bool | UnsetType = UNSET


class HttpTable(Struct, frozen=True):
    authorization: Text | UnsetType = UNSET
    ca_file: Text | UnsetType = UNSET
    allow_http: bool | UnsetType = UNSET


class DefaultsTable(Struct, frozen=True):
    format: Format | UnsetType = UNSET
    backing: Text | UnsetType = UNSET
    luks_key: Text | UnsetType = UNSET
    cache_size: Bytes | Text | UnsetType = UNSET
    readahead: Bytes | Text | bool | UnsetType = UNSET
    prefetch: Bytes | Text | bool | UnsetType = UNSET
    extents: bool | Literal["on", "off"] | UnsetType = UNSET
    timeout: Seconds | UnsetType = UNSET
    hard: bool | UnsetType = UNSET
    known_hosts: Text | UnsetType = UNSET
    key: Text | UnsetType = UNSET
    config: Text | UnsetType = UNSET
    helpers: list[Helper] | UnsetType = UNSET


class ImageTable(DefaultsTable, frozen=True):
    source: Text | UnsetType = UNSET
    command: Annotated[list[Text], Meta(min_length=1)] | UnsetType = UNSET
    write: Literal["through"] | UnsetType = UNSET
    identity: Text | UnsetType = UNSET
    snapshot: Text | UnsetType = UNSET
    s3: dict[str, Any] | UnsetType = UNSET
    http: dict[str, Any] | UnsetType = UNSET


class FileTable(Struct, frozen=True):
    defaults: dict[str, Any] | UnsetType = UNSET
    images: dict[str, Any] | UnsetType = UNSET
    s3: dict[str, Any] | UnsetType = UNSET
    http: dict[str, Any] | UnsetType = UNSET


AnyTable = TypeVar("AnyTable", bound=Struct)


class Document:
    """A TOML text; `path` is for messages."""

    def __init__(self, path: str, text: str) -> None:
        """Raises UsageError when it is not TOML."""
        self.path = path
        try:
            self.top = tomllib.loads(text)
        except RecursionError:
            raise UsageError(f"{path}: brackets nested too deep") from None
        except ValueError as exc:  # a number of thousands of digits is no TOMLDecodeError
            raise UsageError(_about_syntax(path, text, str(exc))) from None
        self._lines = find_lines(text)

    def refuse(self, table: Key, key: str | None, what: str) -> NoReturn:
        """Raise UsageError about a key of a table, or about the table."""
        where = self._lines.of((*table, key) if key is not None else table)
        words = [f"{self.path}:{where}:" if where is not None else f"{self.path}:"]
        if table:
            words.append(f"[{shown(table)}]" + (":" if key is None else ""))
        if key is not None:
            words.append(f"{shown((key,))}:")
        raise UsageError(" ".join([*words, what]))

    def table(self, at: Key, found: object, type_: type[AnyTable]) -> AnyTable:
        """What was found at a key, as a table of this type.  Raises UsageError."""
        if not isinstance(found, dict):
            self.refuse(at[:-1], at[-1], "expected a table")
        known = type_.__struct_fields__
        for key, value in found.items():
            if key not in known:
                self.refuse(at, key, _unknown(at, key, value, known))
            if any("\0" in text for text in _texts(value)):
                self.refuse(at, key, "there is a NUL in it")
        try:
            return msgspec.convert(found, type_)
        except msgspec.ValidationError as exc:
            what, _, place = str(exc).rpartition(" - at ")
            key = re.split(r"[.\[`]", place.removeprefix("`$."))[0]
            self.refuse(at, key, _about_type(what, key))


def shown(key: Key) -> str:
    """The key as it is written, on one printable line."""
    return ".".join(part if _BARE.fullmatch(part) else _quoted(part) for part in key)


def _quoted(name: str) -> str:
    escaped = name.replace("\\", r"\\").replace('"', r"\"")
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04X}" for c in escaped) + '"'


def _texts(value: object) -> list[str]:
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def _unknown(table: Key, key: str, value: object, known: tuple[str, ...]) -> str:
    if not table and key in DefaultsTable.__struct_fields__:
        return "unknown key; it belongs under [defaults] or an [images.NAME]"
    if table == ("defaults",) and key in ImageTable.__struct_fields__:
        hint = f"[{key}] is for all images" if key in ("s3", "http") else "an image has its own"
        return f"unknown key; {hint}"
    near = difflib.get_close_matches(key, known, 1)
    if near:
        return f'unknown key; did you mean "{near[0]}"?'
    if len(table) == 2 and isinstance(value, dict):
        # [images.disk.img] is a table of an image "disk".
        return f'unknown key; a name with a dot is quoted: ["images"."{table[1]}.{key}"]'
    return f"unknown key; known are: {', '.join(known)}"


def _about_type(what: str, key: str) -> str:
    if what.startswith("Invalid enum value") and key in _CHOICES:
        return f"{what.removeprefix('Invalid enum value ')} is none of {', '.join(_CHOICES[key])}"
    if what.endswith("of length >= 1"):
        return "is empty"
    for theirs, ours in _TYPES.items():
        what = what.replace(theirs, ours)
    return what[:1].lower() + what[1:].replace("`", "")


def _about_syntax(path: str, text: str, what: str) -> str:
    line = None
    if place := re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", what):
        line = place[1] or text.rstrip("\n").count("\n") + 1
        what = what[: place.start()]
    if twice := re.fullmatch(r"Cannot declare (\(.*\)) twice", what, re.DOTALL):
        what = f"[{shown(ast.literal_eval(twice[1]))}] is there twice"
    elif what == "Cannot overwrite a value":
        what = "this key is there twice"
    printable = "".join(c if c.isprintable() else "?" for c in what)
    return f"{path}:{line}: {printable}" if line else f"{path}: {printable}"
