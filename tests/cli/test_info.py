"""`imgfs info`: an image's format, sizes and identity."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from tests.e2e.conftest import imgfs

from .conftest import run


def test_json(image: Path) -> None:
    done = imgfs("info", "--json", image)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    theirs = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", image))
    assert found["format"] == theirs["format"]
    assert found["source"] == str(image)
    size = image.stat().st_size
    assert found["virtual_size"] == size <= theirs["virtual-size"] < size + 512
    stored = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", image))
    data = sum(min(e["length"], size - e["start"]) for e in stored if e["data"])
    assert found["stored_size"] == data
    assert datetime.fromisoformat(found["modified"]).timestamp() == int(image.stat().st_mtime)
    assert found["identity"] == "stat"


def test_text_is_what_json_says(image: Path) -> None:
    found = json.loads(imgfs("info", "--json", image).stdout)
    done = imgfs("info", image)
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert lines.keys() == {name.replace("_", " ") for name in found}
    for name, value in found.items():
        shown = lines[name.replace("_", " ")]
        assert shown.endswith(f"({value} bytes)") if isinstance(value, int) else shown == value


def test_relative_and_missing(image: Path) -> None:
    done = imgfs("info", image.with_name("missing"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("imgfs: ")
    assert done.stderr.count("\n") == 1
