"""`imgfs info`: an image's format, sizes and identity."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

from tests.mounts import imgfs

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
    lines = [line for line in done.stdout.splitlines() if ": " in line]
    told = dict(line.split(": ", 1) for line in lines if not line.startswith(" "))
    plain = {name: value for name, value in found.items() if not isinstance(value, list)}
    assert told.keys() == {name.replace("_", " ") for name in plain}
    for name, value in plain.items():
        shown = told[name.replace("_", " ")]
        assert shown.endswith(f"({value} bytes)") if isinstance(value, int) else shown == value


def test_what_it_stands_on_and_holds(tmp_path: Path) -> None:
    base, top = tmp_path / "base.img", tmp_path / "top.qcow2"
    with base.open("wb") as file:
        file.truncate(64 << 20)
    run("mkfs.ext4", "-q", "-L", "root", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", top)
    found = json.loads(imgfs("info", "--json", top).stdout)
    assert (found["format"], found["virtual_size"]) == ("qcow2", 64 << 20)
    assert [(each["file"], each["format"]) for each in found["layers"]] == [
        ("top.qcow2", "qcow2"),
        ("base.img", "raw"),
    ]
    (content,) = found["contents"]
    assert (content["type"], content["label"], content["left_whole"]) == ("ext4", "root", "")
    assert 40 << 20 < content["free"] < 64 << 20
    assert content["size"] == 64 << 20
    assert 0 < content["used"] < 24 << 20
    assert content["free_but_stored"] < 1 << 16  # what mkfs wrote and does not use
    said = imgfs("info", top).stdout
    assert "label root" in said
    assert "compat" in said or "version" in said
    mapped = json.loads(imgfs("map", "--json", top).stdout)
    theirs = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", base))
    assert [(e["start"], e["length"], e["zero"]) for e in mapped] == [
        (e["start"], e["length"], e["zero"]) for e in theirs
    ]


def test_free_but_stored_and_left_whole(tmp_path: Path) -> None:
    disk = tmp_path / "swap.img"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    run("mkswap", "-q", "-L", "a\x1bb", disk)
    with disk.open("r+b") as file:
        file.seek(8 << 20)
        file.write(b"x" * (1 << 20))
        os.fsync(file.fileno())
    (content,) = json.loads(imgfs("info", "--json", disk).stdout)["contents"]
    assert (content["free"], content["free_but_stored"]) == ((16 << 20) - 4096, 1 << 20)
    said = imgfs("info", disk).stdout
    assert "label a?b" in said
    assert "used 4.0 KiB (4096 bytes), free 16.0 MiB (16773120 bytes), free but stored" in said
    with disk.open("r+b") as file:
        file.seek(4086)
        file.write(b"S1SUSPEND\0")
    (content,) = json.loads(imgfs("info", "--json", disk).stdout)["contents"]
    assert "suspended swap" in content["left_whole"]
    said = imgfs("info", disk).stdout.splitlines()[-1]
    assert said.startswith("  disk: ")
    assert said.endswith(f"; left whole: {content['left_whole']}")


def test_what_is_free_in_doubt(tmp_path: Path) -> None:
    disk = tmp_path / "root.img"
    with disk.open("wb") as file:
        file.truncate(32 << 20)
    run("mkfs.ext4", "-q", "-L", "root", disk)
    run("debugfs", "-w", "-R", "ssv state 2", disk)
    (content,) = json.loads(imgfs("info", "--json", disk).stdout)["contents"]
    assert "not cleanly unmounted" in content["left_whole"]
    assert (content["free"], content["free_but_stored"]) == (None, None)
    said = imgfs("info", disk).stdout.splitlines()[-1]
    assert said.startswith("  disk: ext4, label root, ")
    assert "free" not in said
    assert said.endswith(f"; left whole: {content['left_whole']}")


def test_a_backing_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    base, top = tmp_path / "other/base.img", tmp_path / "top.qcow2"
    base.write_bytes(bytes(1 << 20))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
    done = imgfs("info", top)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "which is not a file beside it" in done.stderr
    assert imgfs("info", top, "-o", "backing=any").returncode == 0


def test_relative_and_missing(image: Path) -> None:
    done = imgfs("info", image.with_name("missing"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("imgfs: ")
    assert done.stderr.count("\n") == 1
