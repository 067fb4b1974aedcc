"""`imgfs map`: the picture, its legend, and JSON as qemu-img prints it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from imgfs.cli import picture
from imgfs.cli.map import draw
from imgfs.extents import ExtentListBuilder, Flags, from_data_ranges
from imgfs.guest.usage import Usage
from tests.mounts import MIB, imgfs

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
        picture = draw(Usage(from_data_ranges(iter([(at, at + 1)]), size)), 42)[0]
        assert picture.count("X") == 1
        assert picture.index("X") == 1 + at * 40 // size


def test_fewer_bytes_than_cells() -> None:
    builder = ExtentListBuilder()
    builder.append(2, Flags.DATA)
    builder.append(3, Flags.HOLE | Flags.ZERO)
    assert draw(Usage(builder.finish(3)), 80) == [
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


BOOT = "21686148-6449-6e6f-744e-656564454649"  # type of a BIOS boot partition
UNKNOWN = "nothing is known of what it holds"


@pytest.fixture
def swapped(tmp_path: Path) -> Path:
    """128 MiB: swap with 16 MiB that were written to, and a boot loader with 8 MiB."""
    disk, swap = tmp_path / "disk.img", tmp_path / "swap"
    for path, size in ((disk, 128 * MIB), (swap, 63 * MIB)):
        with path.open("wb") as file:
            file.truncate(size)
    table = f"label: gpt\nstart=2048, size=63M, type=swap\nsize=32M, type={BOOT}\n"
    subprocess.run(["sfdisk", "-q", disk], input=table.encode(), timeout=20, check=True)
    run("mkswap", "-q", "-L", "red\x1b[31m", swap)
    with disk.open("r+b") as file:
        for at, data in (
            (MIB, swap.read_bytes()[:4096]),
            (17 * MIB, os.urandom(16 * MIB)),
            (64 * MIB, b"\xeb" + os.urandom(8 * MIB - 1)),
        ):
            file.seek(at)
            file.write(data)
        os.fsync(file.fileno())
    return disk


def test_what_was_deleted(swapped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "66")
    lines = output("map", "--sparse", swapped).splitlines()
    # 2 MiB a cell: GPT and swap's header, what was swapped, the boot loader, the GPT's backup.
    wanted = "X" + "." * 7 + "D" * 9 + "." * 15 + "X" * 4 + "." * 27 + "X"
    assert lines[0] == f"[{wanted}]"
    assert lines[3] == "D deleted  16.0 MiB (12.5 %)"
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert "partition 1  swap red?[31m" in text
    assert f"left whole: {UNKNOWN}" in text
    for image, name in ((swapped, "raw"), (tmp_path / "disk.qcow2", "qcow2")):
        if name == "qcow2":
            run("qemu-img", "convert", "-O", name, swapped, image)
        found = json.loads(output("map", "--sparse", "--json", image))
        assert found["deleted"] == sum(part["deleted"] for part in found["parts"]) == 16 * MIB
        assert found["data"] + found["hole"] + found["deleted"] == found["size"] == 128 * MIB
        swap, loader, _ = found["parts"]
        assert (swap["start"], swap["size"], swap["data"]) == (MIB, 63 * MIB, 4096)
        assert (loader["holds"], loader["left_whole"]) == ("", UNKNOWN)
        assert {"start": 17 * MIB, "length": 16 * MIB, "state": "deleted"} in found["extents"]


def test_png(swapped: Path, tmp_path: Path) -> None:
    assert output("map", "--sparse", "--png", tmp_path / "a.png", swapped) == ""
    assert output("map", "--png", tmp_path / "b.png", swapped) == ""
    with Image.open(tmp_path / "a.png") as deleted, Image.open(tmp_path / "b.png") as plain:
        for image, is_there in ((deleted, True), (plain, False)):
            colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
            assert (picture.DELETED in colours) == is_there
            assert picture.DATA in colours
    done = imgfs("map", "--png", tmp_path / "missing/a.png", swapped)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "missing/a.png: the picture cannot be written: No such file" in done.stderr


def test_refusals_are_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        done = imgfs("map", path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("imgfs: ")
