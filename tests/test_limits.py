"""How much memory is taken, by the limits in force."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from imgfs import limits
from imgfs.limits import GROUP_SHARE, LEAST, MIB, MOST


def proc(tmp_path: Path, cgroup: str, mounts: list[str]) -> Path:
    found = tmp_path / "proc"
    (found / "self").mkdir(parents=True)
    (found / "self/cgroup").write_text(cgroup)
    lines = (f"31 24 0:2{n} {line}\n" for n, line in enumerate(mounts))
    (found / "self/mountinfo").write_text("".join(lines))
    return found


def group(path: Path, **files: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("_", ".", 1)).write_text(f"{text}\n")


def test_version_2(tmp_path: Path) -> None:
    top = tmp_path / "fs"
    group(top / "a/b/c", memory_max="max", memory_high="max")
    group(top / "a/b", memory_max=str(100 * MIB), memory_high=str(60 * MIB))
    group(top / "a", memory_max=str(90 * MIB))
    group(top / "other", memory_max="1")
    mounts = [f"/ {top} rw - cgroup2 cgroup2 rw", f"/ {top}/other rw - tmpfs tmpfs rw,memory"]
    found = proc(tmp_path, "0::/a/b/c\n", mounts)
    assert sorted(limits.group_limits(found)) == [60 * MIB, 90 * MIB, 100 * MIB]
    assert limits.bound(found) == 60 * MIB // GROUP_SHARE


def test_version_1(tmp_path: Path) -> None:
    top = tmp_path / "fs/memory"
    group(top / "docker/x", memory_limit_in_bytes=str(80 * MIB))
    group(top / "docker", memory_limit_in_bytes="9223372036854771712")
    text = "4:memory:/docker/x\n8:pids:/\n0::/\n1:name=systemd:/\n"
    mounts = [f"/ {top} rw - cgroup cgroup rw,memory", f"/ {tmp_path} rw - cgroup cgroup rw,pids"]
    found = proc(tmp_path, text, mounts)
    assert min(limits.group_limits(found)) == 80 * MIB
    assert limits.bound(found) == 80 * MIB // GROUP_SHARE


def test_in_a_container_that_sees_its_own_part(tmp_path: Path) -> None:
    top = tmp_path / "fs\\040with\\040space"
    group(tmp_path / "fs with space", memory_max=str(50 * MIB))
    for number, (root, path) in enumerate(
        [("/docker/x", "/docker/x"), ("/docker/x", "/elsewhere")]
    ):
        found = proc(tmp_path / str(number), f"0::{path}\n", [f"{root} {top} rw - cgroup2 c rw"])
        assert list(limits.group_limits(found)) == [50 * MIB]


@pytest.mark.parametrize("text", ["", "nonsense\n", "0::/gone\n"])
def test_nothing_known(tmp_path: Path, text: str) -> None:
    found = proc(tmp_path, text if ":" in text else "", [f"/ {tmp_path}/fs rw - cgroup2 c rw"])
    assert list(limits.group_limits(found)) == []
    assert LEAST <= limits.bound(found) <= MOST
    assert list(limits.group_limits(tmp_path / "nowhere")) == []


def test_addresses() -> None:
    code = "from imgfs.limits import bound; print(bound())"
    found = []
    for size in (1 << 40, 300 * MIB, 100 * MIB):
        command = ["prlimit", f"--as={size}", sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        found.append(int(done.stdout))
    assert found == sorted(found, reverse=True)
    assert found[1] < 300 * MIB // 4
    assert found[2] == LEAST
