"""A power loss while a snapshot is committed: the base is what it was, or the commit can be done
again, and is then whole."""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path

import pytest

from imgfs.overlays.rawpins import is_pinned_raw

from .committer import NEW, OLD, STATE, X, base_of, commit, store_of
from .powerloss import Disk, record

TURNS = 20 if os.environ.get("IMGFS_TEST_LONG") else 4


def found_wrong(root: Path, said: str) -> str:
    """What is not as it may be after a power loss; or nothing."""
    image, store = root / "base.img", store_of(root)
    content = image.read_bytes()
    there = [each.path for each in store.snapshots()]
    if content != OLD and not is_pinned_raw(str(image)):
        return "the base was written, and is not pinned as raw"
    if X not in there:
        if said == "written" and content != NEW:
            return "the snapshot is gone, and the base does not have it"
        return "" if content in (OLD, NEW) else "the base is in pieces, and nothing says so"
    if said == "committed":
        return "the snapshot is there still"
    if content not in (OLD, NEW):
        marker = store.directory / "committing"
        if not marker.exists() or b'"x"' not in marker.read_bytes():
            return "the base is in pieces, and nothing says whose doing that is"
    if said == "written":
        commit(root)
        if image.read_bytes() != NEW or store.snapshots():
            return "it was committed again, and is not whole"
    return ""


@pytest.mark.parametrize("strict", [False, True], ids=["loose", "strict"])
def test_power_loss(strict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, marks, after = (tmp_path / name for name in ("disk", "marks", "after"))
    root.mkdir()
    monkeypatch.setenv("STATE_DIRECTORY", str(root / STATE))
    command = [sys.executable, "-m", "tests.overlays.committer", str(root), str(marks)]
    calls = list(record(command, tmp_path / "trace"))
    assert (root / "base.img").read_bytes() == NEW
    monkeypatch.setenv("STATE_DIRECTORY", str(after / STATE))
    disk, said, losses = Disk(root, strict=strict), "", 0
    # A pin is called after the path.
    monkeypatch.setattr(
        "imgfs.overlays.rawpins.os.path.realpath", lambda path: f"{root}/{Path(path).name}"
    )
    for number, call in enumerate(calls):
        if str(marks) in call.paths:
            said = call.data.decode().strip() if call.name == "write" else said
            continue
        disk.apply(call)
        if not said or not any(path.startswith(str(root)) for path in call.paths):
            continue
        for turn in range(TURNS):
            disk.lose(after, random.Random(number * 100 + turn))
            wrong = found_wrong(after, said)
            assert not wrong, f"after call {number} ({said}): {wrong}"
            shutil.rmtree(after)
            losses += 1
    assert said == "committed"
    assert losses >= 50 * TURNS
    assert base_of(root / "base.img").token
