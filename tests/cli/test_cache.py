"""`imgfs cache`: lists, checks and clears what mounts have left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imgfs.cache.directory import BLOCK, open_directory
from imgfs.cache.kept import Kept
from tests.cache.memory import MemorySource


def cache(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "imgfs.cli.main", "cache", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    return tmp_path


def cached(root: Path, name: str, blocks: int) -> MemorySource:
    source = MemorySource(os.urandom(blocks * BLOCK), name=name)
    directory = open_directory(root, source)
    os.pwrite(directory.blocks, source.content, 0)
    kept = Kept(directory, source.size)
    kept.sync_blocks()
    parts = [source.content[i * BLOCK : (i + 1) * BLOCK] for i in range(blocks)]
    kept.record({i: kept.codec.entry_of(i, part) for i, part in enumerate(parts)})
    directory.close()
    return source


def test_list_and_clear(root: Path) -> None:
    assert cache("list").stdout == f"   0 bytes  in {root}\n"
    first, second = cached(root, "first.img", 3), cached(root, "second.img", 2)
    busy = open_directory(root, second)
    said = cache("list").stdout.splitlines()
    assert len(said) == 3
    assert "in use" in said[0] and said[0].endswith(second.url)
    assert said[1].endswith(first.url) and " KiB" in said[1]
    found = json.loads(cache("list", "--json").stdout)
    assert [each["url"] for each in found] == [second.url, first.url]
    assert found[1]["used"] >= 3 * BLOCK and found[1]["size"] == 3 * BLOCK
    done = cache("clear", "memory:nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{second.url}: in use, stays" in cache("clear").stdout
    assert [path.name[:6] for path in root.glob("*-*")] == ["second"]
    busy.close()
    assert "freed" in cache("clear", second.url).stdout
    assert not list(root.glob("*-*"))


def test_check(root: Path) -> None:
    source = cached(root, "disk.img", 4)
    done = cache("check")
    assert (done.returncode, done.stdout) == (
        0,
        f"{source.url}: 4 blocks are good, 0 were bad and are forgotten\n",
    )
    (blocks,) = root.glob("*/blocks")
    with blocks.open("r+b") as file:
        file.seek(2 * BLOCK + 5)
        file.write(b"bad")
    done = cache("check")
    assert (done.returncode, "3 blocks are good, 1 were bad" in done.stdout) == (1, True)
    assert "3 blocks are good, 0 were bad" in cache("check").stdout
    for name in ("checks", "blocks", "source"):
        next(root.glob(f"*/{name}")).write_bytes(b"\xff")
        assert cache("check").returncode in (0, 1)
    next(root.glob("*/blocks")).unlink()
    assert "cannot be checked" in cache("check").stdout


def test_a_check_is_no_use(root: Path) -> None:
    for name, used_s in (("old.img", 1_000_000), ("new.img", 2_000_000)):
        cached(root, name, 2)
        (path,) = root.glob(f"{name}-*")
        os.utime(path, (used_s, used_s))
    with next(root.glob("old*/blocks")).open("r+b") as file:
        file.write(b"bad")  # so that there is something to forget
    assert cache("check").returncode == 1
    found = json.loads(cache("list", "--json").stdout)
    assert [each["last_used"] for each in found] == [2_000_000, 1_000_000]
