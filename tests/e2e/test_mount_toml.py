"""A TOML file of images as a SOURCE: lazily, each with options of its own, read again on SIGHUP."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.images import fill
from tests.mounts import MIB, Mount, imgfs
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != ".imgfs")


def state(m: Mount, name: str) -> str:
    images: dict[str, dict[str, str]] = m.status()["images"]  # type: ignore[assignment]
    return images[name]["state"]


def shown(m: Mount) -> list[str]:
    images = m.status()["images"]
    assert isinstance(images, dict)
    return sorted(images)


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_images_of_all_kinds(mount: Mounter, sshd: Sshd, sparse: Path, tmp_path: Path) -> None:
    file = tmp_path / "images.toml"
    file.write_text(
        f"""
[defaults]
known_hosts = "{sshd.directory / "known"}"
key = "{sshd.directory / "user"}"

[images.here]
source = "{sparse.name}"

[images."there.too"]
source = "{sshd.url(sparse)}"
cache_size = "1M"

[images.command]
command = ["nbdkit", "-r", "file", "{sparse.name}"]

[images.away]
source = "ssh://127.0.0.1:1/x.img"
timeout = 2
"""
    )
    m = mount(file)
    assert names(m.point) == ["away", "command", "here", "there.too"]
    for name in names(m.point):
        assert "extents.json" in names(m.point / name)
        assert state(m, name) == "not opened yet"
    wanted = sparse.read_bytes()
    for name in ("here", "there.too", "command"):
        assert (m.point / name / f"{name}.raw").read_bytes() == wanted
        assert state(m, name) == "open"
    assert state(m, "away") == "not opened yet"
    with pytest.raises(OSError, match="Input/output error"):
        (m.point / "away/away.raw").stat()
    assert state(m, "away") == "failed"
    kept = sum(
        p.stat().st_blocks * 512 for p in (tmp_path / "cache").glob("imgfs/disk.img-*/blocks")
    )
    assert kept <= MIB
    text = (m.point / ".imgfs/metrics").read_text()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    images = {s.labels.get("image") for f in families.values() for s in f.samples} - {None}
    assert images == set(names(m.point))


def test_prefetch_of_some(mount: Mounter, sshd: Sshd, tmp_path: Path) -> None:
    """An image is fetched whole once it is looked at; false stands over [defaults]."""
    for name in ("all", "none", "slow"):
        fill(tmp_path / f"{name}.img", 12 * MIB)
    tables = (
        f'[images.{name}]\nsource = "{sshd.url(tmp_path / f"{name}.img")}"\n{more}\n'
        for name, more in (("all", ""), ("none", "prefetch = false"), ("slow", 'prefetch = "1M"'))
    )
    login = f'known_hosts = "{sshd.directory / "known"}"\nkey = "{sshd.directory / "user"}"'
    (tmp_path / "images.toml").write_text(
        f"[defaults]\nprefetch = true\n{login}\n{''.join(tables)}"
    )
    m = mount(tmp_path / "images.toml")

    def cached(name: str) -> int:
        images: dict[str, dict[str, int]] = m.status()["images"]  # type: ignore[assignment]
        return images[name].get("cached", 0)

    begun = time.monotonic()
    for name in ("all", "none", "slow"):
        (m.point / name / f"{name}.raw").stat()
    wait_for(lambda: cached("all") == 12 * MIB)
    wait_for(lambda: cached("slow") > 0)
    # It goes piece by piece of 2 MiB.
    assert cached("slow") <= (4 + time.monotonic() - begun) * MIB
    assert cached("none") <= 128 << 10  # its two ends, to find out the format


def test_read_again(mount: Mounter, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        fill(tmp_path / f"{name}.img", MIB)
    file = tmp_path / "images.toml"

    def write(**images: str) -> None:
        lines = [f'[images.{name}]\nsource = "{source}"\n' for name, source in images.items()]
        file.write_text("".join(lines))

    write(a="a.img", b="b.img")
    m = mount(file)
    with (m.point / "a/a.raw").open("rb") as a, (m.point / "b/b.raw").open("rb") as b:
        write(a="a.img", c="c.img")
        os.kill(m.pid, signal.SIGHUP)
        wait_for(lambda: names(m.point) == ["a", "c"])
        assert (m.point / "c/c.raw").read_bytes() == (tmp_path / "c.img").read_bytes()
        # Who has them open keeps them, also the one that is gone.
        assert a.read() == (tmp_path / "a.img").read_bytes()
        assert b.read() == (tmp_path / "b.img").read_bytes()
        assert state(m, "b") == "open"
    wait_for(lambda: shown(m) == ["a", "c"])  # nobody has b open any more
    file.write_text("[images.a]\nsorce = 'a.img'\n")
    os.kill(m.pid, signal.SIGHUP)
    wait_for(lambda: "last_error" in m.status())
    assert names(m.point) == ["a", "c"]  # a mistake changes nothing
    said = str(m.status()["last_error"])
    assert "images.toml:2: [images.a] sorce: unknown key" in said and "not reloaded" in said
    assert f"\n{said}\n" in imgfs("top", "--once", m.point).stdout
    write(a="c.img")
    os.kill(m.pid, signal.SIGHUP)
    wait_for(lambda: (m.point / "a/a.raw").read_bytes() == (tmp_path / "c.img").read_bytes())
    assert names(m.point) == ["a"]
    assert shown(m) == ["a"]
    images = m.status()["images"]
    assert isinstance(images, dict) and images["a"]["source"] == str(tmp_path / "c.img")
    assert "last_error" not in m.status()
    assert imgfs("umount", m.point).returncode == 0


def test_a_mistake_is_refused(tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    file = tmp_path / "images.toml"
    file.write_text('[images.x]\nsource = "x.img"\nextends = true\n')
    done = imgfs(file, point)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "images.toml:3:" in done.stderr and "extents" in done.stderr
    assert imgfs(tmp_path / "missing.toml", point).returncode == 1
    assert not point.is_mount()


def test_a_hard_image_waits(mount: Mounter, sshd: Sshd, sparse: Path, tmp_path: Path) -> None:
    """Past its timeout, and reads on when the server is back."""
    m = mount(sshd.url(sparse), "-o", f"{sshd.options},timeout=2,hard")
    raw = m.point / "disk.raw"
    with raw.open("rb"):
        reader = subprocess.Popen(["cmp", sparse, raw], stderr=subprocess.PIPE)
        sshd.stop()
        time.sleep(6)
        sshd.start()
        _, said = reader.communicate(timeout=60)
        assert (reader.returncode, said) == (0, b"")
