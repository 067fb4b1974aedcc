"""The log of xfs when it has gone round: it is as clean as xfs_logprint finds it."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest

from imgfs.guest.xfs import look
from tests.drive import Files, size_of
from tests.guest.mounted import LONG, mounted, run, runs
from tests.guest.test_xfs import free_of_xfs_db, made

MiB = 1 << 20
SECTOR = 512


def is_clean(image: Path) -> bool:
    """As the tool sees it."""
    return "state: <CLEAN>" in run("xfs_logprint", "-t", image)


def left_whole(image: Path) -> str:
    return Files(image).run(look(0, size_of(image))).left_whole


def log_of(image: Path) -> tuple[int, int]:
    """Byte where it starts, and how many sectors of 512 bytes it has."""
    names = "p blocksize agblocks agblklog logstart logblocks"
    text = run("xfs_db", "-r", "-c", "sb 0", "-c", names, image)
    block, per_group, shift, at, blocks = (int(value) for value in re.findall(r"= (\d+)", text))
    first = (at >> shift) * per_group + at % (1 << shift)
    return first * block, blocks * block // SECTOR


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """With the smallest log that there may be."""
    return made(tmp_path / "disk", 80 * MiB, "--unsupported", "-l", "size=1400b")


@pytest.mark.parametrize("buffer", ["32k", "256k"] if LONG else ["256k"])
def test_gone_round(image: Path, buffer: str) -> None:
    """Some cycles later, after each unmount: the last ones pass the log's end again."""
    start, _ = log_of(image)

    def newest() -> int:
        """The cycle that the first sector is of."""
        with image.open("rb") as file:
            file.seek(start)
            first, second = struct.unpack(">2I", file.read(8))
        return int(second if first == 0xFEEDBABE else first)

    turn = 0
    while newest() < (6 if LONG else 3):
        with mounted(image, f"logbsize={buffer}") as point:
            for number in range(100):
                path = point / f"{number}"
                path.touch()
                os.setxattr(path, "user.a", os.urandom(3000 + turn))
        assert is_clean(image)
        assert left_whole(image) == ""
        turn += 1
        assert turn < 300
    assert turn > 3
    found = Files(image).run(look(0, size_of(image)))
    assert runs(found.free) == free_of_xfs_db(image)


@pytest.mark.parametrize("after", [0, 1])
def test_unmount_record_at_the_end(image: Path, after: int) -> None:
    """Its header in the last sector of the log, what it holds in the first, by hand; or all of it
    just before the end."""
    start, sectors = log_of(image)
    data = bytearray(image.read_bytes())
    header, payload = (bytearray(data[start + at :][:SECTOR]) for at in (0, SECTOR))
    assert header[:8] == bytes.fromhex("feedbabe00000001")
    at = sectors - 2 + after
    struct.pack_into(">QQ", header, 16, 1 << 32 | at, 1 << 32 | at)
    for sector in range(sectors):
        struct.pack_into(">2I", data, start + sector * SECTOR, 1, 0)
    data[start + at * SECTOR : start + (at + 1) * SECTOR] = header
    behind = start + (at + 1) % sectors * SECTOR
    struct.pack_into(">I", payload, 0, 1 + after)
    data[behind : behind + SECTOR] = payload
    image.write_bytes(data)
    assert is_clean(image)
    assert left_whole(image) == ""
    with mounted(image):
        pass
    struct.pack_into(">B", data, behind + 9, 0)  # the flag of an unmount
    image.write_bytes(data)
    assert not is_clean(image)
    assert "not an unmount record" in left_whole(image)
