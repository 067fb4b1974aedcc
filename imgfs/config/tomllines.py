"""On which line of a TOML text each key stands.  tomllib does not say, and a person wants to know.

For texts that tomllib has accepted (https://toml.io/en/v1.0.0): what is not understood here ends
the search, and what was found until then is still right.  Keys inside of inline tables and arrays
are not looked for; they stand where their table does.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from typing import TypeAlias

Key: TypeAlias = tuple[str, ...]  #: a key's names, from the root

_SPACE = re.compile(r"[ \t]*")
_COMMENT = re.compile(r"[^\n]*")
_HEADER = re.compile(r"\[{0,2}")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_STRING = re.compile(
    # Up to two quotes may stand before the three that end it: those are part of the text.
    r'"""(?:[^"\\]|\\.|"{1,2}(?!"))*"{3,5}'
    r"|'''(?:[^']|'{1,2}(?!'))*'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_NAME = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""")
_PLAIN = re.compile(r"""[^"'#\[\]{}\n]+""")


@dataclass(slots=True)
class Lines:
    """Line numbers, from 1."""

    _written: dict[Key, int] = field(default_factory=dict)
    _implied: dict[Key, int] = field(default_factory=dict)  # `a` of `[a.b]`

    def add(self, key: Key, line: int) -> None:
        self._written.setdefault(key, line)
        for end in range(1, len(key)):
            self._implied.setdefault(key[:end], line)

    def of(self, key: Key) -> int | None:
        """The key's line, else that of the nearest table around it, else None."""
        for end in range(len(key), 0, -1):
            line = self._written.get(key[:end]) or self._implied.get(key[:end])
            if line is not None:
                return line
        return None


def find_lines(text: str) -> Lines:
    """The lines of all keys and tables."""
    lines = Lines()
    table: Key = ()
    at, counted, line = 0, 0, 1
    while True:
        at = _after(_BLANK, text, at)
        line += text.count("\n", counted, at)
        counted = at
        start, at = at, _after(_HEADER, text, at)
        is_table = at > start
        key, at = _key(text, at)
        if not key:
            return lines
        if is_table:
            table = key
            lines.add(table, line)
        else:
            lines.add((*table, *key), line)
        at = _end_of_line(text, at)


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return at if match is None else match.end()


def _key(text: str, at: int) -> tuple[Key, int]:
    """The dotted key at an offset, and where it ends; an empty one where there is none."""
    names: list[str] = []
    while True:
        at = _after(_SPACE, text, at)
        name = _NAME.match(text, at)
        if name is None:
            return (), at
        names.append(_unquoted(name[0]))
        at = _after(_SPACE, text, name.end())
        if text[at : at + 1] != ".":
            return tuple(names), at
        at += 1


def _unquoted(name: str) -> str:
    if name[0] in "\"'":
        return next(iter(tomllib.loads(f"{name} = 0")))
    return name


def _end_of_line(text: str, at: int) -> int:
    """Where the line ends that goes on at an offset, however many a value makes of it."""
    depth = 0
    while at < len(text):
        match text[at]:
            case "\n":
                if depth <= 0:
                    return at
                at += 1
            case '"' | "'":
                string = _STRING.match(text, at)
                if string is None:
                    return len(text)
                at = string.end()
            case "#":
                at = _after(_COMMENT, text, at)
            case "[" | "{":
                depth, at = depth + 1, at + 1
            case "]" | "}":
                depth, at = depth - 1, at + 1
            case _:
                at = _after(_PLAIN, text, at)
    return at
