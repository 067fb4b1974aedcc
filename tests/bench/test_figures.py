"""The table of the benches' figures, and that a bench runs and says what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import run, table
from tests.bench.report import Report, Row

FACTS = {
    "command": "python -m tests.bench.x", "date": "2026-01-01", "load": [0.1, 0.2], "seconds": 3,
    "cores": 2, "cpu": "some", "memory_gib": 23.4, "kernel": "6.18", "versions": {"fio": "3.33"},
}  # fmt: skip
ROWS = [
    Row("rate", "MB/s", {"imgfs": [100.0, 300.0, 200.0], "qemu": [50.0], "nbdcopy": [400.0]}),
    Row("time", "s", {"imgfs": [2.0], "qemu": [4.0], "nbdcopy": [1.0]}),
]
BENCH = table.Bench("x", "A bench", ROWS, FACTS)


def test_less_is_better_of_seconds_only() -> None:
    assert [row.ratio("qemu") for row in ROWS] == [4, 2]
    assert [row.ratio("nbdcopy") for row in ROWS] == [0.5, 0.5]


def test_who_is_ahead_wants_a_reason() -> None:
    assert len(table.unexplained([BENCH], {})) == 2
    left = table.unexplained([BENCH], {"x: rate: *": "because"})
    assert left == ["x: time: nbdcopy: imgfs is 0.50 times"]
    assert not table.unexplained([BENCH], {"x: *: nbdcopy": "because"})


def test_the_tables() -> None:
    text = table.whole([BENCH], {"x: *: nbdcopy": "because"})
    assert "| rate | MB/s | 200 | qemu 50.0 (4.00), nbdcopy 400 (**0.50**)¹ |" in text
    assert text.count("¹ because") == 1
    assert "| fio | 3.33 |" in text
    part = table.short([BENCH], [("x", "ti*")], {})
    assert "| A bench: time | s | 2.00 |" in part and "rate" not in part
    page = table.put_between_markers(f"a\n{table.BEGIN}\nold\n{table.END}\nb\n", part)
    assert page == f"a\n{table.BEGIN}\n{part}{table.END}\nb\n"
    with pytest.raises(ValueError, match="figures"):
        table.put_between_markers("nothing", part)


def test_the_readme_has_the_table_of_what_is_kept() -> None:
    """Of a run that was not followed by its table, or a table that was changed by hand."""
    kept = json.loads(run.RESULTS.read_text())
    readme, whole = run.tables(kept)
    assert run.README.read_text() == readme
    assert run.WHOLE.read_text() == whole


def test_a_report_is_told_as_it_is_read(tmp_path: Path) -> None:
    report = Report()
    for value in (1.0, 3.0):
        report.note("time", "s", "imgfs", value)
    report.finish(tmp_path / "json")
    (row,) = table.rows_of(json.loads((tmp_path / "json").read_text()))
    assert (row.what, row.unit, row.ours, row.median("imgfs")) == ("time", "s", "imgfs", 2)


def test_scale_reduced(tmp_path: Path) -> None:
    """It compares what it reads, and counts the extents itself."""
    words = ["--tib", "64", "--extents", "20000", "--images", "10", "--deep", "12"]
    words += ["--work", str(tmp_path), "--json", str(tmp_path / "json")]
    command = [sys.executable, "-m", "tests.bench.scale", *words]
    subprocess.run(command, check=True, timeout=110, capture_output=True)
    rows = {row.what: row for row in table.rows_of(json.loads((tmp_path / "json").read_text()))}
    peaks = [row.median("imgfs") for what, row in rows.items() if what.endswith("peak memory")]
    assert len(peaks) == 5
    assert max(peaks) < 60
    assert list(tmp_path.iterdir()) == [tmp_path / "json"]
