"""Damage to the record of a copy: it tells less then, and never more than was durable."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import pytest

from imgfs.copying.record import Facts, Record
from imgfs.overlays.store import state_root
from tests.damage import LONG, all_of, swapped

pytestmark = pytest.mark.timeout(3600 if LONG else 300)
FACTS = Facts("ssh://host/disk.img", "stat:1", "raw", False, 1 << 40, "/to/ü\udc80.raw", "1:2")
OTHER = FACTS.__class__(*asdict(FACTS).values()).of("3:4")
MARKS = [5 << 20, 17 << 20, 18 << 20, 1 << 30, 7 << 30]
SHARES = [(0, 10), (30, 40), (10, 20), (90, 1 << 40)]


@pytest.fixture(autouse=True)
def quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    caplog.set_level(logging.CRITICAL)


def written(
    destination: str, facts: Facts, marks: list[int], shares: list[tuple[int, int]]
) -> Path:
    before = set((state_root() / "copies").glob("*"))
    record = Record(destination)
    record.begin(facts, 0)
    for mark in marks:
        record.mark(mark)
    for share in shares:
        record.share(*share)
    record.close()
    (path,) = set((state_root() / "copies").glob("*")) - before
    return path


def test_what_was_written_is_read() -> None:
    written("a", FACTS, MARKS, [])
    record = Record("a")
    assert record.known() == (asdict(FACTS), MARKS[-1])
    assert not FACTS.differs(record.known()[0])
    record.begin(OTHER, 3)
    record.share(3, 9)
    assert (record.known(), record.shares()) == ((asdict(OTHER), 3), [(0, 3), (3, 9)])
    record.remove()
    record.close()
    assert Record("a").known() == ({}, 0)


@pytest.mark.parametrize("kind", ["marks", "shares"])
def test_any_damage(kind: str) -> None:
    marks, shares = (MARKS, []) if kind == "marks" else ([], SHARES)
    path = written("a", FACTS, marks, shares)
    theirs = written("b", OTHER, [mark + 1 for mark in marks], shares[::-1]).read_bytes()
    good = path.read_bytes()
    allowed = [(0, 0), *((0, mark) for mark in marks), *shares]
    for damaged in all_of(good, theirs):
        path.write_bytes(damaged)
        record = Record("a")
        facts, mark = record.known()
        assert facts == asdict(FACTS) or (facts, mark) == ({}, 0)
        found = record.shares()
        assert found == allowed[: len(found)]
        assert mark in ([0, *MARKS] if kind == "marks" else [0, 10])
        record.close()


def test_blocks_of_long_records() -> None:
    marks = list(range(1, 10_000))
    path = written("a", FACTS, marks, [])
    theirs = written("b", FACTS, marks, []).read_bytes()
    good = path.read_bytes()
    assert len(good) > 3 * (64 << 10)
    for length in (4096, 64 << 10):
        for first, second in ((0, length), (length, 2 * length)):
            mixed = good[:second] + theirs[second : second + length] + good[second + length :]
            for damaged in (swapped(good, first, second, length), mixed):
                path.write_bytes(damaged)
                record = Record("a")
                facts, mark = record.known()
                assert facts in ({}, asdict(FACTS))
                assert mark <= good[: first if damaged != mixed else second].count(b"\n")
                record.close()


def test_a_line_that_was_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a full disk does: the next one takes its place."""
    import os

    record = Record("a")
    record.begin(FACTS, 0)
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:9], at))
    record.mark(5)
    monkeypatch.setattr(os, "pwrite", write)
    assert record.known() == (asdict(FACTS), 0)
    record.mark(77)
    assert record.known() == (asdict(FACTS), 77)


def test_what_is_said(caplog: pytest.LogCaptureFixture) -> None:
    path = written("a", FACTS, MARKS, [])
    path.write_bytes(path.read_bytes().replace(b" %d\n" % MARKS[1], b" %d\n" % (MARKS[1] + 1)))
    caplog.set_level(logging.WARNING)
    record = Record("a")
    assert record.known() == (asdict(FACTS), MARKS[0])
    record.shares()
    (said,) = caplog.messages
    assert said == f"{path}: is damaged in line 4; what it tells from there on is copied again"
