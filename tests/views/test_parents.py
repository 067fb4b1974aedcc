"""The parent of a differencing VHD or VHDX, found by any of its names, and never another file."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from imgfs.formats import vhd_tables as vt
from tests.formats.test_vhd import PARENT_ID, UTF16, Differencing, make_footer
from tests.formats.test_vhdx import MIB
from tests.mounts import imgfs

SIZE = 2 * MIB
NAMES = {b"W2ru": "..\\base\\first.vhd".encode(UTF16), b"W2ku": "C:\\vm\\second.vhd".encode(UTF16)}


def fixed(unique_id: bytes) -> tuple[bytes, bytes]:
    """A disk's bytes, and a fixed VHD of them."""
    content = os.urandom(SIZE)
    footer = make_footer(SIZE, vt.FIXED, unique_id=unique_id, data_offset=vt.NO_OFFSET)
    return content, content + footer


def child(directory: Path) -> Path:
    path = directory / "child.vhd"
    path.write_bytes(Differencing(SIZE, MIB, NAMES, "third.vhd").file())
    return path


@pytest.mark.parametrize("name", ["first.vhd", "second.vhd", "third.vhd"])
def test_by_any_name(tmp_path: Path, name: str) -> None:
    content, parent = fixed(PARENT_ID.bytes)
    (tmp_path / name).write_bytes(parent)
    done = imgfs("copy", "--no-progress", child(tmp_path), tmp_path / "out.raw")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out.raw").read_bytes() == content


def test_another_file_of_the_first_name_is_passed_over(tmp_path: Path) -> None:
    content, parent = fixed(PARENT_ID.bytes)
    (tmp_path / "second.vhd").write_bytes(fixed(uuid.uuid4().bytes)[1])
    (tmp_path / "third.vhd").write_bytes(parent)
    assert imgfs("copy", "--no-progress", child(tmp_path), tmp_path / "out.raw").returncode == 0
    assert (tmp_path / "out.raw").read_bytes() == content


def test_only_another_file_is_there(tmp_path: Path) -> None:
    (tmp_path / "second.vhd").write_bytes(fixed(uuid.uuid4().bytes)[1])
    done = imgfs("info", child(tmp_path))
    assert done.returncode == 1
    assert "second.vhd: is not what child.vhd was made on" in done.stderr


def test_none_is_there(tmp_path: Path) -> None:
    done = imgfs("info", child(tmp_path))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "first.vhd" in done.stderr
