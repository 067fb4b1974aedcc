"""The text in which LVM2 keeps its metadata: `key = value` and `section { ... }`, nested."""

from __future__ import annotations

import re
from typing import TypeAlias

Value: TypeAlias = "str | int | float | list[str | int | float]"
Section: TypeAlias = "dict[str, Value | Section]"

_DEEPEST = 8
_TOKEN = re.compile(
    r"""\s+ | \#[^\n]* | (?P<word>[\w.+-]+) | "(?P<text>(?:[^"\\]|\\.)*)" | (?P<sign>[{}=\[\],])""",
    re.VERBOSE | re.DOTALL,
)
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


class BadText(Exception):
    """It does not follow the grammar."""


def parse(text: str) -> Section:
    """The outermost section.  Raises BadText that says where."""
    tokens = _Tokens(text)
    root: Section = {}
    open_sections = [root]
    while kind := tokens.kind:
        if kind == "}" and len(open_sections) > 1:
            open_sections.pop()
            tokens.next()
            continue
        name = tokens.take("word")
        if name in open_sections[-1]:
            raise BadText(f"{name} is there twice, at character {tokens.at}")
        if tokens.kind == "{":
            tokens.next()
            section: Section = {}
            open_sections[-1][name] = section
            open_sections.append(section)
            if len(open_sections) > _DEEPEST:
                raise BadText(f"sections are nested deeper than {_DEEPEST}")
        else:
            tokens.take("=")
            open_sections[-1][name] = _value(tokens)
    if len(open_sections) > 1:
        raise BadText("it ends inside of a section")
    return root


def _value(tokens: _Tokens) -> Value:
    if tokens.kind != "[":
        return _scalar(tokens)
    tokens.next()
    items: list[str | int | float] = []
    while tokens.kind != "]":
        if items:
            tokens.take(",")
        items.append(_scalar(tokens))
    tokens.next()
    return items


def _scalar(tokens: _Tokens) -> str | int | float:
    if tokens.kind == "text":
        return _ESCAPED.sub(r"\1", tokens.take("text"))
    number = tokens.take("word")
    if not _NUMBER.fullmatch(number):
        raise BadText(f"{number:.40} is not a number")
    return float(number) if "." in number else int(number)


class _Tokens:
    """One token at a time: `kind` is a sign itself, `word` or `text`; `` at the end."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._end = 0
        self.at = 0
        self.kind = ""
        self._value = ""
        self.next()

    def next(self) -> None:
        while self._end < len(self._text):
            self.at = self._end
            found = _TOKEN.match(self._text, self.at)
            if found is None:
                raise BadText(f"{self._text[self.at]!r} at character {self.at} is not understood")
            self._end = found.end()
            if found.lastgroup:
                self._value = found[found.lastgroup]
                self.kind = self._value if found.lastgroup == "sign" else found.lastgroup
                return
        self.at, self.kind = len(self._text), ""

    def take(self, kind: str) -> str:
        if self.kind != kind:
            raise BadText(f"a {kind} is missing at character {self.at}")
        value = self._value
        self.next()
        return value
