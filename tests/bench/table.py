"""The figures of all benches as Markdown, and which rows want a word of explanation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from tests.bench.report import Row, shown

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
#: A peer is ahead when this is what the ratio would be shown as, or less.
AHEAD = 0.99
SMALL = "¹²³⁴⁵⁶⁷⁸⁹"


@dataclass(frozen=True)
class Bench:
    """Figures of one script, and of when they are."""

    name: str
    title: str
    rows: Sequence[Row]
    facts: Mapping[str, Any]


def rows_of(kept: Mapping[str, Any]) -> list[Row]:
    return [Row(**each) for each in kept["rows"]]


def is_ahead(row: Row, name: str) -> bool:
    return not name.startswith("imgfs") and round(row.ratio(name), 2) <= AHEAD


def why(reasons: Mapping[str, str], bench: str, row: Row, name: str) -> str | None:
    """The sentence for `bench: what: peer`; the first pattern that fits."""
    key = f"{bench}: {row.what}: {name}"
    return next((text for pattern, text in reasons.items() if fnmatchcase(key, pattern)), None)


class Notes:
    """Sentences below a table, each there once."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self._texts:
            self._texts.append(text)
        return "".join(SUPERSCRIPT[digit] for digit in str(self._texts.index(text) + 1))

    def lines(self) -> list[str]:
        marked = [f"{self.mark(text)} {text}  " for text in self._texts]
        return ["", *marked] if marked else []


SUPERSCRIPT = {"0": "⁰", **{str(n): sign for n, sign in enumerate(SMALL, 1)}}


def unexplained(benches: Iterable[Bench], reasons: Mapping[str, str]) -> list[str]:
    """Rows in which a peer is ahead, and nobody says why."""
    return [
        f"{bench.name}: {row.what}: {name}: imgfs is {row.ratio(name):.2f} times"
        for bench in benches
        for row in bench.rows
        for name in row.samples
        if row.ours and is_ahead(row, name) and why(reasons, bench.name, row, name) is None
    ]


def line(bench: Bench, row: Row, reasons: Mapping[str, str], notes: Notes, first: str) -> str:
    """One figure: imgfs's, then its peers', with how many times as good imgfs is."""
    others = []
    for name in row.samples:
        if name == row.ours:
            continue
        text = f"{name} {shown(row.median(name))}"
        if row.ours:
            ratio = row.ratio(name)
            text += f" (**{ratio:.2f}**)" if is_ahead(row, name) else f" ({ratio:.2f})"
            reason = why(reasons, bench.name, row, name)
            if is_ahead(row, name):
                text += notes.mark(reason or "nobody has said why yet")
        others.append(text)
    ours = shown(row.median(row.ours)) if row.ours else ""
    return f"| {first} | {row.unit} | {ours} | {', '.join(others)} |"


HEAD = ["| | unit | imgfs | peers (imgfs is … times as good) |", "| --- | --- | ---: | --- |"]


def machine(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['cores']} cores ({facts['cpu']}), {facts['memory_gib']:.0f} GiB, "
        f"Linux {facts['kernel']}"
    )


def whole(benches: Sequence[Bench], reasons: Mapping[str, str]) -> str:
    """A page of all figures."""
    lines = ["# Figures", ""]
    lines += ["Made by `python -m tests.bench.run`; medians.  Of s, ms and MiB less is better."]
    versions: dict[str, str] = {}
    for bench in benches:
        notes, facts = Notes(), bench.facts
        versions |= facts["versions"]
        when = f"{facts['date']}, load {facts['load'][0]} to {facts['load'][1]}"
        lines += ["", f"## {bench.title}", ""]
        lines += [f"`{facts['command']}`: {when}, {facts['seconds']:.0f} s.  {machine(facts)}", ""]
        lines += [*HEAD, *(line(bench, row, reasons, notes, row.what) for row in bench.rows)]
        lines += notes.lines()
    lines += ["", "## Versions", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {version} |" for name, version in sorted(versions.items())]
    return "\n".join(lines) + "\n"


def short(
    benches: Sequence[Bench], chosen: Sequence[tuple[str, str]], reasons: Mapping[str, str]
) -> str:
    """What README shows: the chosen rows, patterns of a bench and of what it measured."""
    notes = Notes()
    lines = []
    for name, pattern in chosen:
        for bench in benches:
            for row in bench.rows:
                if bench.name == name and fnmatchcase(row.what, pattern):
                    lines.append(line(bench, row, reasons, notes, f"{bench.title}: {row.what}"))
    facts = benches[-1].facts if benches else None
    said = [f"{machine(facts)}, {facts['date']}.", ""] if facts else []
    return "\n".join([*said, *HEAD, *lines, *notes.lines()]) + "\n"


def put_between_markers(text: str, part: str) -> str:
    """Raises ValueError where there are none."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{part}{END}{after}"
