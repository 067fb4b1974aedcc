"""README's pictures: the script makes them, and they tell of no machine and fetch nothing."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from imgfs.cli import picture

REPOSITORY = Path(__file__).parents[1]
PICTURES = REPOSITORY / "contrib/pictures"
SHOWN = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", (REPOSITORY / "README.md").read_text("utf-8"))
SVG = '<svg xml:space="preserve" class="rich-terminal" viewBox="0 0 '


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount disks' filesystems")
def test_the_script_draws_a_disk(tmp_path: Path) -> None:
    script = [sys.executable, REPOSITORY / "contrib/pictures.py", "-d", tmp_path, "map"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    with Image.open(tmp_path / "map.png") as made, Image.open(PICTURES / "map.png") as shown:
        assert made.format == "PNG"
        assert made.size == shown.size  # the same partitions, in as many squares
        for image in (made, shown):
            pixels = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 20)}
            for colour in (picture.DATA, picture.DELETED, picture.HOLE):
                assert pixels[colour] > 100 * picture.SQUARE**2
    # Nothing is left of it.
    assert "imgfs-pictures" not in Path("/proc/mounts").read_text()
    assert "fedora-33.img" not in subprocess.check_output(["losetup", "-a"], text=True)


def test_readme_shows_them_all() -> None:
    assert all(alt for alt, _ in SHOWN)
    shown = {path for _, path in SHOWN}
    assert {f"contrib/pictures/{path.name}" for path in PICTURES.iterdir()} <= shown
    assert {"map.png", "top.svg", "copy.svg"} <= {path.name for path in PICTURES.iterdir()}
    assert all((REPOSITORY / path).is_file() for path in shown)


@pytest.mark.parametrize("path", sorted(PICTURES.iterdir()), ids=lambda path: path.name)
def test_a_picture_stands_for_itself(path: Path) -> None:
    data = path.read_bytes()
    assert len(data) < 60_000
    if path.suffix == ".png":
        with Image.open(path) as image:
            assert not image.info
        return
    text = data.decode()
    assert text.startswith(SVG)
    ElementTree.fromstring(text)
    said = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|@import|@font-face|url\((?!#)|<(image|script|a)\b", said)
    assert set(re.findall(r"/mnt/\w+|(?<![\w/])/\w+/\w+", said)) <= {"/mnt/pool", "/mnt/scratch"}
    assert socket.gethostname() not in said
