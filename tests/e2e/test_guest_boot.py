"""A virtual machine boots from an image that is behind ssh, writes to it, and boots again."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts import MIB, Mount, imgfs
from tests.servers.ssh import Sshd

from . import guest

Mounter = Callable[..., Mount]
LONG = bool(os.environ.get("IMGFS_TEST_LONG"))

#: What is shown, and what qemu calls it.
FORMATS = {
    ".vhdx": "vhdx",
    ".qcow2": "qcow2",
    ".vmdk": "vmdk",
    ".stream.vmdk": "vmdk",
    ".vdi": "vdi",
    ".vhd": "vpc",
}

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(guest.missing()), reason=guest.missing()),
]


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ended(mount: Mount) -> None:
    assert imgfs("umount", mount.point, timeout=60).returncode == 0


def test_boots_direct_and_through_the_page_cache(
    mount: Mounter, sshd: Sshd, tmp_path: Path
) -> None:
    disk, wanted = guest.make_disk(tmp_path)
    before = disk.read_bytes()
    m = mount(sshd.url(disk), "-o", sshd.options)
    for drive in (["cache=none"], []):
        said = guest.boot(m.point / "guest.raw", tmp_path, "format=raw", "snapshot=on", *drive)
        assert guest.told(said) == [wanted], said
    (image,) = m.status()["images"].values()  # type: ignore[attr-defined]
    assert image["errors"] == 0
    # Only what the guest read was fetched.
    assert 0 < image["bytes_python"] < image["size"]
    assert (m.point / "guest.raw").read_bytes() == before


@pytest.mark.parametrize("caches", [("none", "writeback"), *[("writeback", "none")][: int(LONG)]])
def test_works_on_a_snapshot_and_boots_again(
    mount: Mounter, sshd: Sshd, tmp_path: Path, caches: tuple[str, str]
) -> None:
    """What it deletes and trims is given back; the base stays as it is."""
    disk, original = guest.make_disk(tmp_path)
    before = checksum(disk)
    writable = ["format=raw", "discard=unmap", f"cache={caches[0]}"]

    def stored() -> int:
        return sum(p.stat().st_blocks * 512 for p in (tmp_path / "state").rglob("data"))

    m = mount(sshd.url(disk), "-o", sshd.options)
    work = m.point / "snapshots/work"
    work.mkdir()
    most: list[int] = []
    said = guest.boot(
        work / "work.raw",
        tmp_path,
        *writable,
        job="work",
        meanwhile=lambda: most.append(stored()),
    )
    (files,) = guest.told(said)
    assert files != original
    assert most[0] > guest.LARGE
    assert stored() < most[0] - guest.LARGE + MIB
    ended(m)
    m = mount(sshd.url(disk), "-o", sshd.options)
    raw = m.point / "snapshots/work/work.raw"
    subprocess.run(["e2fsck", "-fn", raw], check=True, timeout=60, capture_output=True)
    said = guest.boot(raw, tmp_path, "format=raw", "discard=unmap", f"cache={caches[1]}")
    assert guest.told(said) == [files]
    ended(m)
    assert checksum(disk) == before


@pytest.mark.parametrize("extension", list(FORMATS) if LONG else list(FORMATS)[:1])
def test_boots_from_each_format(mount: Mounter, sshd: Sshd, tmp_path: Path, extension: str) -> None:
    disk, wanted = guest.make_disk(tmp_path)
    m = mount(sshd.url(disk), "-o", sshd.options)
    shown = m.point / f"guest{extension}"
    said = guest.boot(shown, tmp_path, f"format={FORMATS[extension]}", "snapshot=on")
    assert guest.told(said) == [wanted], said


def test_boots_from_the_disk_without_its_free_blocks(mount: Mounter, tmp_path: Path) -> None:
    disk, _ = guest.make_disk(tmp_path)
    said = guest.boot(disk, tmp_path, "format=raw", job="work", meanwhile=lambda: None)
    (files,) = guest.told(said)
    subprocess.run(["e2fsck", "-fn", disk], check=True, timeout=60, capture_output=True)
    m = mount(disk)
    whole, sparse = m.point / "guest.qcow2", m.point / "sparse/guest.qcow2"
    assert sparse.stat().st_size < whole.stat().st_size - guest.LARGE
    said = guest.boot(sparse, tmp_path, "format=qcow2", "snapshot=on")
    assert guest.told(said) == [files], said
