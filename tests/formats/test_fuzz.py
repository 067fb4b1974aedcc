"""The fuzzer itself: that it finds what is wrong, and a few of its cases."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs.formats import qcow2
from imgfs.pieces import PieceListBuilder
from tests.formats import fuzz
from tests.formats.fuzz_corpus import Subject, subjects

CASES = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    return list(subjects(tmp_path_factory.mktemp("corpus")))


def test_what_is_not_changed_is_read(corpus: list[Subject]) -> None:
    """Or else nothing of the readers would be seen."""
    assert len({each.name for each in corpus}) == len(corpus) > 30
    for each in corpus:
        assert fuzz.use(each, each.content, random.Random(1)), each.name


def test_some_cases(corpus: list[Subject]) -> None:
    opened = [fuzz.attempt(each, 7, number) for each in corpus for number in range(CASES)]
    assert len(opened) // 5 < sum(opened) < len(opened)


def crash(*_: object) -> None:
    raise KeyError("a bug")


def spin(*_: object) -> None:
    while True:
        pass


def fill(self: object, pieces: PieceListBuilder, end: int) -> None:
    assert bytes(fuzz.MOST_MEMORY + 1)
    pieces.zero(end)


def wrong(self: object, pieces: PieceListBuilder, end: int) -> None:
    pieces.literal(random.randbytes(end - pieces.end))


@pytest.mark.parametrize("bug", [crash, spin, fill, wrong])
def test_what_it_finds(
    bug: Callable[..., object],
    corpus: list[Subject],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fuzz, "HANGS_S", 0.3)
    monkeypatch.setattr(qcow2.Qcow2Disk, "_append_nothing", bug)
    (subject,) = (each for each in corpus if each.name == "qcow2")
    with pytest.raises((fuzz.Finding, KeyError)):
        for number in range(40):
            fuzz.attempt(subject, 1, number)


def test_the_command(tmp_path: Path) -> None:
    words = ("--cases", "2", "--seed", "5", "--only", "vdi", "--keep", tmp_path)
    command = [sys.executable, "-m", "tests.formats.fuzz", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("seed 5: 2 cases of 1 files, ")
    assert done.stdout.endswith(" 0 found\n")
    assert not list(tmp_path.iterdir())
