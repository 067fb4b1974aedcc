"""The cache's directories: private, never shared, and swept after a crash."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from imgfs.cache.directory import cache_root, make_root, open_directory, sweep
from imgfs.errors import CacheError

from .memory import MemorySource

CHILD = """
import sys, time
from pathlib import Path
from tests.cache.memory import MemorySource
from imgfs.cache.directory import open_directory
print(open_directory(Path(sys.argv[1]), MemorySource(b"x" * 100)).path.name, flush=True)
time.sleep(60)
"""


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", f"{tmp_path}/a:{tmp_path}/b")
    assert cache_root() == tmp_path / "a"
    monkeypatch.delenv("CACHE_DIRECTORY")
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/xdg")
    assert cache_root() == tmp_path / "xdg" / "imgfs"
    assert stat.S_IMODE(make_root().stat().st_mode) == 0o700
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    assert cache_root().is_absolute()  # the user's home, as the system knows it


def test_one_directory_a_source_and_none_shared(tmp_path: Path) -> None:
    source = MemorySource(b"x" * 100, name="odd name/ü.img")
    first = open_directory(tmp_path, source)
    second = open_directory(tmp_path, source)
    assert first.path != second.path
    assert {first.path.parent, second.path.parent} == {tmp_path}
    about = json.loads((first.path / "source").read_text())
    assert about == {"url": source.url, "identity": source.name, "size": 100}
    assert os.fstat(first.blocks).st_size == 100
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o700
    sweep(tmp_path)
    assert first.path.exists() and second.path.exists()
    first.close()
    second.close()
    assert not first.path.exists() and not second.path.exists()


def test_what_a_dead_process_left_is_swept(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    left = tmp_path / child.stdout.readline().strip()
    sweep(tmp_path)
    assert (left / "blocks").exists()  # still in use
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    (tmp_path / "a person's own file").write_text("stays")
    (tmp_path / "directory").mkdir()
    sweep(tmp_path)
    assert not left.exists()
    assert (tmp_path / "a person's own file").exists() and (tmp_path / "directory").exists()


def test_a_root_that_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CacheError, match="cannot be kept"):
        make_root()
    with pytest.raises(CacheError, match=r"no cache for disk\.img"):
        open_directory(tmp_path / "file", MemorySource(b""))
