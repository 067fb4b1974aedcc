"""`imgfs map`: the picture, its legend, and JSON as qemu-img prints it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from imgfs.cli.map import draw
from imgfs.extents import ExtentListBuilder, Flags, from_data_ranges
from tests.e2e.conftest import MIB, imgfs

from .conftest import run


def output(*words: object) -> str:
    done = imgfs(*words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_json_is_qemus(image: Path) -> None:
    theirs = run("qemu-img", "map", "--output=json", "-f", "raw", image)
    assert output("map", "--json", image) == theirs


def test_picture_shows_where_data_is(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "66")
    picture, data, hole, count = output("map", image).splitlines()
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", image))
    size = image.stat().st_size
    assert len(picture) == (66 if size else 2)
    stored = [e for e in extents if e["data"]]
    for i, cell in enumerate(picture[1:-1]):
        a, b = i * size / 64, (i + 1) * size / 64
        has_data = any(e["start"] < b and e["start"] + e["length"] > a for e in stored)
        assert cell == ("X" if has_data else "."), i
    total = sum(min(e["length"], size - e["start"]) for e in stored)
    percent = 100 * total / size if size else 0
    assert re.fullmatch(rf"X data  .* \({percent:.1f} %\)", data)
    assert re.fullmatch(rf"\. hole  .* \({100 - percent if size else 0:.1f} %\)", hole)
    if size % 512 == 0:  # else qemu's zeroes up to the sector's end are an extent of their own
        assert count.startswith(f"{len(extents) if size else 0} extents in ")


def test_one_byte_of_data_is_seen() -> None:
    size = 1 << 50
    for at in (0, 12345 << 30, size - 1):
        picture = draw(from_data_ranges(iter([(at, at + 1)]), size), 42)[0]
        assert picture.count("X") == 1
        assert picture.index("X") == 1 + at * 40 // size


def test_fewer_bytes_than_cells() -> None:
    builder = ExtentListBuilder()
    builder.append(2, Flags.DATA)
    builder.append(3, Flags.HOLE | Flags.ZERO)
    assert draw(builder.finish(3), 80) == [
        "[XX.]",
        "X data  2 bytes (66.7 %)",
        ". hole  1 bytes (33.3 %)",
        "2 extents in 3 bytes",
    ]


def test_known_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(os.urandom(4 * MIB))
        file.truncate(8 * MIB)
        os.fsync(file.fileno())
    assert output("map", path).splitlines() == [
        "[XXXX....]",
        "X data  4.0 MiB (50.0 %)",
        ". hole  4.0 MiB (50.0 %)",
        "2 extents in 8.0 MiB",
    ]


def test_refusals_are_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        done = imgfs("map", path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("imgfs: ")
