"""On which line a key stands, told for every way to write it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.config.tomllines import find_lines


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("a = 1", "a", 1),
        ("\n# a = 1\n\n  a = 1", "a", 4),
        ("\r\na = 1\r\nb = 2\r\n", "b", 3),
        ("[t]\na = 1", "t a", 2),
        ("[t]\na = 1", "t", 1),
        ("[ t . 'u' ] # [v]\na = 1", "t u a", 2),
        ("t.u.v = 1\nt.u.w = 2", "t u w", 2),
        ("t.u.v = 1\nt.u.w = 2", "t u", 1),  # where it first is
        ("[t.u]\n[t]\na = 1", "t", 2),  # its own header, not the one that implies it
        ("[t.u]\n", "t", 1),
        ("[[t]]\na = 1\n[[t]]\na = 2", "t a", 2),
        ("t = {a = 1, b = [\n2, 3]}\nc = 1", "t b", 1),  # the table's
        ("t = {a = 1, b = [\n2, 3]}\nc = 1", "c", 3),
        ('"a\\u0062" = 1', "ab", 1),
        ("'a\\u0062' = 1", "a\\u0062", 1),
        ("[t]\na = 1", "x", None),
        ("[t]\na = 1", "t x", 1),
    ],
)
def test_lines(text: str, key: str, line: int | None) -> None:
    tomllib.loads(text)
    assert find_lines(text).of(tuple(key.split(" "))) == line


@pytest.mark.parametrize("text", ["", "=", "[", "a", "a = '", "a = '''\n", "'a", "a.", "]\na = 1"])
def test_what_is_not_toml_ends_the_search(text: str) -> None:
    find_lines(text + "\nb = 1")


VALUES = [
    "1",
    "2000-01-01 00:00:00",
    "'[b]'",
    '"\\"\\\\"',
    '"# no comment"',
    "'\\'",
    '"""\n[b]\nc = 1\n"""',
    '"""a \\\n  "" \\""" b"""""',
    '"""a""""',
    "'''a''''",
    "'''\nd = 1\n''\\'''''",
    "[\n  1, # ] }\n  [2, '''\n]'''],\n]",
    "{a = \"}\", b = [{c = 1}, {d = '{'}]}",
    "[]",
    "{}",
    '""',
    "''''''",
]
BETWEEN = ["\n", "\r\n", "  # [x]\n", "\t\n \n", "\n# a = '''\n", ' # "\n']
WRITTEN: list[Callable[[str], str]] = [
    lambda name: name,
    lambda name: f"'{name}'",
    lambda name: f'"{name}"',
    lambda name: '"' + "".join(f"\\u{ord(c):04x}" for c in name) + '"',
]


@given(st.data())
def test_lines_of_any_text(data: st.DataObject) -> None:
    """Texts with all of TOML's traps in them, of which it is known where each key was put."""
    text = ""
    expected: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()

    def dotted(names: list[str]) -> str:
        dot = data.draw(st.sampled_from([".", " . ", "\t."]))
        return dot.join(data.draw(st.sampled_from(WRITTEN))(name) for name in names)

    for number in range(data.draw(st.integers(1, 8))):
        text += data.draw(st.sampled_from(["", " ", *BETWEEN]))
        line = text.count("\n") + 1
        names = [f"k{number}", *data.draw(st.lists(st.sampled_from("abc"), max_size=2))]
        if data.draw(st.booleans()):
            table = tuple(names)
            text += f"[ {dotted(names)}]"
            expected[table] = line
        else:
            text += f"{dotted(names)} = {data.draw(st.sampled_from(VALUES))}"
            expected[*table, *names] = line
        text += data.draw(st.sampled_from(BETWEEN))
    tomllib.loads(text)  # it is TOML
    lines = find_lines(text)
    assert {key: lines.of(key) for key in expected} == expected
