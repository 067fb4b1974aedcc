"""Images as people make them, and the command line run on them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.mounts import MIB


def run(*words: object) -> str:
    command = [str(w) for w in words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture(params=["qemu-img", "dd", "truncate", "tail", "full", "empty"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A raw image made by the named tool, synced, so that its holes are settled."""
    path = tmp_path / "disk.img"
    if request.param == "qemu-img":
        run("qemu-img", "create", "-q", "-f", "raw", path, "64M")
        run("qemu-io", "-f", "raw", "-c", "write -q 1M 3M", "-c", "write -q 40M 64k", path)
    elif request.param == "dd":
        words = ["bs=1M", "seek=10", "count=2", "conv=notrunc", "status=none"]
        run("truncate", "-s", "32M", path)
        run("dd", "if=/dev/urandom", f"of={path}", *words)
    elif request.param == "truncate":
        run("truncate", "-s", "100M", path)
    elif request.param == "tail":
        path.write_bytes(os.urandom(5000))
        run("truncate", "-s", str(7 * MIB + 123), path)
    elif request.param == "full":
        path.write_bytes(os.urandom(MIB + 1))
    else:
        path.touch()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


@pytest.fixture(autouse=True)
def state(tmp_path: Path, own_directories: None) -> Path:
    """Where records of copies are."""
    return tmp_path / "state/imgfs/copies"


@pytest.fixture
def out(tmp_path: Path, own_directories: None) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"
