"""The cache's directories: private, never shared, and swept after a crash."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from imgfs.cache.directory import (
    cache_root,
    list_entries,
    make_root,
    open_directory,
    remove,
    sweep,
)
from imgfs.errors import CacheError
from imgfs.sources.base import Identity

from .memory import MemorySource

CHILD = """
import sys, time
from pathlib import Path
from tests.cache.memory import MemorySource
from imgfs.cache.directory import open_directory
opened = [open_directory(Path(sys.argv[1]), MemorySource(b"x" * 100)) for _ in range(2)]
print(*(each.path.name for each in opened), flush=True)
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
    assert (first.is_kept, second.is_kept) == (True, False)
    about = json.loads((first.path / "source").read_text())
    assert about["url"] == source.url and about["size"] == 100
    assert about["identity"] == ["stat", source.stat.identity.token]
    assert os.fstat(first.blocks).st_size == 100
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o700
    sweep(tmp_path)
    assert first.path.exists() and second.path.exists()
    first.close()
    second.close()
    assert first.path.exists() and not second.path.exists()


def test_what_a_dead_process_left_is_swept(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    first, second = (tmp_path / name for name in child.stdout.readline().split())
    sweep(tmp_path)
    assert (second / "blocks").exists()  # still in use
    assert not remove(tmp_path, first)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    (tmp_path / "a person's own file").write_text("stays")
    (tmp_path / "directory").mkdir()
    sweep(tmp_path)
    assert not second.exists()  # what was never to be kept
    assert first.exists()
    assert remove(tmp_path, first) and not first.exists()
    assert (tmp_path / "a person's own file").exists() and (tmp_path / "directory").exists()


def test_a_root_that_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CacheError, match="cannot be kept"):
        make_root()
    with pytest.raises(CacheError, match=r"no cache for disk\.img"):
        open_directory(tmp_path / "file", MemorySource(b""))


def test_only_what_tells_states_apart_is_kept(tmp_path: Path) -> None:
    def kept(identity: Identity | None, mtime: float) -> bool:
        source = MemorySource(b"x" * 100)
        source.stat = replace(source.stat, identity=identity, mtime_ns=int(mtime * 1e9))
        directory = open_directory(tmp_path, source)
        directory.close()
        return directory.is_kept

    now = time.time()
    assert kept(Identity("stat", "x"), now)
    assert not kept(None, 0)
    assert not kept(Identity("sftp", "100:1"), now)  # may change again within the second
    assert kept(Identity("sftp", "100:1"), now - 3)


def test_list(tmp_path: Path) -> None:
    old, new = (MemorySource(name.encode() * 100000, name=name) for name in ("old", "new"))
    for source in (old, new):
        directory = open_directory(tmp_path, source)
        os.pwrite(directory.blocks, source.content, 0)
        directory.close()
    os.utime(next(tmp_path.glob("old-*")), (1, 1))
    busy = open_directory(tmp_path, new)
    found = list_entries(tmp_path)
    assert [e.about["url"] for e in found] == [new.url, old.url]
    assert [e.in_use for e in found] == [True, False]
    assert all(e.used >= 300000 for e in found)
    busy.close()
