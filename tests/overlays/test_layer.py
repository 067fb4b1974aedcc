"""Layers by themselves: sizes, torn moments, and disks that fail."""

from __future__ import annotations

import subprocess
import sys
from array import array
from pathlib import Path

from imgfs._native import _map
from imgfs.overlays.layer import Ranges, make_layer, open_layer
from imgfs.overlays.log import BLOCK

SIZE = 64 * BLOCK

# Longer than what is compacted.
LONG_LOG = """
import imgfs.overlays.layer
imgfs.overlays.layer._COMPACT = 4096
for number in range(100):
    layer.drop(0, 4096)
commit((7, 1, _map.ZERO))
"""


def ranges(*blocks: tuple[int, int, int]) -> Ranges:
    starts = array("Q", [first * BLOCK for first, _, _ in blocks])
    ends = array("Q", [(first + count) * BLOCK for first, count, _ in blocks])
    return starts, ends, bytes(kind for _, _, kind in blocks)


def test_a_shrunk_layer_opens_again(tmp_path: Path) -> None:
    make_layer(tmp_path / "layer", SIZE)
    layer = open_layer(tmp_path / "layer", writable=True)
    layer.store.write(0, b"x" * BLOCK)
    layer.commit(ranges((0, 1, _map.STORE), (40, 3, _map.ZERO)), SIZE)
    layer.resize(2 * BLOCK)
    layer.commit(ranges(), 2 * BLOCK)
    layer.close()
    layer = open_layer(tmp_path / "layer")
    assert layer.size == layer.state.size == layer.store.size == 2 * BLOCK
    assert [each[:3] for each in layer.state.segments(0, layer.size)] == [
        (0, BLOCK, _map.STORE),
        (BLOCK, 2 * BLOCK, _map.ASK),
    ]
    layer.close()


def test_a_kill_between_shrinking_and_commit(tmp_path: Path) -> None:
    make_layer(tmp_path / "layer", SIZE)
    layer = open_layer(tmp_path / "layer", writable=True)
    layer.resize(3 * BLOCK)
    layer.close()
    layer = open_layer(tmp_path / "layer")
    assert layer.size == 3 * BLOCK
    layer.close()


def failing(call: str, which: str, code: str, path: Path) -> str:
    """What the code prints when the kernel fails the `which` of these calls with EIO."""
    make_layer(path, 1 << 30)
    setting = f"""
import os, sys
from array import array
from pathlib import Path
from imgfs._native import _map
from imgfs.overlays.layer import open_layer
from tests.overlays.test_layer import ranges
layer = open_layer(Path({str(path)!r}), writable=True)
def commit(*blocks):
    try:
        layer.commit(ranges(*blocks), layer.size)
    except OSError as exc:
        print(exc.errno, end=" ")
    else:
        print("good", end=" ")
"""
    command = ["strace", "-f", "--seccomp-bpf", "-o", "/dev/null"]
    command += ["-e", f"trace={call}", "-e", f"inject={call}:error=EIO:when={which}"]
    command += [sys.executable, "-c", setting + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_disk_that_lost_data_once(tmp_path: Path) -> None:
    """A second fdatasync would succeed, and the bytes would be gone all the same."""
    code = """
layer.store.write(0, b"x" * 4096)
commit((0, 1, _map.STORE))
commit((0, 1, _map.STORE))
"""
    assert failing("fdatasync", "1", code, tmp_path / "layer") == "5 5"


def test_a_log_that_could_not_be_appended_to(tmp_path: Path) -> None:
    code = """
commit((0, 1, _map.ZERO))
commit((1, 1, _map.ZERO))
"""
    assert failing("fdatasync", "2", code, tmp_path / "layer") == "5 good"
    layer = open_layer(tmp_path / "layer")
    assert [each[:3] for each in layer.ranges()[:2]] == [
        array("Q", [BLOCK]),
        array("Q", [2 * BLOCK]),
    ]
    layer.close()


def test_a_compacted_log_whose_name_could_not_be_forced_out(tmp_path: Path) -> None:
    """No commit says that it is durable when it is in a file that may have no name."""
    # The first fsync is of the new log, the second of the directory.
    assert failing("fsync", "2", LONG_LOG, tmp_path / "layer") == "5"


def test_a_full_disk_is_not_filled_by_compacting(tmp_path: Path) -> None:
    assert failing("fsync", "1+", LONG_LOG, tmp_path / "layer") == "good"
    names = sorted(path.name for path in (tmp_path / "layer").iterdir())
    assert names == ["boot", "data", "lock", "log", "sums"]
    layer = open_layer(tmp_path / "layer")
    assert layer.state.segments(7 * BLOCK, BLOCK)[0][2] == _map.ZERO
    layer.close()


def test_zeroes_behind_the_log_are_overwritten(tmp_path: Path) -> None:
    """So that most commits change neither its length nor its blocks; closing gives them back."""
    make_layer(tmp_path / "layer", SIZE)
    layer = open_layer(tmp_path / "layer", writable=True)
    layer.commit(ranges((0, 1, _map.ZERO)), SIZE)
    log = tmp_path / "layer" / "log"
    first = log.stat()
    for block in range(1, 50):
        layer.commit(ranges((block, 1, _map.ZERO)), SIZE)
        now = log.stat()
        assert (now.st_size, now.st_blocks) == (first.st_size, first.st_blocks)
    content = log.read_bytes()
    layer.close()
    assert content == log.read_bytes() + bytes(len(content) - log.stat().st_size)
    log.write_bytes(content)  # as a kill leaves it
    layer = open_layer(tmp_path / "layer", writable=True)
    assert layer.state.segments(0, 50 * BLOCK)[0][:3] == (0, 50 * BLOCK, _map.ZERO)
    layer.commit(ranges((60, 1, _map.ZERO)), SIZE)
    layer.close()
    layer = open_layer(tmp_path / "layer")
    assert layer.state.segments(60 * BLOCK, BLOCK)[0][2] == _map.ZERO
    layer.close()


def test_a_log_grows_on_a_disk_too_full_for_zeroes(tmp_path: Path) -> None:
    """After the one to `boot` each second write is of zeroes, to the log."""
    code = """
commit((0, 1, _map.ZERO))
commit((1, 1, _map.ZERO))
layer.close()
"""
    assert failing("pwrite64", "3+2", code, tmp_path / "layer") == "good good"
    layer = open_layer(tmp_path / "layer")
    assert layer.state.segments(0, 2 * BLOCK)[0][:3] == (0, 2 * BLOCK, _map.ZERO)
    layer.close()
